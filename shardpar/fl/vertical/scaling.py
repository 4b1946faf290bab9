"""Real columns as integers: each party scales its own by their mean and deviation.

What is farther than 8 deviations from the mean is cut. The party keeps its means and deviations
beside its half of the model; nobody else sees them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardpar.errors import DataError

MOST = 8.0
"""Deviations from the mean that are told apart."""


@dataclass(frozen=True)
class Scaling:
    """How a party's columns become integers.

    Attributes:
      mean: of each column.
      deviation: of each column; 1 where it is constant.
      fraction_bits: of the integers.
      intercept: whether a column of ones is put first.

    >>> scaling = Scaling.of(np.array([[0.0], [2.0]]), fraction_bits=8, intercept=True)
    >>> scaling.integers(np.array([[3.0]])).tolist()
    [[256, 512]]
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    fraction_bits: int
    intercept: bool

    @classmethod
    def of(cls, columns: np.ndarray, *, fraction_bits: int, intercept: bool) -> Scaling:
        """The scaling of columns, float [rows, columns].

        Raises:
          DataError: a number is missing or not finite.
        """
        columns = _checked(columns)
        deviation = columns.std(axis=0)
        deviation = np.where(deviation > 0, deviation, 1.0)
        means = tuple(columns.mean(axis=0).tolist())
        return cls(means, tuple(deviation.tolist()), fraction_bits, intercept)

    @property
    def width(self) -> int:
        """Columns of integers."""
        return len(self.mean) + self.intercept

    def integers(self, columns: np.ndarray) -> np.ndarray:
        """int32 [rows, width].

        Raises:
          DataError: a number is missing or not finite, or there are other columns.
        """
        columns = _checked(columns)
        if columns.shape[1] != len(self.mean):
            raise DataError(f"{columns.shape[1]} columns for a model of {len(self.mean)}")
        scaled = (columns - np.array(self.mean)) / np.array(self.deviation)
        cut = np.rint(np.ldexp(np.clip(scaled, -MOST, MOST), self.fraction_bits)).astype(np.int32)
        ones = np.full((len(cut), int(self.intercept)), 1 << self.fraction_bits, np.int32)
        return np.hstack([ones, cut])


def _checked(columns: np.ndarray) -> np.ndarray:
    columns = np.asarray(columns, np.float64)
    if columns.ndim != 2:
        raise DataError(f"columns are shaped [rows, columns], these {columns.shape}")
    missing = ~np.isfinite(columns)
    if missing.any():
        row, column = np.argwhere(missing)[0]
        raise DataError(
            f"column {column} has no finite number in row {row}: regression takes none missing; "
            "fill it in, or train trees"
        )
    return columns
