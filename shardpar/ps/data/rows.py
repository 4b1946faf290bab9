"""Decides how lines become rows: the many that are as usual together, each odd one by itself.

A format has two readers that agree: one for blocks of lines, in NumPy, which also says which
lines it cannot read; and a plain one for a single line, which reads it or says what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shardpar.ps.data.batch import SparseBatch
from shardpar.ps.data.hashing import hash_integers

LARGEST_ID = 2**63 - 1
SHOWN_BYTES = 60

_WHOLE = re.compile(rb"[0-9]{1,19}")
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_NUMBER = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(rb"[+-]?(nan|inf|infinity)", re.IGNORECASE)


class BadLineError(ValueError):
    """A line that cannot be read; the text says why, and nothing of where it stands."""


@dataclass(frozen=True, eq=False)
class Parsed:
    """Rows that were read.

    Attributes:
      batch: one row for each line; those that are bad have weight 0.
      bad: row and reason of each bad line.
    """

    batch: SparseBatch
    bad: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class RowShape:
    """What rows have to look like.

    Attributes:
      slots: features at most.
      columns: dense features.
      rows, hashed, binary_labels: as in `SparseDataOptions`.
      with_fields, with_queries: whether the format has them.
      field_count: fields are below it; None takes any.
    """

    slots: int
    columns: int = 0
    rows: int | None = None
    hashed: bool = False
    binary_labels: bool = False
    with_fields: bool = False
    with_queries: bool = False
    field_count: int | None = None

    def blank(self, count: int) -> Rows:
        """So many rows without a sample, to be filled."""
        ids = np.zeros((count, self.slots), np.int64)
        return Rows(
            labels=np.zeros(count),
            ids=ids,
            values=np.zeros(ids.shape, np.float32),
            fields=np.zeros(ids.shape, np.int32) if self.with_fields else None,
            dense=np.zeros((count, self.columns), np.float32) if self.columns else None,
            queries=np.zeros(count, np.int64) if self.with_queries else None,
        )


@dataclass(eq=False)
class Rows:
    """Arrays of a batch while they are filled, as `SparseBatch` has them."""

    labels: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    fields: np.ndarray | None = None
    dense: np.ndarray | None = None
    queries: np.ndarray | None = None

    def put(self, which: np.ndarray, other: Rows) -> None:
        """Overwrites the rows `which` with those of `other`."""
        for name in ("labels", "ids", "values", "fields", "dense", "queries"):
            if (mine := getattr(self, name)) is not None:
                mine[which] = getattr(other, name)


@dataclass(frozen=True, eq=False)
class Feature:
    """One line, read by the plain reader; `ids` are as written in the file, or hashed already."""

    label: float
    ids: list[int]
    values: list[float]
    fields: list[int] | None = None
    dense: list[float] | None = None
    query: int = 0


class BlockReader(Protocol):
    """Reads many lines at once."""

    def __call__(self, lines: Sequence[bytes]) -> tuple[Rows | None, np.ndarray]:
        """Returns the rows, and bool [lines]: which could not be read. No rows: not these."""


def read_rows(
    lines: Sequence[bytes],
    shape: RowShape,
    block: BlockReader,
    single: Callable[[bytes], Rows],
) -> Parsed:
    """Reads lines with the block reader, and those it cannot read with the plain one."""
    rows, odd = block(lines)
    if rows is None:
        rest = np.flatnonzero(~odd)
        rows = shape.blank(len(lines))
        if rest.size:
            some, more = block([lines[place] for place in rest])
            assert some is not None, "the lines that do not fit were taken out"
            rows.put(rest, some)
            odd[rest] |= more
    bad: list[tuple[int, str]] = []
    failed = np.zeros(len(lines), bool)
    for place in np.flatnonzero(odd).tolist():
        try:
            row = single(lines[place])
        except BadLineError as problem:
            bad.append((place, str(problem)))
            failed[place] = True
        else:
            rows.put(np.array([place]), row)
    labels = (rows.labels > 0) if shape.binary_labels else rows.labels
    batch = SparseBatch(
        rows.ids, rows.values, labels, np.ones(len(lines)), np.zeros(len(lines)),
        rows.fields, rows.dense, rows.queries,
    )  # fmt: skip
    return Parsed(batch.without(failed), tuple(bad))


def single_row(feature: Feature, shape: RowShape) -> Rows:
    """One line's row.

    Raises:
      BadLineError: there are too many features, or an id, a field or a number is out of range.
    """
    count = len(feature.ids)
    if count > shape.slots:
        raise BadLineError(
            f"it has {count} features and data.slots is {shape.slots}; write data.slots={count}"
        )
    row = shape.blank(1)
    if feature.fields is not None:
        for field in feature.fields:
            check_field(field, shape)
    if shape.hashed:
        fields = None if feature.fields is None else np.array(feature.fields, np.int64)
        ids = hash_integers(np.array(feature.ids, np.int64), fields, shape.rows)
        row.ids[0, :count] = ids
    else:
        for number in feature.ids:
            check_id(number, shape)
        row.ids[0, :count] = feature.ids
    row.labels[0] = feature.label
    row.values[0, :count] = feature.values
    if row.fields is not None:
        row.fields[0, :count] = feature.fields
    if row.dense is not None:
        row.dense[0] = feature.dense
    if row.queries is not None:
        row.queries[0] = feature.query
    return row


def check_id(number: int, shape: RowShape) -> None:
    """Refuses an id that no row has.

    Raises:
      BadLineError: it is `shape.rows` or more.
    """
    if shape.rows is not None and number >= shape.rows:
        raise BadLineError(
            f"id {number} is out of range, ids are 0 to {shape.rows - 1}; "
            "raise data.rows, or write data.hashed=true"
        )


def check_field(field: int, shape: RowShape) -> None:
    """Refuses a field that the model has no place for.

    Raises:
      BadLineError: it is `shape.field_count` or more.
    """
    if field >= (shape.field_count or 2**31):
        raise BadLineError(
            f"field {field} is out of range, fields are 0 to {(shape.field_count or 2**31) - 1}"
            + (f"; write data.field_count={field + 1}" if shape.field_count else "")
        )


def shown(text: bytes) -> str:
    r"""A piece of a line as a message quotes it.

    >>> shown(b"3:x\xff")
    "'3:x\\xff'"
    """
    cut = text[:SHOWN_BYTES]
    return repr(cut)[1:] + ("…" if len(text) > SHOWN_BYTES else "")


def whole(text: bytes, what: str) -> int:
    """A non-negative integer below 2⁶³.

    Raises:
      BadLineError: it is something else; `what` names it.
    """
    if not _WHOLE.fullmatch(text) or (number := int(text)) > LARGEST_ID:
        if re.fullmatch(rb"-[0-9]+", text):
            raise BadLineError(f"{what} {text[:SHOWN_BYTES].decode()} is negative")
        raise BadLineError(f"{what} must be an integer from 0 to {LARGEST_ID}, got {shown(text)}")
    return number


def number(text: bytes, what: str) -> float:
    """A number that is finite, also as float32.

    Raises:
      BadLineError: it is something else; `what` names it.
    """
    if _NUMBER.fullmatch(text) and len(text) <= 40:
        value = float(text)
        if abs(value) <= _FLOAT32_MAX:
            return value
        raise BadLineError(f"{what} {shown(text)} is too large for a 32-bit float")
    if _NOT_FINITE.fullmatch(text):
        raise BadLineError(f"{what} is {text.decode()}; leave the feature out, or give it a number")
    if not text:
        raise BadLineError(f"{what} is missing")
    raise BadLineError(f"{what} must be a number, got {shown(text)}")
