"""Which columns to keep, decided on statistics that all parties already have.

Revealed to nobody: nothing beyond what the statistics are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardpar.errors import DataError
from shardpar.fl.features.woe import WeightOfEvidence
from shardpar.fl.stats import Moments


@dataclass(frozen=True)
class Selection:
    """The numbers of the columns that are kept, rising.

    >>> Selection((0, 2)).apply(np.array([[1.0, 2.0, 3.0]])).tolist()
    [[1.0, 3.0]]
    """

    columns: tuple[int, ...]

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Those columns, [rows, kept].

        Raises:
          DataError: there are fewer columns.
        """
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] <= max(self.columns, default=-1):
            raise DataError(f"rows of shape {rows.shape} to select columns {self.columns} of")
        return rows[:, list(self.columns)]


def by_variance(found: Moments, least: float) -> Selection:
    """Columns whose variance is above `least`."""
    return _where(np.nan_to_num(found.variance) > least)


def by_information(found: WeightOfEvidence, least: float) -> Selection:
    """Columns whose information value is at least so large; 0.02 is commonly the least of use."""
    return _where(np.array(found.information) >= least)


def by_correlation(matrix: np.ndarray, merits: Sequence[float], most: float) -> Selection:
    """Columns in order of their merit, without those too much like one that is kept already.

    Args:
      matrix: of correlations, [columns, columns]; NaN for constant columns, which are not kept.
      merits: of each column, such as its information value; of equal ones the first comes first.
      most: the largest magnitude of a correlation between columns that are kept.

    >>> by_correlation(np.array([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]]), [1, 2, 0], 0.8).columns
    (1, 2)
    """
    likeness = np.abs(matrix)
    kept: list[int] = []
    for column in np.argsort(-np.asarray(merits), kind="stable").tolist():
        if np.isnan(matrix[column, column]):
            continue
        if not (likeness[column, kept] > most).any():
            kept.append(column)
    return Selection(tuple(sorted(kept)))


def _where(keep: np.ndarray) -> Selection:
    return Selection(tuple(np.flatnonzero(keep).tolist()))
