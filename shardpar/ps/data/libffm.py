"""Reads libffm: `label field:id:value …`, fields and ids from 0.

Format: Y. Juan, Y. Zhuang, W. Chin, C. Lin: Field-aware Factorization Machines for CTR
Prediction (RecSys 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardpar.ps.data.feature_lists import (
    Lists,
    cut_labels,
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


@dataclass(frozen=True)
class Libffm:
    """The format, and the rows that are made of it.

    >>> rows = Libffm(RowShape(slots=2)).parse([b"1 0:7:1 1:9:0.5", b"0 1:3:1"])
    >>> rows.batch.ids.tolist(), rows.batch.fields.tolist()
    ([[7, 9], [3, 0]], [[0, 1], [1, 0]])
    """

    shape: RowShape
    name = "libffm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", replace(self.shape, with_fields=True))

    def parse(self, lines: Sequence[bytes]) -> Parsed:
        """Reads lines; those that cannot be read are in `bad`."""
        return read_rows(lines, self.shape, self._block, self._single)

    def _block(self, lines: Sequence[bytes]) -> tuple[Rows | None, np.ndarray]:
        text, tokens = tokenized(lines)
        labels, parts, odd = cut_labels(tokens, group=3)
        if not parts:
            return None, odd
        counts = (tokens.counts - 1) // 3
        lists = Lists(
            read_labels(text, labels, odd),
            counts,
            ids=read_whole(text, parts[1], odd, counts),
            values=read_values(text, parts[2], odd, counts),
            fields=read_whole(text, parts[0], odd, counts),
        )
        return to_rows(lists, self.shape, odd), odd

    def _single(self, line: bytes) -> Rows:
        label, *features = line.split() or [b""]
        row = Feature(number(label, "the label"), [], [], [])
        for feature in features:
            parts = feature.split(b":")
            if len(parts) != 3:
                raise BadLineError(f"a feature must be field:id:value, got {shown(feature)}")
            row.fields.append(whole(parts[0], "field"))
            row.ids.append(whole(parts[1], "id"))
            row.values.append(number(parts[2], f"the value of id {row.ids[-1]}"))
        return single_row(row, self.shape)
