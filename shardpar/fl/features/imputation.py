"""Missing values replaced by the mean, the median or the commonest value of their column.

Revealed to all parties and the aggregator: those, and for the commonest value how often each
candidate occurs (`shardpar.fl.stats`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from shardpar.errors import DataError, SpecError
from shardpar.fl.features.scaling import checked
from shardpar.fl.stats import Ranges, moments, quantiles, table
from shardpar.fl.sums import Sums
from shardpar.fl.suppression import MINIMUM

_MOST_CANDIDATES = 1 << 16


@dataclass(frozen=True)
class Imputation:
    """What stands in for NaN in each column.

    >>> Imputation((7.0,)).apply(np.array([[np.nan], [1.0]])).tolist()
    [[7.0], [1.0]]
    """

    values: tuple[float, ...]

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Rows without missing values, float64 [rows, columns].

        Raises:
          DataError: another number of columns.
        """
        rows = checked(rows, len(self.values))
        return np.where(np.isnan(rows), self.values, rows)


def imputation(
    sums: Sums,
    rows: np.ndarray,
    ranges: Ranges,
    how: Literal["mean", "median", "mode"] = "mean",
    *,
    minimum: int = MINIMUM,
) -> Imputation:
    """Fits over all parties.

    Args:
      sums: over all parties.
      rows: this party's, float [rows, columns], NaN where a value is missing.
      ranges: of the columns.
      how: the mean; the median; or the commonest value of columns of whole numbers, the smallest
        of several.
      minimum: fewest rows that any number may be of.

    Raises:
      DataError: a column has too few values anywhere, or none that is a whole number.
    """
    if how == "mean":
        values = moments(sums, rows, ranges, minimum=minimum).mean
    elif how == "median":
        values = quantiles(sums, rows, ranges, (0.5,), minimum=minimum)[:, 0]
    elif how == "mode":
        values = _modes(sums, rows, ranges, minimum)
    else:
        raise SpecError(f"how={how!r}; use mean, median or mode")
    if np.isnan(values).any():
        raise DataError(
            f"column {int(np.isnan(values).argmax())} has fewer than {minimum} values at every "
            "party; drop it, or lower the minimum"
        )
    return Imputation(tuple(values.tolist()))


def _modes(sums: Sums, rows: np.ndarray, ranges: Ranges, minimum: int) -> np.ndarray:
    rows, found = ranges.checked(rows), []
    for column, low, high in zip(rows.T, ranges.low, ranges.high, strict=True):
        first, size = int(np.ceil(low)), int(np.floor(high)) - int(np.ceil(low)) + 1
        if not 0 < size <= _MOST_CANDIDATES:
            raise SpecError(
                f"{size} whole numbers from {low:g} to {high:g}: the commonest is for 1 to "
                f"{_MOST_CANDIDATES} candidates; use the median"
            )
        there = column[~np.isnan(column)]
        if (there != np.rint(there)).any():
            raise DataError("the commonest value is for columns of whole numbers; use the median")
        counts = table(sums, there.astype(np.int64) - first, size, minimum=minimum).counts
        found.append(first + int(counts.argmax()) if counts.any() else np.nan)
    return np.array(found, np.float64)
