"""Values in bins: of equal width, or with equally many rows, as scorecards and trees take them.

Revealed to all parties and the aggregator for bins of equally many rows: quantiles of each column
(`shardpar.fl.stats`); for bins of equal width nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardpar.errors import SpecError
from shardpar.fl.features.scaling import checked
from shardpar.fl.stats import Ranges, quantiles, resolution
from shardpar.fl.sums import Sums
from shardpar.fl.suppression import MINIMUM


@dataclass(frozen=True)
class Binning:
    """Bins between edges; the last of each column is for missing values.

    Attributes:
      edges: between the bins of each column, rising; a value at an edge is in the bin above.

    >>> Binning(((0.0, 5.0),)).apply(np.array([[-9.0], [0.0], [7.0], [np.nan]])).ravel().tolist()
    [0, 1, 2, 3]
    """

    edges: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Checks that edges rise."""
        for column, inner in enumerate(self.edges):
            if not np.isfinite(inner).all() or not (np.diff(inner) > 0).all():
                raise SpecError(f"the edges of column {column} do not rise")

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many bins each column has, the one for missing values too."""
        return tuple(len(inner) + 2 for inner in self.edges)

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """The bin of each value, int64 [rows, columns].

        Raises:
          DataError: another number of columns.
        """
        rows = checked(rows, len(self.edges))
        bins = np.empty(rows.shape, np.int64)
        for column, inner in enumerate(self.edges):
            values = rows[:, column]
            found = np.searchsorted(inner, values, side="right")
            bins[:, column] = np.where(np.isnan(values), len(inner) + 1, found)
        return bins


def equal_width(ranges: Ranges, bins: int) -> Binning:
    """So many bins of equal width over each column's range.

    >>> equal_width(Ranges.of([(0, 8)]), 4).edges
    ((2.0, 4.0, 6.0),)
    """
    _check(bins)
    pairs = zip(ranges.low, ranges.high, strict=True)
    return Binning(tuple(tuple(np.linspace(a, b, bins + 1)[1:-1].tolist()) for a, b in pairs))


def equal_frequency(
    sums: Sums, rows: np.ndarray, ranges: Ranges, bins: int, *, minimum: int = MINIMUM
) -> Binning:
    """So many bins with about equally many rows; fewer where values are repeated.

    Args:
      sums: over all parties.
      rows: this party's, float [rows, columns], NaN where a value is missing.
      ranges: of the columns.
      bins: how many, without the one for missing values.
      minimum: fewest rows that any number may be of.
    """
    _check(bins)
    levels = np.arange(1, bins) / bins
    step = resolution(ranges)
    if bins == 1:
        return Binning(((),) * len(step))
    found = quantiles(sums, rows, ranges, levels.tolist(), minimum=minimum)
    # Just below a value that many rows have, so that all of them are in the bin above.
    found -= step[:, None] / 2
    edges = []
    for column, near in zip(found, step, strict=True):
        inner = np.unique(column[~np.isnan(column)])
        edges.append(tuple(inner[np.diff(inner, prepend=-np.inf) > near].tolist()))
    return Binning(tuple(edges))


def _check(bins: int) -> None:
    if bins < 1:
        raise SpecError(f"{bins} bins; use 1 or more")
