"""Decides how lists of features of any length become arrays of one width.

What libsvm, dummy and libffm share: a label, then features, separated by blanks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardpar.ps.data.hashing import hash_integers
from shardpar.ps.data.rows import Rows, RowShape
from shardpar.ps.data.tokens import (
    COLON,
    SPACE,
    Text,
    Tokens,
    blank_or,
    parse_digits,
    parse_numbers,
    split,
)

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Lists:
    """Features of many lines back to back.

    Attributes:
      labels: float64 [lines].
      counts: int64 [lines]: features of each.
      ids: int64 [features], as in the file but counted from 0.
      values: float64 [features]; None if all are 1.
      fields: int64 [features], or None.
      queries: int64 [lines], or None.
    """

    labels: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    values: np.ndarray | None = None
    fields: np.ndarray | None = None
    queries: np.ndarray | None = None


def tokenized(lines: Sequence[bytes]) -> tuple[Text, Tokens]:
    """Cuts lines at blanks and colons."""
    text = Text.of(lines)
    return text, split(text, blank_or(COLON, text.data), merge=True)


def cut_labels(tokens: Tokens, group: int) -> tuple[Tokens, list[Tokens], np.ndarray]:
    """Parts each line into its label and its features of `group` tokens, joined by colons.

    Returns:
      The labels; the tokens of each place in a feature; and bool [lines]: which lines are not
      made like that. If one has another number of tokens, the lists are empty.
    """
    counts = tokens.counts
    odd = (counts < 1) | ((counts - 1) % group != 0)
    odd[tokens.strange] = True
    if odd.any():
        return tokens.take(slice(0)), [], odd
    width = int(counts[0])
    if (counts == width).all():
        # All lines are alike, as click logs are: a view does.
        def column(array: np.ndarray, place: int) -> np.ndarray:
            return array.reshape(-1, width)[:, 1 + place :: group].ravel()

        labels = tokens.take(slice(0, None, width))
        parts = [
            Tokens(
                column(tokens.starts, place), column(tokens.ends, place),
                column(tokens.closers, place), column(tokens.dots, place),
                counts, tokens.strange,
            )
            for place in range(group)
        ]  # fmt: skip
    else:
        first = np.cumsum(counts) - counts
        labels = tokens.take(first)
        others = np.ones(tokens.starts.size, bool)
        others[first] = False
        places = np.flatnonzero(others)
        parts = [tokens.take(places[place::group]) for place in range(group)]
    joined = np.ones(parts[0].starts.size, bool)
    for place, part in enumerate(parts):
        joined &= (part.closers == COLON) if place < group - 1 else (part.closers <= SPACE)
    mark_lines(odd, ~joined, (counts - 1) // group)
    odd |= labels.closers == COLON
    return labels, parts, odd


def mark_lines(odd: np.ndarray, features: np.ndarray, counts: np.ndarray) -> None:
    """Marks the lines of the features that are marked."""
    if features.any():
        odd[np.searchsorted(np.cumsum(counts), np.flatnonzero(features), side="right")] = True


def read_labels(text: Text, labels: Tokens, odd: np.ndarray) -> np.ndarray:
    """The labels; marks lines whose label is no finite number."""
    values, right = parse_numbers(text, labels)
    odd |= ~(right & (np.abs(values) <= _FLOAT32_MAX))
    return values


def read_whole(text: Text, part: Tokens, odd: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ids or fields; marks lines where one is no short integer."""
    numbers, right = parse_digits(text, part.starts, part.ends)
    mark_lines(odd, ~right, counts)
    return numbers


def read_values(text: Text, part: Tokens, odd: np.ndarray, counts: np.ndarray) -> np.ndarray | None:
    """Values, None if all are 1; marks lines where one is no finite number."""
    ones = (text.data[part.starts] == ord("1")) & (part.ends - part.starts == 1)
    if ones.all():
        return None
    values, right = parse_numbers(text, part)
    mark_lines(odd, ~(right & (np.abs(values) <= _FLOAT32_MAX)), counts)
    return values


def to_rows(lists: Lists, shape: RowShape, odd: np.ndarray) -> Rows:
    """Lays lists out as rows of `shape.slots`; marks lines that do not fit."""
    odd |= lists.counts > shape.slots
    ids = lists.ids
    if lists.fields is not None:
        mark_lines(odd, lists.fields >= (shape.field_count or 2**31), lists.counts)
    if shape.hashed:
        ids = hash_integers(ids, lists.fields, shape.rows)
    else:
        beyond = ids < 0 if shape.rows is None else (ids < 0) | (ids >= shape.rows)
        mark_lines(odd, beyond, lists.counts)
    width, lines = int(lists.counts[0]), lists.counts.size
    rows = Rows(lists.labels, ids, ids)
    if width <= shape.slots and (lists.counts == width).all():
        extra = ((0, 0), (0, shape.slots - width))

        def lay(array: np.ndarray, dtype: type) -> np.ndarray:
            grid = array.reshape(lines, width).astype(dtype, copy=False)
            return np.pad(grid, extra) if extra[1][1] else grid
    else:
        slot = np.arange(ids.size) - np.repeat(np.cumsum(lists.counts) - lists.counts, lists.counts)
        place = np.repeat(np.arange(lines) * shape.slots, lists.counts) + slot
        kept = slot < shape.slots
        if not kept.all():
            place = place[kept]

        def lay(array: np.ndarray, dtype: type) -> np.ndarray:
            grid = np.zeros(lines * shape.slots, dtype)
            grid[place] = array if place.size == array.size else array[kept]
            return grid.reshape(lines, shape.slots)

    with np.errstate(over="ignore", invalid="ignore"):
        rows.ids = lay(ids, np.int64)
        values = np.ones(ids.size, np.float32) if lists.values is None else lists.values
        rows.values = lay(values, np.float32)
        if shape.with_fields and lists.fields is not None:
            rows.fields = lay(lists.fields, np.int32)
    if shape.with_queries:
        rows.queries = np.zeros(lines, np.int64) if lists.queries is None else lists.queries
    return rows
