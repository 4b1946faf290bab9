"""Tables of rows that lie at several parties: how many are in each cell, and sums of their values.

Every party calls the same function with its own rows. Revealed to all parties and the aggregator:
what is returned. Each party leaves out cells of fewer than `minimum` rows before it adds, and one
more if need be (`suppression`); which ones, nobody learns, but how many rows of all parties they
had. Names of cells and groups are agreed on beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardpar.errors import DataError, SpecError
from shardpar.fl.stats import SLACK, Ranges
from shardpar.fl.sums import Sums, total_counts, total_values
from shardpar.fl.suppression import MINIMUM, kept_cells


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
    bounds = count[:-1] * ranges.widths * SLACK / 2
    total = total_values(sums, f"sums in {size} groups", np.where(kept, offsets, 0.0), bounds)
    return Groups(count[:-1], total + count[:-1] * ranges.middles, count[-1])


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
