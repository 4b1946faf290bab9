"""Writes columns of results as Parquet, CSV or TSV; a file is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from pyarrow import csv, parquet

from shardpar.errors import UserError
from shardpar.run.durable import sync_directory

SUFFIXES = (".parquet", ".csv", ".tsv")


def check_destination(path: str | Path) -> Path:
    """Makes sure, before hours of work, that a file can be written there.

    Raises:
      UserError: the suffix says no format, or there is no such directory.

    >>> check_destination("ranks.txt")
    Traceback (most recent call last):
    ...
    shardpar.errors.UserError: --out ranks.txt: its name has to end in .parquet, .csv or .tsv
    """
    place = Path(path)
    if place.suffix not in SUFFIXES:
        raise UserError(f"--out {path}: its name has to end in .parquet, .csv or .tsv")
    if place.is_dir():
        raise UserError(f"--out {path}: this is a directory; write the name of a file")
    if not place.parent.is_dir():
        raise UserError(f"--out {path}: there is no directory {place.parent}; make it first")
    if not os.access(place.parent, os.W_OK):
        raise UserError(f"--out {path}: the directory {place.parent} cannot be written to")
    return place


def write_columns(path: str | Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes a table; the suffix of the path says how.

    Args:
      path: an existing file is replaced once the new one is whole.
      columns: arrays of equal length, by name.

    Raises:
      UserError: the file cannot be written; what was there before is still there.
    """
    place = check_destination(path)
    table = arrow.table({name: _column(values) for name, values in columns.items()})
    draft = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(draft, "wb") as file:
                _write(table, file, place.suffix)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, place)
        finally:
            draft.unlink(missing_ok=True)
        sync_directory(place.parent)
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror or error}") from None


def _column(values: np.ndarray) -> Any:
    return arrow.array(values, arrow.string() if values.dtype.kind in "OU" else None)


def _write(table: Any, file: Any, suffix: str) -> None:
    if suffix == ".parquet":
        parquet.write_table(table, file)
        return
    options = csv.WriteOptions(
        include_header=False, delimiter="," if suffix == ".csv" else "\t", quoting_style="needed"
    )
    file.write((options.delimiter.join(table.column_names) + "\n").encode())
    csv.write_csv(table, file, options)
