"""Which sequences share a row of a fixed number of tokens: first-fit decreasing bin packing.

Never more than 11/9 of the fewest rows, and 6/9 of a row besides (Dósa, 2007).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardpar.errors import DataError


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Puts every size into the first bin that has room, the largest first.

    Args:
      sizes: of the items, from 1 to `capacity`; equal ones keep their order.
      capacity: of each bin.

    Returns:
      The numbers of each bin's items, ascending.

    Raises:
      DataError: an item fits into no bin.

    >>> first_fit_decreasing([3, 5, 2, 4], capacity=7)
    ((1, 2), (0, 3))
    """
    given = np.asarray(sizes, np.int64)
    wrong = np.flatnonzero((given < 1) | (given > capacity))
    if wrong.size:
        raise DataError(
            f"sequence {wrong[0]} has {given[wrong[0]]} tokens, and a row holds 1 to {capacity}; "
            f"cut the sequence, or let rows hold {int(given.max())}"
        )
    free = np.full(given.size, capacity, np.int64)
    bins: list[list[int]] = []
    for item in np.argsort(-given, kind="stable").tolist():
        # Bins that are not open yet have room for everything, so the search always ends.
        at = int(np.argmax(free[: len(bins) + 1] >= given[item]))
        if at == len(bins):
            bins.append([])
        bins[at].append(item)
        free[at] -= given[item]
    return tuple(tuple(sorted(items)) for items in bins)
