"""What a party leaves out of a table before anyone sees it, so that few rows are never shown.

Each party drops its own cells that stand for fewer rows than the minimum, and, if those are fewer
rows than the minimum together, its smallest other cell too: else a total known from elsewhere,
less the cells shown, would be the small one (complementary suppression; Willenborg and de Waal,
Elements of Statistical Disclosure Control, 2001). So whatever a total is made of, each party's part
in it, and in what is missing from it, is of no row or of at least the minimum. The price: what is
rare at every party is lost even where it would not be rare in all.

Values that must be ordered are averaged over blocks of neighbours first (microaggregation; Domingo-
Ferrer and Mateo-Sanz, TKDE'02). Nothing here hides one row that dominates a sum: keep ranges tight.
"""

from __future__ import annotations

import numpy as np

MINIMUM = 10
"""Rows behind every number shown, unless another minimum is agreed on."""


def kept_cells(counts: np.ndarray, minimum: int) -> np.ndarray:
    """Which cells of one party's table may be added to the total: bool, of the same shape.

    Args:
      counts: rows in each cell; a row is in one cell.
      minimum: fewest rows; 1 keeps everything.

    >>> kept_cells(np.array([20, 3, 12, 0]), 5).tolist()
    [True, False, False, True]
    >>> kept_cells(np.array([20, 4, 3, 0]), 5).tolist()
    [True, False, False, True]
    """
    counts = np.asarray(counts)
    kept = (counts == 0) | (counts >= minimum)
    missing = int(counts[~kept].sum())
    if 0 < missing < minimum:
        large = np.where(kept & (counts > 0), counts, np.iinfo(np.int64).max)
        if (kept & (counts > 0)).any():
            kept.ravel()[int(large.argmin())] = False
    return kept


def microaggregated(values: np.ndarray, minimum: int) -> np.ndarray:
    """Values in order, each replaced by the mean of its block of `minimum` or more neighbours.

    Fewer values than the minimum are left out altogether.

    Args:
      values: of one party and column, finite, shaped [rows].
      minimum: 1 leaves them as they are.

    >>> microaggregated(np.array([9.0, 1.0, 2.0, 7.0, 8.0]), 2).tolist()
    [1.5, 1.5, 8.0, 8.0, 8.0]
    """
    ordered = np.sort(np.asarray(values, np.float64))
    blocks = ordered.size // minimum
    if not blocks:
        return np.empty(0)
    sizes = np.full(blocks, ordered.size // blocks)
    sizes[blocks - ordered.size % blocks :] += 1 if ordered.size % blocks else 0
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    means = np.add.reduceat(ordered, starts) / sizes
    # A mean of equal values may round away from them; the ends of its block keep it in order.
    means = np.clip(means, ordered[starts], ordered[starts + sizes - 1])
    return np.repeat(means, sizes)
