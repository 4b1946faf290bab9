"""Reads libsvm (svmlight): `label [qid:n] index:value … [# comment]`, indices from 1.

Format: C. Chang, C. Lin: LIBSVM, a library for support vector machines (ACM TIST 2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardpar.ps.data.feature_lists import (
    Lists,
    cut_labels,
    mark_lines,
    read_labels,
    read_values,
    read_whole,
    to_rows,
    tokenized,
)
from shardpar.ps.data.rows import (
    BadLineError,
    Feature,
    Parsed,
    Rows,
    RowShape,
    number,
    read_rows,
    shown,
    single_row,
    whole,
)
from shardpar.ps.data.tokens import Text, Tokens

_QID = int.from_bytes(b"qid", "little")


@dataclass(frozen=True)
class Libsvm:
    """The format, and the rows that are made of it.

    Attributes:
      shape: of the rows.
      zero_based: whether indices count from 0 in the file.

    >>> rows = Libsvm(RowShape(slots=2)).parse([b"1 7:1 9:0.5", b"-1 qid:4 3:2 # seen"])
    >>> rows.batch.ids.tolist(), rows.batch.queries.tolist()
    ([[6, 8], [2, 0]], [0, 4])
    """

    shape: RowShape
    zero_based: bool = False
    name = "libsvm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", replace(self.shape, with_queries=True))

    def parse(self, lines: Sequence[bytes]) -> Parsed:
        """Reads lines; those that cannot be read are in `bad`."""
        return read_rows(lines, self.shape, self._block, self._single)

    def _block(self, lines: Sequence[bytes]) -> tuple[Rows | None, np.ndarray]:
        text, tokens = tokenized(lines)
        labels, parts, odd = cut_labels(tokens, group=2)
        if not parts:
            return None, odd
        counts = (tokens.counts - 1) // 2
        queries, parts, counts = _cut_queries(text, parts, odd, counts)
        ids = read_whole(text, parts[0], odd, counts)
        if not self.zero_based:
            ids -= 1
            mark_lines(odd, ids < 0, counts)
        lists = Lists(
            read_labels(text, labels, odd),
            counts,
            ids,
            read_values(text, parts[1], odd, counts),
            queries=queries,
        )
        return to_rows(lists, self.shape, odd), odd

    def _single(self, line: bytes) -> Rows:
        label, *features = line.partition(b"#")[0].split() or [b""]
        value, query = number(label, "the label"), 0
        if features and features[0].startswith(b"qid:"):
            query = whole(features.pop(0)[4:], "qid")
        row = Feature(value, [], [], query=query)
        for feature in features:
            index, colon, weight = feature.partition(b":")
            if not colon:
                raise BadLineError(f"a feature must be index:value, got {shown(feature)}")
            place = whole(index, "index") - (not self.zero_based)
            if place < 0:
                raise BadLineError(
                    "index 0, but libsvm counts from 1; if this file counts from 0, "
                    "write data.zero_based=true"
                )
            row.ids.append(place)
            row.values.append(number(weight, f"the value of index {index.decode()}"))
        return single_row(row, self.shape)


def _cut_queries(
    text: Text, parts: list[Tokens], odd: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, list[Tokens], np.ndarray]:
    """Takes a `qid:n` that follows the label out of the features."""
    queries = np.zeros(counts.size, np.int64)
    lines = np.flatnonzero(counts > 0)
    first = (np.cumsum(counts) - counts)[lines]
    keys = parts[0].take(first)
    named = ((text.words[keys.starts] & np.uint64(0xFFFFFF)) == _QID) & (
        keys.ends - keys.starts == 3
    )
    if not named.any():
        return queries, parts, counts
    lines, first = lines[named], first[named]
    values = parts[1].take(first)
    queries[lines] = read_whole(
        text, values, marks := np.zeros(lines.size, bool), np.ones_like(lines)
    )
    odd[lines[marks]] = True
    kept = np.ones(parts[0].starts.size, bool)
    kept[first] = False
    counts = counts.copy()
    counts[lines] -= 1
    return queries, [part.take(kept) for part in parts], counts
