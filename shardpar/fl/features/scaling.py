"""Columns brought to one scale: by mean and deviation, or from low to high.

Revealed to all parties and the aggregator: count, mean and variance of each column, or two of its
quantiles (`shardpar.fl.stats`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardpar.errors import DataError
from shardpar.fl.stats import Ranges, moments, quantiles
from shardpar.fl.sums import Sums
from shardpar.fl.suppression import MINIMUM


@dataclass(frozen=True)
class Scaling:
    """(value - offset) / scale of each column; missing values stay missing.

    >>> Scaling((1.0,), (2.0,)).apply(np.array([[5.0]])).tolist()
    [[2.0]]
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Scaled rows, float64 [rows, columns].

        Raises:
          DataError: another number of columns.
        """
        return (checked(rows, len(self.offset)) - self.offset) / self.scale


def standard(sums: Sums, rows: np.ndarray, ranges: Ranges, *, minimum: int = MINIMUM) -> Scaling:
    """To mean 0 and variance 1; a constant column is only shifted, one without values left as is.

    Args:
      sums: over all parties.
      rows: this party's, float [rows, columns], NaN where a value is missing.
      ranges: of the columns.
      minimum: fewest rows that any number may be of.
    """
    found = moments(sums, rows, ranges, minimum=minimum)
    # Below this it cannot be told from the rounding of a constant.
    least = ranges.widths * sums.parties * 2.0**-28
    deviation = np.where(found.deviation > least, found.deviation, 1.0)
    return Scaling(tuple(np.nan_to_num(found.mean).tolist()), tuple(deviation.tolist()))


def min_max(sums: Sums, rows: np.ndarray, ranges: Ranges, *, minimum: int = MINIMUM) -> Scaling:
    """To 0 at the low end of each column and 1 at its high end.

    The ends are means of the `minimum` lowest and highest values of a party, not single rows; so
    some rows come to lie below 0 or above 1. The arguments are those of `standard`.
    """
    ends = quantiles(sums, rows, ranges, (0.0, 1.0), minimum=minimum)
    low, width = np.nan_to_num(ends[:, 0]), np.nan_to_num(ends[:, 1] - ends[:, 0])
    return Scaling(tuple(low.tolist()), tuple(np.where(width > 0, width, 1.0).tolist()))


def checked(rows: np.ndarray, columns: int) -> np.ndarray:
    """Rows as float64, if there are so many columns.

    Raises:
      DataError: there are not.
    """
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise DataError(f"rows of shape {rows.shape} for a transform of {columns} columns")
    return rows
