"""Decides how columns become rows: labels, dense numbers, and text as one hashed id per field."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shardpar.ps.data.hashing import hash_integers, hash_text, hash_tokens
from shardpar.ps.data.rows import BadLineError, Parsed, Rows, RowShape, number, read_rows
from shardpar.ps.data.tokens import Text, Tokens, exactly, parse_numbers, split

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_QUOTE = ord('"')

# Buckets of an integer: 0 says missing; then -3 (and below) to 2 one by one; then by log².
_LOWEST, _BY_LOG, _FIRST_BY_LOG = -3, 2, 8


@dataclass(frozen=True)
class Columns:
    """Which column is what.

    Attributes:
      names: of all columns of the file, in its order.
      label: place of the label among them.
      numeric: places of the numbers.
      categorical: places of the texts.
      integers: what becomes of the numbers: "raw" and "log" are dense columns, "bucket" gives
        fields before those of the texts.
      missing: what an empty number counts as; None makes it an error.
    """

    names: tuple[str, ...]
    label: int
    numeric: tuple[int, ...] = ()
    categorical: tuple[int, ...] = ()
    integers: Literal["log", "raw", "bucket"] = "raw"
    missing: float | None = None

    @property
    def dense(self) -> int:
        """How many dense columns a row has."""
        return 0 if self.integers == "bucket" else len(self.numeric)

    @property
    def slots(self) -> int:
        """How many fields, which are features with an id, a row has."""
        return len(self.categorical) + len(self.numeric) - self.dense

    def shape(self, rows: int | None, binary_labels: bool) -> RowShape:
        """Of the rows that are made of these columns."""
        return RowShape(
            self.slots, self.dense, rows, hashed=True, binary_labels=binary_labels, with_fields=True
        )


def rows_of(
    columns: Columns,
    shape: RowShape,
    labels: np.ndarray,
    numbers: np.ndarray,
    absent: np.ndarray,
    texts: np.ndarray,
) -> Rows:
    """Rows of columns that were read.

    Args:
      columns: which they are.
      shape: of the rows.
      labels: float64 [rows].
      numbers: float64 [rows, numeric].
      absent: bool [rows, numeric]: which numbers are missing.
      texts: int64 [rows, categorical]: ids.
    """
    dense, ids = None, texts
    if columns.integers == "bucket":
        places = np.arange(len(columns.numeric))
        ids = np.hstack((hash_integers(buckets(numbers, absent), places, shape.rows), texts))
    elif columns.numeric:
        if columns.integers == "log":
            numbers = np.log1p(np.maximum(numbers, 0))
        if columns.missing is not None:
            numbers = np.where(absent, columns.missing, numbers)
        dense = numbers.astype(np.float32)
    fields = np.broadcast_to(np.arange(columns.slots, dtype=np.int32), ids.shape)
    return Rows(labels, ids, np.ones(ids.shape, np.float32), fields.copy(), dense)


def buckets(numbers: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """Buckets of integers, as the winners of Criteo's contest of 2014 had them.

    >>> buckets(np.array([0.0, -9, 2, 3, 1000]), np.array([True, False, False, False, False]))
    array([ 0,  1,  6,  9, 55])
    """
    small = np.maximum(numbers, _LOWEST) - (_LOWEST - 1)
    by_log = _FIRST_BY_LOG + np.floor(np.log(np.maximum(numbers, 1)) ** 2)
    return np.where(absent, 0, np.where(numbers > _BY_LOG, by_log, small)).astype(np.int64)


@dataclass(frozen=True)
class Delimited:
    """A file of columns with one byte between them.

    Quotes are understood as in RFC 4180, but no line end between them.

    Attributes:
      name: of the format.
      columns: of the file.
      shape: of the rows.
      delimiter: the byte between columns.
      header: the file's first line, where it names the columns.
      quoted: whether a `"` begins a quoted cell.

    >>> columns = Columns(("click", "price", "site"), 0, (1,), (2,))
    >>> rows = Delimited("csv", columns, columns.shape(1000, False)).parse([b"1,2.5,ab"])
    >>> rows.batch.dense.tolist(), rows.batch.ids.tolist()
    ([[2.5]], [[446]])
    """

    name: str
    columns: Columns
    shape: RowShape
    delimiter: bytes = b","
    header: bytes | None = None
    quoted: bool = True

    def parse(self, lines: Sequence[bytes]) -> Parsed:
        """Reads lines; those that cannot be read are in `bad`."""
        return read_rows(lines, self.shape, self._block, self._single)

    def _block(self, lines: Sequence[bytes]) -> tuple[Rows | None, np.ndarray]:
        text, columns = Text.of(lines), self.columns
        tokens = split(text, exactly(self.delimiter[0], text.data), merge=False)
        width = len(columns.names)
        odd = tokens.counts != width
        if self.quoted:
            quotes = np.flatnonzero(text.data == _QUOTE)
            if quotes.size:
                line_ends = tokens.ends[np.cumsum(tokens.counts) - 1]
                odd[np.searchsorted(line_ends, quotes)] = True
        if odd.any():
            return None, odd
        grid = Tokens(
            *(array.reshape(-1, width) for array in
              (tokens.starts, _unended(text, tokens), tokens.closers, tokens.dots)),
            tokens.counts, tokens.strange,
        )  # fmt: skip
        numeric = [columns.label, *columns.numeric]
        picked = [array[:, numeric].ravel() for array in (grid.starts, grid.ends, grid.closers)]
        dots = grid.dots[:, numeric].ravel()
        cells = Tokens(*picked, dots, tokens.counts, tokens.strange)
        values, right = parse_numbers(text, cells)
        right &= np.abs(values) <= _FLOAT32_MAX
        empty = cells.starts == cells.ends
        values[empty] = 0
        values, right, empty = (a.reshape(-1, len(numeric)) for a in (values, right, empty))
        odd |= ~right[:, 0]
        if columns.missing is not None:
            right |= empty
        odd |= ~right[:, 1:].all(axis=1)
        places = list(columns.categorical)
        field = np.arange(len(places)) + (columns.slots - len(places))
        starts, ends = grid.starts[:, places], grid.ends[:, places]
        fields = np.broadcast_to(field, starts.shape).ravel()
        texts = hash_tokens(text.words, starts.ravel(), ends.ravel(), fields, self.shape.rows)
        rows = rows_of(
            columns, self.shape, values[:, 0], values[:, 1:], empty[:, 1:],
            texts.reshape(starts.shape),
        )  # fmt: skip
        return rows, odd

    def _single(self, line: bytes) -> Rows:
        cells, columns = self._cells(line), self.columns
        if len(cells) != len(columns.names):
            raise BadLineError(
                f"it has {len(cells)} columns where {len(columns.names)} are expected"
            )
        label = number(cells[columns.label].strip(), self._called(columns.label))
        numbers, absent = np.zeros((1, len(columns.numeric))), np.zeros(len(columns.numeric), bool)
        for place, column in enumerate(columns.numeric):
            cell = cells[column].strip()
            if cell or columns.missing is None:
                numbers[0, place] = self._number(cell, column)
            else:
                absent[place] = True
        first = columns.slots - len(columns.categorical)
        texts = [
            hash_text(cells[column], first + place, self.shape.rows)
            for place, column in enumerate(columns.categorical)
        ]
        ids = np.array([texts], np.int64).reshape(1, len(texts))
        return rows_of(columns, self.shape, np.array([label]), numbers, absent[None], ids)

    def _number(self, cell: bytes, column: int) -> float:
        try:
            return number(cell, self._called(column))
        except BadLineError as problem:
            if cell:
                raise
            raise BadLineError(
                f"{problem}; write data.missing=0 to count empty cells as 0"
            ) from None

    def _called(self, column: int) -> str:
        name = self.columns.names[column]
        return "the label" if column == self.columns.label else f"column {name}"

    def _cells(self, line: bytes) -> list[bytes]:
        line = line.removesuffix(b"\r")
        if not self.quoted or b'"' not in line:
            return line.split(self.delimiter)
        # Latin-1 keeps every byte as it is.
        try:
            (cells,) = csv.reader(
                [line.decode("latin-1")], delimiter=self.delimiter.decode("latin-1"), strict=True
            )
        except (csv.Error, ValueError) as problem:
            raise BadLineError(f"its quotes do not match ({problem})") from None
        return [cell.encode("latin-1") for cell in cells]


def _unended(text: Text, tokens: Tokens) -> np.ndarray:
    """Ends of the tokens, less the carriage return of a line that ends with one."""
    last = np.cumsum(tokens.counts) - 1
    stops = tokens.ends[last]
    returns = (text.data[stops - 1] == ord("\r")) & (stops > tokens.starts[last])
    if not returns.any():
        return tokens.ends
    ends = tokens.ends.copy()
    ends[last] -= returns
    return ends
