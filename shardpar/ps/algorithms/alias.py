"""Draws from fixed discrete distributions in constant time: alias tables, one or many at once.

Walker, "An efficient method for generating discrete random variables with general
distributions", 1977; the tables of all rows of a sparse matrix are made together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardpar.errors import DataError


@dataclass(frozen=True, eq=False)
class AliasTables:
    """One table for each row, entries of a row side by side.

    Attributes:
      starts: int64[rows + 1], where the entries of each row begin.
      keep: float64[entries], the chance that a drawn entry stands for itself.
      other: int64[entries], the entry that it stands for otherwise.
    """

    starts: np.ndarray
    keep: np.ndarray
    other: np.ndarray

    def draw(self, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """An entry of each of these rows, int64[n]; the rows must not be empty."""
        start = self.starts[rows]
        spot = random.random(len(rows)) * (self.starts[rows + 1] - start)
        whole = spot.astype(np.int64)
        entry = start + whole
        return np.where(spot - whole < self.keep[entry], entry, self.other[entry])


def alias_tables(starts: np.ndarray, weights: np.ndarray) -> AliasTables:
    """Tables in which each entry of a row is drawn as often as its weight says.

    Args:
      starts: int[rows + 1], as the `indptr` of a CSR matrix.
      weights: float[entries], finite and not negative, with a positive sum in each row.

    Raises:
      DataError: a weight is no weight, or a row has none that is positive.

    >>> table = alias_tables(np.array([0, 2]), np.array([1.0, 3.0]))
    >>> drawn = table.draw(np.zeros(10_000, int), np.random.default_rng(0))
    >>> bool(abs(drawn.mean() - 0.75) < 0.02)
    True
    """
    starts, weights = np.asarray(starts, np.int64), np.asarray(weights, np.float64)
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if bad.size:
        raise DataError(
            f"the weight of entry {bad[0]} is {weights[bad[0]]}; weights are finite, not negative"
        )
    sizes = np.diff(starts)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    totals = np.bincount(rows, weights, minlength=len(sizes))
    empty = np.flatnonzero((totals <= 0) & (sizes > 0))
    if empty.size:
        raise DataError(
            f"all {sizes[empty[0]]} weights of row {empty[0]} are 0, so nothing can be drawn from "
            "it; leave such entries out"
        )
    scaled = weights * (sizes / np.where(totals > 0, totals, 1))[rows]
    return _paired(starts, rows, scaled)


def _paired(starts: np.ndarray, rows: np.ndarray, scaled: np.ndarray) -> AliasTables:
    """Fills what small entries lack from large ones, in all rows at once.

    What the small entries of a row lack is laid end to end on a line, and what its large ones
    have too much on another of the same length. A large entry fills the small ones whose lack
    begins in its stretch; where that is too much, the next large one fills the rest of it.
    """
    # By rounding, equal weights may all be a little below 1, with none above to give.
    giver = np.zeros(len(starts) - 1, bool)
    giver[rows[scaled >= 1]] = True
    small = (scaled < 1) & giver[rows]
    keep = np.where(small, scaled, 1.0)
    other = np.arange(len(scaled))
    lacking, giving = np.flatnonzero(small), np.flatnonzero(scaled >= 1)
    if not lacking.size or not giving.size:
        return AliasTables(starts, np.ones_like(keep), other)
    # Lines of different rows follow each other: both of a row are shorter than the row.
    lack_end = _ends(starts, rows[lacking], 1 - scaled[lacking])
    give_end = _ends(starts, rows[giving], scaled[giving] - 1)
    lack_start = lack_end - (1 - scaled[lacking])
    last = np.searchsorted(rows[giving], rows[lacking], side="right") - 1
    at = np.minimum(np.searchsorted(give_end, lack_start, side="right"), last)
    other[lacking] = giving[at]
    given = starts[rows[giving]].astype(np.float64)
    np.maximum.at(given, at, lack_end)
    over = np.maximum.accumulate(given) - give_end
    passes = (over > 0) & np.append(rows[giving][1:] == rows[giving][:-1], False)
    keep[giving[passes]] = 1 - over[passes]
    other[giving[passes]] = giving[np.flatnonzero(passes) + 1]
    return AliasTables(starts, keep, other)


def _ends(starts: np.ndarray, rows: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """Where each amount ends, if those of a row are laid end to end from the row's start on."""
    total = np.cumsum(amounts)
    first = np.flatnonzero(np.append(True, rows[1:] != rows[:-1]))
    before = np.repeat(total[first] - amounts[first], np.diff(np.append(first, len(rows))))
    return starts[rows] + (total - before)
