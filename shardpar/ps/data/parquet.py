"""Reads Parquet: columns by name, through pyarrow (extra `parquet`).

Integers are ids as they are, or hashed; text is always hashed. A missing text is a text of no
letters; a missing integer is that too where integers are hashed, and no feature where not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from shardpar.errors import DataError
from shardpar.ps.data.batch import SparseBatch
from shardpar.ps.data.csv_columns import choose_columns
from shardpar.ps.data.delimited import Columns, rows_of
from shardpar.ps.data.files import DataFile, Unit
from shardpar.ps.data.hashing import WORD_BYTES, hash_integers, hash_text, hash_tokens
from shardpar.ps.data.options import SparseDataOptions
from shardpar.ps.data.rows import BadLineError, Parsed, RowShape, check_id
from shardpar.ps.data.source import FILE_SHIFT, Piece

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet as pq

_PIECE_ROWS = 1 << 16


def _arrow() -> tuple[Any, Any, Any]:
    try:
        import pyarrow
        from pyarrow import compute, parquet
    except ImportError:
        raise DataError(
            "Parquet needs pyarrow, which is not installed; run `pip install 'shardpar[parquet]'`"
        ) from None
    return pyarrow, compute, parquet


@dataclass(frozen=True, eq=False)
class ParquetSource:
    """Rows of Parquet files; a unit is a row group.

    Attributes:
      files: in their order.
      columns: of all of them.
      shape: of the rows.
    """

    files: tuple[DataFile, ...]
    columns: Columns
    shape: RowShape

    @property
    def identity(self) -> dict[str, Any]:
        """The files' digests and their format."""
        return {"format": "parquet", "files": [file.digest for file in self.files]}

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The row groups; `start` and `stop` count rows."""
        units = []
        for index, file in enumerate(self.files):
            first = 0
            for rows in _guarded(file, lambda opened: [
                opened.metadata.row_group(group).num_rows
                for group in range(opened.metadata.num_row_groups)
            ]):  # fmt: skip
                units.append(Unit(index, first, first + rows))
                first += rows
        return tuple(units)

    def pieces(self, unit: int, offset: int) -> Iterator[Piece]:
        """The rows of a row group, some ten thousand at a time."""
        part = self.units[unit]
        file = self.files[part.file]
        pa, _, _ = _arrow()
        group = unit - next(i for i, each in enumerate(self.units) if each.file == part.file)
        used = (self.columns.label, *self.columns.numeric, *self.columns.categorical)
        names = [self.columns.names[place] for place in used]
        done = 0
        try:
            with _open(file) as opened:
                for batch in opened.iter_batches(_PIECE_ROWS, row_groups=[group], columns=names):
                    start, done = done, done + batch.num_rows
                    if start < offset or not batch.num_rows:
                        continue
                    rows = np.arange(part.start + start, part.start + done)
                    table = pa.Table.from_batches([batch])
                    yield Piece(rows | part.file << FILE_SHIFT, table, unit, start)
        except _failures() as problem:
            raise _damaged(file, problem) from None

    def joined(self, rows: Sequence[pa.Table]) -> pa.Table:
        """The rows of several pieces."""
        return rows[0] if len(rows) == 1 else _arrow()[0].concat_tables(rows)

    def parse(self, rows: pa.Table, which: np.ndarray) -> Parsed:
        """Some of the rows."""
        if which.size and (np.diff(which) == 1).all():
            table = rows.slice(int(which[0]), which.size)
        else:
            table = rows.take(which)
        columns, shape = self.columns, self.shape
        names, reasons = columns.names, {}
        labels, absent = _numbers(table.column(names[columns.label]))
        _refuse(reasons, absent, "the label is missing")
        _refuse(reasons, ~absent & ~_finite(labels), "the label is not a finite number")
        numbers = np.zeros((table.num_rows, len(columns.numeric)))
        empty = np.zeros(numbers.shape, bool)
        for place, column in enumerate(columns.numeric):
            values, none = _numbers(table.column(names[column]))
            if columns.missing is None:
                _refuse(
                    reasons, none, f"column {names[column]} is missing; "
                    "write data.missing=0 to count empty cells as 0"
                )  # fmt: skip
            _refuse(
                reasons, ~none & ~_finite(values),
                f"column {names[column]} is not a finite 32-bit float",
            )  # fmt: skip
            numbers[:, place], empty[:, place] = np.where(_finite(values), values, 0), none
        ids = np.zeros((table.num_rows, len(columns.categorical)), np.int64)
        weights = np.ones(ids.shape, np.float32)
        for place, column in enumerate(columns.categorical):
            ids[:, place], none = _ids(
                table.column(names[column]), place, shape, names[column], reasons
            )
            weights[:, place] = ~none
        labels = np.where(_finite(labels), labels, 0)
        rows_ = rows_of(columns, shape, labels, numbers, empty, ids)
        batch = SparseBatch(
            rows_.ids, weights, labels > 0 if shape.binary_labels else labels,
            np.ones(table.num_rows), np.zeros(table.num_rows), rows_.fields, rows_.dense,
        )  # fmt: skip
        failed = np.zeros(table.num_rows, bool)
        failed[list(reasons)] = True
        return Parsed(batch.without(failed), tuple(sorted(reasons.items())))

    def locate(self, sample: int) -> str:
        """File and row, from 1."""
        row = sample & ((1 << FILE_SHIFT) - 1)
        return f"{self.files[sample >> FILE_SHIFT].path}: row {row + 1}"


def open_parquet(files: tuple[DataFile, ...], options: SparseDataOptions) -> ParquetSource:
    """Finds the columns of Parquet files.

    Raises:
      DataError: pyarrow is missing, a file is none or is damaged, or its columns are not those
        that the options name.
    """
    pa, _, _ = _arrow()
    source = None
    for file in files:
        if file.compressed:
            raise DataError(f"{file.path}: a Parquet file is not gzip-compressed; unpack it")
        schema = _guarded(file, lambda opened: opened.schema_arrow)
        columns = choose_columns(schema.names, options, file.path)
        for place in (columns.label, *columns.numeric):
            _check_type(file, schema.field(place), _is_number(pa, schema.field(place).type))
        for place in columns.categorical:
            _check_type(file, schema.field(place), _is_category(pa, schema.field(place).type))
        if source is None:
            shape = columns.shape(options.rows, options.binary_labels)
            shape = RowShape(**vars(shape) | {"hashed": options.hashed})
            source = ParquetSource(files, columns, shape)
        elif columns != source.columns:
            raise DataError(
                f"{file.path}: the columns are not those of {files[0].path}; "
                "read files with different columns by themselves"
            )
    assert source is not None, "there is at least one file"
    return source


def _is_number(pa: Any, kind: Any) -> bool:
    types = pa.types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def _is_category(pa: Any, kind: Any) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    texts = types.is_string(kind) or types.is_large_string(kind)
    return texts or types.is_binary(kind) or types.is_integer(kind) or types.is_boolean(kind)


def _check_type(file: DataFile, field: pa.Field, fits: bool) -> None:
    if not fits:
        raise DataError(
            f"{file.path}: column {field.name!r} is {field.type}; a label or number must be of "
            "integers, floats or booleans, a category of integers, text or booleans"
        )


def _open(file: DataFile) -> pq.ParquetFile:
    return _arrow()[2].ParquetFile(file.path, page_checksum_verification=True)


def _failures() -> tuple[type[Exception], ...]:
    return (_arrow()[0].ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError)


def _guarded(file: DataFile, look: Any) -> Any:
    failures = _failures()
    try:
        with _open(file) as opened:
            return look(opened)
    except failures as problem:
        raise _damaged(file, problem) from None


def _damaged(file: DataFile, problem: Exception) -> DataError:
    reason = " ".join(str(problem).split())[:200]
    return DataError(f"{file.path} is no Parquet file, or is damaged: {reason}")


def _numbers(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    pa, compute, _ = _arrow()
    values = compute.cast(column, pa.float64(), safe=False).combine_chunks()
    none = np.asarray(values.is_null().to_numpy(zero_copy_only=False), bool)
    return np.asarray(values.fill_null(0).to_numpy(zero_copy_only=False), np.float64), none


def _finite(values: np.ndarray) -> np.ndarray:
    return np.abs(values) <= np.finfo(np.float32).max


def _refuse(reasons: dict[int, str], rows: np.ndarray, reason: str) -> None:
    for row in np.flatnonzero(rows).tolist():
        reasons.setdefault(row, reason)


def _ids(
    column: pa.ChunkedArray, field: int, shape: RowShape, name: str, reasons: dict[int, str]
) -> tuple[np.ndarray, np.ndarray]:
    pa, compute, _ = _arrow()
    if pa.types.is_dictionary(column.type):
        column = compute.cast(column, column.type.value_type)
    fields = np.full(len(column), field)
    if not (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        texts = compute.cast(column, pa.large_binary()).combine_chunks().fill_null(b"")
        _, offsets, letters = texts.buffers()
        ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
        first, last = int(ends[0]), int(ends[-1])
        data = np.zeros(last - first + WORD_BYTES, np.uint8)
        if last > first:
            data[:-WORD_BYTES] = np.frombuffer(letters, np.uint8)[first:last]
        words = np.ndarray((data.size - WORD_BYTES + 1,), "<u8", data, strides=(1,))
        ends = ends - first
        hashed = hash_tokens(words, ends[:-1], ends[1:], fields, shape.rows)
        return hashed, np.zeros(len(column), bool)
    unsigned = pa.types.is_uint64(column.type)
    integers = compute.cast(column, pa.uint64() if unsigned else pa.int64()).combine_chunks()
    none = np.asarray(integers.is_null().to_numpy(zero_copy_only=False), bool)
    numbers = np.asarray(integers.fill_null(0).to_numpy(zero_copy_only=False))
    _refuse(reasons, numbers > np.uint64(2**63 - 1) if unsigned else numbers < 0,
            f"the id in column {name} is negative or above 2**63-1")  # fmt: skip
    numbers = numbers.astype(np.int64)
    if shape.hashed:
        ids = hash_integers(numbers, fields, shape.rows)
        return np.where(none, hash_text(b"", field, shape.rows), ids), np.zeros_like(none)
    if shape.rows is not None:
        for row in np.flatnonzero(numbers >= shape.rows).tolist():
            try:
                check_id(int(numbers[row]), shape)
            except BadLineError as problem:
                reasons.setdefault(row, f"column {name}: {problem}")
    return numbers, none
