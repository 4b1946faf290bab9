"""Moments, quantiles and correlations of rows that lie at several parties, over secure sums.

Every party calls the same function with its own rows; the sums decide who is trusted with what.
Revealed to all parties and the aggregator: what is returned, and the sums that it is computed from:
counts, sums of values and of squares and products, and for quantiles how many values lie below
each of the thresholds tried. A party with fewer than `minimum` values of a column adds nothing to
what is said of it (`suppression`), so no total is of fewer.
Ranges of columns are agreed on beforehand, since the extremes would be single rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardpar.errors import DataError, SpecError
from shardpar.fl.sums import Sums, total_counts, total_magnitudes, total_values
from shardpar.fl.suppression import MINIMUM, microaggregated

_WAYS = 16
DIGITS = 8
"""Of quantiles, to base 16."""
SLACK = 1.001
"""Bounds of sums are so much larger, for what rounding adds."""


@dataclass(frozen=True)
class Ranges:
    """Between which numbers each column lies; known to all, chosen without looking at the data.

    >>> Ranges.of([(0, 120), (-1, 1)]).widths.tolist()
    [120.0, 2.0]
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        """Checks that each is a range."""
        pairs = list(zip(self.low, self.high, strict=True))
        if not pairs or not all(np.isfinite([a, b]).all() and a < b for a, b in pairs):
            raise SpecError(f"ranges {pairs[:5]}; each has a finite low end below its high end")

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Ranges:
        """Ranges from (low, high) of each column."""
        return cls(tuple(float(a) for a, _ in pairs), tuple(float(b) for _, b in pairs))

    @property
    def widths(self) -> np.ndarray:
        """high - low, float64 [columns]."""
        return np.array(self.high) - np.array(self.low)

    @property
    def middles(self) -> np.ndarray:
        """Float64 [columns]."""
        return np.array(self.low) + self.widths / 2

    def checked(self, rows: np.ndarray) -> np.ndarray:
        """Rows as float64 [rows, columns], NaN where a value is missing.

        Raises:
          DataError: another number of columns, or values beyond their range.
        """
        rows = np.asarray(rows, np.float64)
        if rows.ndim != 2 or rows.shape[1] != len(self.low):
            raise DataError(f"rows of shape {rows.shape} where {len(self.low)} columns have ranges")
        beyond = ((rows < self.low) | (rows > self.high)).any(axis=0)
        if beyond.any():
            column = int(beyond.argmax())
            raise DataError(
                f"column {column} has values beyond {self.low[column]:g} to "
                f"{self.high[column]:g}; clip them, or agree on a wider range at all parties"
            )
        return rows


@dataclass(frozen=True, eq=False)
class Moments:
    """Of each column's values that are there.

    Attributes:
      count: how many, int64 [columns].
      mean: float64; NaN where there are none. Off by at most parties * 2^-29 of the range's width.
      variance: of the population; off by a relative parties * 2^-28, and by the square of what the
        mean may be off.
    """

    count: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    @property
    def deviation(self) -> np.ndarray:
        """The root of the variance."""
        return np.sqrt(self.variance)


def moments(sums: Sums, rows: np.ndarray, ranges: Ranges, *, minimum: int = MINIMUM) -> Moments:
    """Count, mean and variance of each column.

    Args:
      sums: over all parties.
      rows: this party's, float [rows, columns], NaN where a value is missing.
      ranges: of the columns.
      minimum: fewest rows that any number may be of.

    Raises:
      DataError: a value is beyond its range.

    >>> from shardpar.fl.sums import Alone
    >>> found = moments(Alone(), np.array([[1.0], [3.0]]), Ranges.of([(0, 4)]), minimum=2)
    >>> found.count.tolist(), found.mean.round(6).tolist(), found.variance.round(6).tolist()
    ([2], [2.0], [1.0])
    """
    rows = ranges.checked(rows)
    there = _there(rows, minimum)
    count = total_counts(sums, "rows with a value", there.sum(axis=0))
    offset = np.where(there, rows - ranges.middles, 0.0).sum(axis=0)
    total = total_values(sums, "sums of values", offset, count * ranges.widths * SLACK / 2)
    some = np.maximum(count, 1)
    mean = ranges.middles + total / some
    squares = np.where(there, np.square(rows - mean), 0.0).sum(axis=0)
    bounds = count * np.square(ranges.widths) * SLACK
    variance = total_magnitudes(sums, "sums of squares", squares, bounds) / some
    absent = count == 0
    return Moments(count, np.where(absent, np.nan, mean), np.where(absent, np.nan, variance))


def quantiles(
    sums: Sums,
    rows: np.ndarray,
    ranges: Ranges,
    levels: Sequence[float],
    *,
    minimum: int = MINIMUM,
    digits: int = DIGITS,
) -> np.ndarray:
    """Values that a share of each column's rows is not above: float64 [columns, levels].

    Of the rows in order, the mean of those just at and just after the share, as NumPy's
    averaged_inverted_cdf. With a minimum m above 1, order is that of means of m neighbours at each
    party, so that a value is off by fewer than m ranks for each.

    Args:
      sums: over all parties.
      rows: this party's, float [rows, columns], NaN where a value is missing.
      ranges: of the columns.
      levels: shares between 0 and 1.
      minimum: fewest rows that any number may be of.
      digits: of the answer, to base 16: it is off by at most half of `resolution`. Each
        takes one sum of 30 counts per column and level.

    Returns:
      NaN for a column without values.

    Raises:
      DataError: a value is beyond its range.

    >>> from shardpar.fl.sums import Alone
    >>> rows = np.arange(101.0)[:, None]
    >>> quantiles(Alone(), rows, Ranges.of([(0, 128)]), [0.5, 0.9], minimum=1).round(4).tolist()
    [[50.0, 90.0]]
    """
    shares = np.asarray(levels, np.float64)
    if shares.ndim != 1 or not shares.size or not ((shares >= 0) & (shares <= 1)).all():
        raise SpecError(f"levels {levels} are not shares between 0 and 1")
    rows = ranges.checked(rows)
    columns = [microaggregated(c[~np.isnan(c)], minimum) for c in rows.T]
    count = total_counts(sums, "values in order", np.array([len(c) for c in columns]))
    # 0.3 * 10 is 3 and not 4 by a rounding error.
    wanted = count[:, None] * shares
    wanted = np.where(np.abs(wanted - np.rint(wanted)) < 1e-9, np.rint(wanted), wanted)
    ranks = np.stack([np.ceil(wanted), np.floor(wanted) + 1], axis=-1)
    ranks = np.clip(ranks, 1, np.maximum(count, 1)[:, None, None])
    low = np.broadcast_to(np.array(ranges.low)[:, None, None], ranks.shape).copy()
    width = np.broadcast_to(ranges.widths[:, None, None], ranks.shape)
    parts = np.arange(1, _WAYS)
    for digit in range(1, digits + 1):
        step = width * float(_WAYS) ** -digit
        tried = low[..., None] + step[..., None] * parts
        below = np.stack(
            [np.searchsorted(c, t, side="right") for c, t in zip(columns, tried, strict=True)]
        )
        found = total_counts(sums, f"values up to thresholds, digit {digit}", below)
        low += step * (found < ranks[..., None]).sum(axis=-1)
    # The value sought is above `low`, by a step at most.
    value = low + step / 2
    return np.where(count[:, None] == 0, np.nan, value.mean(axis=-1))


def pearson(sums: Sums, rows: np.ndarray, ranges: Ranges, *, minimum: int = MINIMUM) -> np.ndarray:
    """Pearson's correlation of all pairs of columns, float64 [columns, columns].

    Of rows without a missing value. NaN for columns that are constant.

    Args:
      sums: over all parties.
      rows: this party's, float [rows, columns].
      ranges: of the columns.
      minimum: fewest rows that any number may be of.
    """
    rows = ranges.checked(rows)
    rows = rows[~np.isnan(rows).any(axis=1)]
    found = moments(sums, rows, ranges, minimum=minimum)
    if len(rows) < minimum:
        rows = rows[:0]
    # What the encoding may leave of a constant column's variance is no variance.
    noise = np.square(ranges.widths * sums.parties * 2.0**-28)
    varies = found.variance > noise
    scale = np.sqrt(np.where(varies, found.variance, 1.0))
    standard = np.where(varies, (rows - np.nan_to_num(found.mean)) / scale, 0.0)
    products = standard.T @ standard
    count = np.maximum(found.count, 1).min()
    # By Cauchy and Schwarz no party's part is beyond the sum of squares of all rows.
    total = total_values(sums, "products", products, np.full(products.shape, count * SLACK))
    matrix = np.clip(total / count, -1, 1)
    np.fill_diagonal(matrix, 1.0)
    undefined = ~varies | (found.count == 0)
    matrix[undefined] = matrix[:, undefined] = np.nan
    return matrix


def resolution(ranges: Ranges, digits: int = DIGITS) -> np.ndarray:
    """The step to which `quantiles` are found, float64 [columns]."""
    return ranges.widths * float(_WAYS) ** -digits


def _there(rows: np.ndarray, minimum: int) -> np.ndarray:
    """Which values count: none of a column that has fewer than the minimum at this party."""
    there = ~np.isnan(rows)
    return there & (there.sum(axis=0) >= minimum)
