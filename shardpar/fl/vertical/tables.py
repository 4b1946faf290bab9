"""A party's table, read from CSV: ids, columns of numbers and, at the guest, a label."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardpar.errors import DataError

_MISSING = frozenset({"", "na", "nan", "null", "none", "?"})


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of numbers.

    Attributes:
      ids: of each row.
      names: of the columns.
      columns: float64 [rows, columns], NaN where a number is missing.
      labels: float64 [rows]; None where there is no label.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    columns: np.ndarray
    labels: np.ndarray | None

    def take(self, rows: Sequence[int] | np.ndarray) -> Table:
        """Some rows, in that order."""
        places = np.asarray(rows, np.int64)
        labels = None if self.labels is None else self.labels[places]
        ids = tuple(self.ids[row] for row in places)
        return Table(ids, self.names, self.columns[places], labels)

    def sorted_by_id(self) -> Table:
        """The rows in an order that another party with the same ids comes to as well."""
        return self.take(sorted(range(len(self.ids)), key=self.ids.__getitem__))

    def of_columns(self, names: Sequence[str], path: Path | str = "the table") -> Table:
        """Only these columns, in this order.

        Raises:
          DataError: one is missing.
        """
        missing = [name for name in names if name not in self.names]
        if missing:
            raise DataError(f"{path} has no column {', '.join(missing)}")
        places = [self.names.index(name) for name in names]
        return Table(self.ids, tuple(names), self.columns[:, places], self.labels)


def read_table(path: Path, *, id_column: str, label_column: str | None = None) -> Table:
    """The table in a CSV file with a header; empty fields, NA and ? are missing numbers.

    Args:
      path: of the file, UTF-8.
      id_column: what rows are aligned by.
      label_column: what is to be learned; None where there is none.

    Raises:
      DataError: the file, a column or a number is not there; says in which line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read(path, file, id_column, label_column)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8: convert it") from None


def _read(path: Path, file: object, id_column: str, label_column: str | None) -> Table:
    lines = csv.reader(file)  # type: ignore[call-overload]
    header = next(lines, [])
    if len(set(header)) != len(header):
        raise DataError(f"{path} names a column twice: {', '.join(header)}")
    for wanted in [id_column, *([label_column] if label_column else [])]:
        if wanted not in header:
            raise DataError(f"{path} has no column {wanted!r}; it has {', '.join(header)}")
    names = tuple(name for name in header if name not in {id_column, label_column})
    ids, columns, labels = [], [], []
    for fields in lines:
        if not fields:
            continue
        where = f"{path} line {lines.line_num}"
        if len(fields) != len(header):
            raise DataError(f"{where} has {len(fields)} fields, the header {len(header)}")
        row = dict(zip(header, fields, strict=True))
        ids.append(row[id_column])
        columns.append([_number(row[name], name, where) for name in names])
        if label_column:
            label = _number(row[label_column], label_column, where)
            if math.isnan(label):
                raise DataError(f"{where} has no label: leave the row out")
            labels.append(label)
    numbers = np.array(columns, np.float64).reshape(len(ids), len(names))
    return Table(tuple(ids), names, numbers, np.array(labels) if label_column else None)


def _number(text: str, name: str, where: str) -> float:
    if text.strip().lower() in _MISSING:
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise DataError(
            f"{where} has {text!r} in column {name}, which is no number: encode it as one"
        ) from None
