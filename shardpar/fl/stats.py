"""Statistics of rows that lie at several parties, over secure sums, none of fewer rows than agreed.

Every party calls the same function with its own rows; the sums decide who is trusted with what.
Revealed to all parties and the aggregator: what is returned, and the sums that it is computed from:
counts, sums of values and of squares and products, and for quantiles how many values lie below
each of the thresholds tried. Each party leaves out cells of fewer than `minimum` rows before it
adds (`suppression`), so no total is of fewer, and a party with fewer rows adds nothing at all.
Ranges of columns are agreed on beforehand, since the extremes would be single rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardpar.errors import DataError, SpecError
from shardpar.fl.sums import Sums, total_counts, total_magnitudes, total_values
from shardpar.fl.suppression import MINIMUM, kept_cells, microaggregated

_WAYS = 16
DIGITS = 8
"""Of quantiles, to base 16."""
# Bounds of sums leave room for what rounding adds.
_SLACK = 1e-3
_HALF = 0.5 * (1 + _SLACK)


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
    total = total_values(sums, "sums of values", offset, count * ranges.widths * _HALF)
    some = np.maximum(count, 1)
    mean = ranges.middles + total / some
    squares = np.where(there, np.square(rows - mean), 0.0).sum(axis=0)
    bounds = count * np.square(ranges.widths) * (1 + _SLACK)
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


@dataclass(frozen=True, eq=False)
class Table:
    """Rows in each cell, over all parties.

    Attributes:
      counts: without the cells that parties left out.
      left_out: how many rows those have, of all parties together.
    """

    counts: np.ndarray
    left_out: int


def table(sums: Sums, cells: np.ndarray, size: int, *, minimum: int = MINIMUM) -> Table:
    """How many rows are in each cell.

    Args:
      sums: over all parties.
      cells: the cell of each of this party's rows, below `size`; int [rows].
      size: how many cells; the same at all parties.
      minimum: fewest rows that any number may be of.

    Raises:
      DataError: a cell is not below `size`.

    >>> from shardpar.fl.sums import Alone
    >>> found = table(Alone(), np.repeat([0, 1, 2], [9, 2, 4]), 4, minimum=3)
    >>> found.counts.tolist(), found.left_out
    ([9, 0, 0, 0], 6)
    """
    counts = counted(cells, size)
    kept = kept_cells(counts, minimum)
    missing = int(counts[~kept].sum())
    # A party of fewer rows than the minimum is not there at all.
    shown = np.append(np.where(kept, counts, 0), missing if missing >= minimum else 0)
    total = total_counts(sums, f"rows in {size} cells", shown)
    return Table(total[:-1], int(total[-1]))


def histograms(
    sums: Sums,
    rows: np.ndarray,
    ranges: Ranges,
    edges: Sequence[Sequence[float]],
    *,
    minimum: int = MINIMUM,
) -> tuple[Table, ...]:
    """For each column how many values lie between its edges, and after them how many are missing.

    Args:
      sums: over all parties.
      rows: this party's, float [rows, columns], NaN where a value is missing.
      ranges: of the columns.
      edges: between cells, rising, for each column; the first cell has what is below all of them,
        and a value at an edge is above it.
      minimum: fewest rows that any number may be of.
    """
    rows = ranges.checked(rows)
    found = []
    for column, inner in zip(rows.T, edges, strict=True):
        cells = np.where(
            np.isnan(column), len(inner) + 1, np.searchsorted(inner, column, side="right")
        )
        found.append(table(sums, cells, len(inner) + 2, minimum=minimum))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Groups:
    """Of each group of rows.

    Attributes:
      count: rows with a value, int64 [groups, columns].
      total: the sum of their values, float64 [groups, columns].
      left_out: rows with a value in cells that parties left out, int64 [columns].
    """

    count: np.ndarray
    total: np.ndarray
    left_out: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """NaN where a group has no value."""
        return np.where(self.count > 0, self.total / np.maximum(self.count, 1), np.nan)


def group_by(
    sums: Sums,
    groups: np.ndarray,
    size: int,
    rows: np.ndarray,
    ranges: Ranges,
    *,
    minimum: int = MINIMUM,
) -> Groups:
    """Counts, sums and means of each column within each group.

    Args:
      sums: over all parties.
      groups: the group of each row, below `size`; the names behind the numbers are agreed on.
      size: how many groups.
      rows: this party's, float [rows, columns], NaN where a value is missing.
      ranges: of the columns.
      minimum: fewest rows that any number may be of.

    Raises:
      DataError: a group is not below `size`, or a value beyond its range.
    """
    rows = ranges.checked(rows)
    if len(groups) != len(rows):
        raise DataError(f"{len(groups)} groups for {len(rows)} rows")
    there = ~np.isnan(rows)
    counts = np.stack([counted(groups[ok], size) for ok in there.T], axis=1)
    kept = np.stack([kept_cells(c, minimum) for c in counts.T], axis=1)
    missing = np.where(kept, 0, counts).sum(axis=0)
    shown = np.vstack([np.where(kept, counts, 0), np.where(missing >= minimum, missing, 0)])
    count = total_counts(sums, f"rows in {size} groups", shown)
    offsets = np.zeros(counts.shape)
    np.add.at(offsets, groups, np.where(there, rows - ranges.middles, 0.0))
    bounds = count[:-1] * ranges.widths * _HALF
    total = total_values(sums, f"sums in {size} groups", np.where(kept, offsets, 0.0), bounds)
    return Groups(count[:-1], total + count[:-1] * ranges.middles, count[-1])


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
    total = total_values(sums, "products", products, np.full(products.shape, count * (1 + _SLACK)))
    matrix = np.clip(total / count, -1, 1)
    np.fill_diagonal(matrix, 1.0)
    undefined = ~varies | (found.count == 0)
    matrix[undefined] = matrix[:, undefined] = np.nan
    return matrix


def resolution(ranges: Ranges, digits: int = DIGITS) -> np.ndarray:
    """The step to which `quantiles` are found, float64 [columns]."""
    return ranges.widths * float(_WAYS) ** -digits


def stability_index(expected: np.ndarray, actual: np.ndarray) -> float:
    """The population stability index of counts in the same cells, then and now.

    Half a row is added to each cell, so that empty ones stay finite. Above 0.25 a model is
    commonly thought to be out of date (Siddiqi, Credit Risk Scorecards, 2006).

    Raises:
      SpecError: the cells are not the same.

    >>> stability_index(np.array([10, 20]), np.array([10, 20]))
    0.0
    """
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if expected.shape != actual.shape or expected.ndim != 1:
        raise SpecError(f"counts of {expected.shape} and {actual.shape} cells")
    then = (expected + 0.5) / (expected + 0.5).sum()
    now = (actual + 0.5) / (actual + 0.5).sum()
    return float(((now - then) * np.log(now / then)).sum())


def counted(cells: np.ndarray, size: int) -> np.ndarray:
    """How many of this party's rows are in each cell, int64 [size].

    Raises:
      DataError: a cell is not below `size`.
    """
    cells = np.asarray(cells)
    if cells.size and (cells.dtype.kind not in "iu" or cells.min() < 0 or cells.max() >= size):
        raise DataError(f"cells are not all whole numbers from 0 to {size - 1}")
    return np.bincount(cells.astype(np.int64), minlength=size)


def _there(rows: np.ndarray, minimum: int) -> np.ndarray:
    """Which values count: none of a column that has fewer than the minimum at this party."""
    there = ~np.isnan(rows)
    return there & (there.sum(axis=0) >= minimum)
