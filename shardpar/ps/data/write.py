"""Decides how samples are written as files that the readers read back the same."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from shardpar.errors import DataError
from shardpar.ps.data.batch import SparseBatch
from shardpar.ps.data.criteo import CATEGORIES, INTEGERS

WRITTEN = ("libsvm", "libffm", "dummy", "criteo", "csv", "parquet")


def write(batches: Iterable[SparseBatch], path: str | Path, form: str) -> int:
    """Writes samples to a file, gzip-compressed if its name ends with `.gz`.

    csv and parquet have the columns `label`, and the ids of each slot as `f0`, `f1`, …; then
    dense features as `d0`, …. criteo has the ids of the first 13 slots as integers and of 26
    more as hexadecimal categories. dummy, criteo, csv and parquet say no values.

    Args:
      batches: rows of weight 0 are left out.
      path: of the file, which is replaced.
      form: one of `WRITTEN`.

    Returns:
      How many samples were written.

    Raises:
      DataError: the file cannot be written, or the samples do not fit the format.
    """
    if form not in WRITTEN:
        raise DataError(f"data is not written as {form!r}; there are {', '.join(WRITTEN)}")
    kept = (batch.take(batch.weights > 0) for batch in batches)
    try:
        if form == "parquet":
            return _write_parquet(kept, path)
        return _write_lines(kept, path, form)
    except OSError as problem:
        raise DataError(f"{path} cannot be written: {problem.strerror or problem}") from None


def _write_lines(batches: Iterable[SparseBatch], path: str | Path, form: str) -> int:
    lines_of: Callable[[SparseBatch], list[str]] = {
        "libsvm": _libsvm, "libffm": _libffm, "dummy": _dummy, "criteo": _criteo, "csv": _csv
    }[form]  # fmt: skip
    written = 0
    compressed = str(path).endswith(".gz")
    with gzip.open(path, "wt", compresslevel=1) if compressed else open(path, "w") as file:
        for batch in batches:
            if form == "csv" and not written:
                file.write(",".join(_names(batch)) + "\n")
            file.writelines(lines_of(batch))
            written += len(batch)
    return written


def _numbers(values: np.ndarray) -> list[str]:
    """The shortest texts that are these float32 when read."""
    whole = values == np.rint(values)
    if whole.all() and (np.abs(values) < 2**53).all():
        return [str(value) for value in values.astype(np.int64).tolist()]
    return [str(value) for value in values.astype(np.float32)]


def _rows(batch: SparseBatch) -> Iterable[tuple[str, list[int], list[str], list[int] | None]]:
    labels = _numbers(batch.labels)
    for row, label in enumerate(labels):
        there = batch.values[row] != 0
        fields = None if batch.fields is None else batch.fields[row][there].tolist()
        yield label, batch.ids[row][there].tolist(), _numbers(batch.values[row][there]), fields


def _libsvm(batch: SparseBatch) -> list[str]:
    lines = []
    for row, (label, ids, values, _) in enumerate(_rows(batch)):
        pairs = [f"{number + 1}:{value}" for number, value in zip(ids, values, strict=True)]
        if batch.queries is not None and batch.queries.any():
            pairs.insert(0, f"qid:{batch.queries[row]}")
        lines.append(" ".join((label, *pairs)) + "\n")
    return lines


def _libffm(batch: SparseBatch) -> list[str]:
    if batch.fields is None:
        raise DataError("libffm needs fields, and these samples have none; write them as libsvm")
    return [
        " ".join([label, *map("%d:%d:%s".__mod__, zip(fields or (), ids, values, strict=True))])
        + "\n"
        for label, ids, values, fields in _rows(batch)
    ]


def _dummy(batch: SparseBatch) -> list[str]:
    return [" ".join((label, *map(str, ids))) + "\n" for label, ids, _, _ in _rows(batch)]


def _criteo(batch: SparseBatch) -> list[str]:
    if batch.slots < INTEGERS + CATEGORIES:
        raise DataError(
            f"criteo has {INTEGERS + CATEGORIES} features, and these samples {batch.slots}; "
            "write them as libffm"
        )
    line = "%s" + "\t%d" * INTEGERS + "\t%08x" * CATEGORIES + "\n"
    labels, ids = _numbers(batch.labels), batch.ids[:, : INTEGERS + CATEGORIES].tolist()
    return [line % (label, *row) for label, row in zip(labels, ids, strict=True)]


def _names(batch: SparseBatch) -> list[str]:
    dense = 0 if batch.dense is None else batch.dense.shape[1]
    return ["label", *(f"f{i}" for i in range(batch.slots)), *(f"d{i}" for i in range(dense))]


def _csv(batch: SparseBatch) -> list[str]:
    dense = np.zeros((len(batch), 0)) if batch.dense is None else batch.dense
    return [
        ",".join((label, *map(str, ids), *_numbers(numbers))) + "\n"
        for label, ids, numbers in zip(
            _numbers(batch.labels), batch.ids.tolist(), dense, strict=True
        )
    ]


def _write_parquet(batches: Iterable[SparseBatch], path: str | Path) -> int:
    try:
        import pyarrow as pa
        from pyarrow import parquet as pq
    except ImportError:
        raise DataError(
            "Parquet needs pyarrow, which is not installed; run `pip install 'shardpar[parquet]'`"
        ) from None
    written = 0
    writer: Any = None
    try:
        for batch in batches:
            dense = np.zeros((len(batch), 0), np.float32) if batch.dense is None else batch.dense
            arrays = [batch.labels, *batch.ids.T, *dense.T]
            table = pa.table(
                {
                    name: np.ascontiguousarray(array)
                    for name, array in zip(_names(batch), arrays, strict=True)
                }
            )
            writer = writer or pq.ParquetWriter(path, table.schema, write_page_checksum=True)
            writer.write_table(table)
            written += len(batch)
    finally:
        if writer is not None:
            writer.close()
    return written
