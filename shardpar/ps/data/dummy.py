"""Reads dummy: `label id id …`, ids from 0, every value 1. Format: Angel's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardpar.ps.data.feature_lists import (
    Lists,
    cut_labels,
    read_labels,
    read_whole,
    to_rows,
    tokenized,
)
from shardpar.ps.data.rows import (
    Feature,
    Parsed,
    Rows,
    RowShape,
    number,
    read_rows,
    single_row,
    whole,
)


@dataclass(frozen=True)
class Dummy:
    """The format, and the rows that are made of it.

    >>> rows = Dummy(RowShape(slots=2)).parse([b"1 7 9", b"0 3"])
    >>> rows.batch.ids.tolist(), rows.batch.values.tolist()
    ([[7, 9], [3, 0]], [[1.0, 1.0], [1.0, 0.0]])
    """

    shape: RowShape
    name = "dummy"

    def parse(self, lines: Sequence[bytes]) -> Parsed:
        """Reads lines; those that cannot be read are in `bad`."""
        return read_rows(lines, self.shape, self._block, self._single)

    def _block(self, lines: Sequence[bytes]) -> tuple[Rows | None, np.ndarray]:
        text, tokens = tokenized(lines)
        labels, parts, odd = cut_labels(tokens, group=1)
        if not parts:
            return None, odd
        counts = tokens.counts - 1
        lists = Lists(
            read_labels(text, labels, odd),
            counts,
            ids=read_whole(text, parts[0], odd, counts),
        )
        return to_rows(lists, self.shape, odd), odd

    def _single(self, line: bytes) -> Rows:
        label, *features = line.split() or [b""]
        ids = [whole(feature, "id") for feature in features]
        return single_row(Feature(number(label, "the label"), ids, [1.0] * len(ids)), self.shape)
