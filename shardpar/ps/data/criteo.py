"""Reads Criteo's click logs: tab-separated, a label, 13 integers and 26 categories, no header.

Any cell but the label may be empty. Format: Criteo Display Advertising Challenge, 2014.
"""

from __future__ import annotations

from typing import Literal

from shardpar.ps.data.delimited import Columns, Delimited

INTEGERS, CATEGORIES = 13, 26

_NAMES = (
    "label",
    *(f"I{place}" for place in range(1, INTEGERS + 1)),
    *(f"C{place}" for place in range(1, CATEGORIES + 1)),
)


def criteo(
    rows: int | None = None,
    integers: Literal["log", "raw", "bucket"] = "log",
    binary_labels: bool = False,
) -> Delimited:
    r"""The format, and the rows that are made of it.

    The arguments are those of `SparseDataOptions`.

    >>> line = b"1" + b"\t3" * 13 + b"\t68fd1e64" * 26
    >>> rows = criteo(rows=2**20, integers="bucket").parse([line])
    >>> rows.batch.ids.shape, rows.batch.dense
    ((1, 39), None)
    """
    columns = Columns(
        _NAMES,
        label=0,
        numeric=tuple(range(1, INTEGERS + 1)),
        categorical=tuple(range(INTEGERS + 1, len(_NAMES))),
        integers=integers,
        missing=0.0,
    )
    shape = columns.shape(rows, binary_labels)
    return Delimited("criteo", columns, shape, delimiter=b"\t", quoted=False)
