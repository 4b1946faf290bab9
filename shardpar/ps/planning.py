"""Which placement, capacity and cache a table gets, from how often its ids are asked for.

All from counts of a sample of the data: bytes that a step moves per device under each
placement, memory that each needs, and how many rows a round of exchange must carry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardpar.errors import InfeasibleError
from shardpar.ps.placement import Placement
from shardpar.ps.table import Table

_CACHED_SHARE = 0.9
_SIGMAS = 6.0


@dataclass(frozen=True)
class Frequencies:
    """How often ids are asked for.

    Attributes:
      shares: float64[distinct], of all lookups, the largest first.
      lookups: per sample.

    >>> Frequencies.of(np.array([[7, 7], [7, 2]])).shares.tolist()
    [0.75, 0.25]
    """

    shares: np.ndarray
    lookups: float

    @classmethod
    def of(cls, ids: np.ndarray) -> Frequencies:
        """From a sample of ids int[samples, slots]; negative ones are padding."""
        there = ids[ids >= 0]
        counts = np.sort(np.unique(there, return_counts=True)[1])[::-1]
        total = max(1, counts.sum())
        return cls(counts / total, there.size / max(1, ids.shape[0]))

    def distinct(self, samples: float) -> float:
        """How many distinct ids so many samples ask for, on average.

        >>> Frequencies(np.array([1.0]), 2.0).distinct(100)
        1.0
        """
        drawn = samples * self.lookups
        return float(-np.expm1(drawn * np.log1p(-np.minimum(self.shares, 1 - 1e-12))).sum())

    def covering(self, share: float) -> int:
        """How many of the most frequent ids make up this share of all lookups."""
        if not self.shares.size:
            return 0
        found = int(np.searchsorted(np.cumsum(self.shares), share)) + 1
        return min(found, self.shares.size)


@dataclass(frozen=True)
class Choice:
    """What a table gets.

    Attributes:
      placement: where it lies.
      capacity: rows that a device asks of an owner in one round.
      cache_rows: rows that a worker should cache: they answer nine of ten lookups.
      moved_bytes: per device and step.
      peak_bytes: of rows and slots on the fullest device.
      reason: why this placement, for people.
    """

    placement: Placement
    capacity: int
    cache_rows: int
    moved_bytes: float
    peak_bytes: float
    reason: str


def choose(
    table: Table,
    frequencies: Frequencies,
    *,
    global_batch: int,
    devices: int,
    memory_bytes: float,
    columns: Sequence[int] = (),
) -> Choice:
    """The placement that moves the fewest bytes among those that fit.

    Args:
      table: what is placed.
      frequencies: of its ids.
      global_batch: samples per step.
      devices: over which it may lie.
      memory_bytes: of a device, for this table.
      columns: numbers of column shards that are tried besides 1.

    Raises:
      InfeasibleError: it does not fit, however it is laid out.

    >>> table = Table(1000, 8)
    >>> busy = Frequencies(np.full(1000, 1e-3), 10.0)
    >>> choose(table, busy, global_batch=64, devices=4, memory_bytes=1e9).placement.text()
    'rows in turns over 4'
    """
    share = frequencies.distinct(global_batch / devices)
    grids = sorted({1, *(c for c in columns if devices % c == 0 and table.dim % c == 0)})
    tried = [Placement(rows=devices // c, columns=c) for c in grids]
    if devices > 1:
        tried.append(Placement(replicated=True))
    options = [
        (moved(table, placement, share, devices), held(table, placement), placement)
        for placement in tried
    ]
    fitting = [option for option in options if option[1] <= memory_bytes]
    if not fitting:
        least = min(held_ for _, held_, _ in options)
        suggestion = "use more devices, fewer rows (data.hashed=true), or a row-wise optimizer"
        raise InfeasibleError(
            f"a table of {table.rows:,} x {table.dim} needs {least / 2**30:.2f} GiB on a device, "
            f"{(least - memory_bytes) / 2**30:.2f} more than there is; {suggestion}",
            missing_bytes=math.ceil(least - memory_bytes),
            suggestion=suggestion,
        )
    moved_bytes, peak_bytes, placement = min(fitting, key=lambda option: option[:2])
    return Choice(
        placement,
        capacity_for(share * placement.columns, placement.rows),
        frequencies.covering(_CACHED_SHARE),
        moved_bytes,
        peak_bytes,
        f"{placement.text()}: {share:,.0f} distinct rows per device and step, "
        f"{moved_bytes / 1e6:.2f} MB moved, {peak_bytes / 1e6:.1f} MB held",
    )


def held(table: Table, placement: Placement) -> float:
    """Bytes of rows and slots on one device."""
    per_row = table.bytes / table.rows
    return placement.shard_rows(table.rows) * per_row / placement.columns


def moved(table: Table, placement: Placement, distinct: float, devices: int) -> float:
    """Bytes that a device sends in a step: ids and rows of pulls, gradients of pushes.

    Args:
      table: whose rows.
      placement: where they are.
      distinct: ids that a device's part of the batch asks for.
      devices: all of them.
    """
    row, id_ = 4.0 * table.dim, 4.0
    if placement.replicated:
        return (devices - 1) * distinct * (row + id_)
    over_rows = (placement.rows - 1) / placement.rows
    over_columns = (placement.columns - 1) / placement.columns
    # Columns: everyone's ids go to all column peers, and each sends its piece of every row.
    gathered = (placement.columns - 1) * distinct * id_
    asked = distinct * placement.columns * over_rows
    pieces = asked * (2 * row / placement.columns + 2 * id_)
    return gathered + pieces + 2 * distinct * row * over_columns


def capacity_for(requests: float, owners: int) -> int:
    """Rows per owner that one round holds but for rare luck: the mean and six deviations.

    >>> capacity_for(1000.0, 4)
    333
    """
    mean = requests / owners
    return max(1, math.ceil(mean + _SIGMAS * math.sqrt(mean * (1 - 1 / owners))))
