"""Into which bins a party sorts each of its columns, and which splits that makes.

Bins are quantiles of the party's own numbers; edges never leave it. A split sends the bins up to
one of them left, and missing numbers either way; a column without missing numbers in training has
one direction only, to the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardpar.errors import DataError


@dataclass(frozen=True)
class Bins:
    """A party's bins.

    Attributes:
      edges: of each column, rising; a number is in the first bin whose edge is not below it, and in
        the last where there is none.
      missing: of each column, whether training had missing numbers.

    >>> bins = Bins.of(np.array([[1.0], [2.0], [np.nan], [4.0]]), most=8)
    >>> bins.edges, bins.missing
    (((1.5, 3.0),), (True,))
    >>> bins.sorted(np.array([[1.5], [9.0], [np.nan]])).tolist()
    [[0], [2], [3]]
    """

    edges: tuple[tuple[float, ...], ...]
    missing: tuple[bool, ...]

    @classmethod
    def of(cls, columns: np.ndarray, *, most: int) -> Bins:
        """Bins of columns, float [rows, columns], NaN where a number is missing.

        Args:
          columns: to sort.
          most: bins of a column; fewer where it has fewer different numbers.

        Raises:
          DataError: a number is infinite.
        """
        columns = _checked(columns)
        return cls(
            tuple(_edges(column[~np.isnan(column)], most) for column in columns.T),
            tuple(np.isnan(columns).any(axis=0).tolist()),
        )

    @cached_property
    def width(self) -> int:
        """Bins of the column that has most, and one for missing numbers."""
        return max((len(edges) + 2 for edges in self.edges), default=1)

    def sorted(self, columns: np.ndarray) -> np.ndarray:
        """The bin of each number, int64 [rows, columns]; the last + 1 of the column if missing.

        Raises:
          DataError: a number is infinite, or there are other columns.
        """
        columns = _checked(columns)
        if columns.shape[1] != len(self.edges):
            raise DataError(f"{columns.shape[1]} columns for bins of {len(self.edges)}")
        found = np.empty(columns.shape, np.int64)
        for at, edges in enumerate(self.edges):
            numbers = columns[:, at]
            placed = np.searchsorted(np.array(edges), numbers, side="left")
            found[:, at] = np.where(np.isnan(numbers), len(edges) + 1, placed)
        return found

    def counts(self, binned: np.ndarray) -> np.ndarray:
        """Rows in each bin, int64 [columns, width]."""
        return histogram_of(binned, self.width, np.ones(len(binned), np.int64))

    @cached_property
    def splits(self) -> Splits:
        """Every split that these bins allow."""
        rows = []
        for column, (edges, missing) in enumerate(zip(self.edges, self.missing, strict=True)):
            for edge in range(len(edges)):
                rows.append((column, edge, False))
                if missing:
                    rows.append((column, edge, True))
            if missing:
                # All numbers left, missing ones right.
                rows.append((column, len(edges), False))
        table = np.array(rows, np.int64).reshape(-1, 3)
        return Splits(table[:, 0], table[:, 1], table[:, 2].astype(bool))


@dataclass(frozen=True, eq=False)
class Splits:
    """Splits in their order, the same at every party and oracle: by column, edge, direction.

    Attributes:
      column: of each split.
      bin: the last that goes left.
      missing_left: whether missing numbers do.
    """

    column: np.ndarray
    bin: np.ndarray
    missing_left: np.ndarray

    def __len__(self) -> int:
        return len(self.column)

    def left_of(self, bins: Bins, histogram: np.ndarray) -> np.ndarray:
        """What each split has on its left.

        Args:
          bins: whose splits these are.
          histogram: sums of any kind, [columns, bins.width].

        Returns:
          [splits], of the histogram's dtype.
        """
        if not len(self):
            return np.zeros(0, histogram.dtype)
        sums = np.cumsum(histogram, axis=1)
        gaps = np.array([len(edges) + 1 for edges in bins.edges])[self.column]
        return sums[self.column, self.bin] + self.missing_left * histogram[self.column, gaps]

    def goes_left(self, bins: Bins, at: int, binned: np.ndarray) -> np.ndarray:
        """Whether each row goes left at a split.

        Args:
          bins: whose splits these are.
          at: which split.
          binned: as `Bins.sorted` gave, [rows, columns].
        """
        places = binned[:, self.column[at]]
        missing = places == len(bins.edges[self.column[at]]) + 1
        return np.where(missing, self.missing_left[at], places <= self.bin[at])


def histogram_of(binned: np.ndarray, width: int, numbers: np.ndarray) -> np.ndarray:
    """Sums of integers by column and bin, int64 [columns, width].

    Args:
      binned: of some rows, [rows, columns].
      width: bins of a column.
      numbers: of those rows, int64 [rows]; their sum is below 2^53.
    """
    columns = binned.shape[1]
    flat = (binned + np.arange(columns) * width).ravel()
    weights = np.repeat(numbers.astype(np.float64), columns)
    sums = np.bincount(flat, weights, minlength=columns * width)
    return sums.astype(np.int64).reshape(columns, width)


def _edges(numbers: np.ndarray, most: int) -> tuple[float, ...]:
    different = np.unique(numbers)
    if len(different) <= most:
        between = (different[:-1] + different[1:]) / 2
        # Of two neighbouring floats the middle may be the upper one.
        return tuple(np.where(between < different[1:], between, different[:-1]).tolist())
    shares = np.linspace(0, 1, most + 1)[1:-1]
    edges = np.unique(np.quantile(numbers, shares, method="lower"))
    return tuple(edges[edges < different[-1]].tolist())


def _checked(columns: np.ndarray) -> np.ndarray:
    columns = np.asarray(columns, np.float64)
    if columns.ndim != 2:
        raise DataError(f"columns are shaped [rows, columns], these {columns.shape}")
    if np.isinf(columns).any():
        row, column = np.argwhere(np.isinf(columns))[0]
        raise DataError(f"column {column} is infinite in row {row}: leave it out, or cut it")
    return columns
