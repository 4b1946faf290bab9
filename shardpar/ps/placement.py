"""Where the rows and columns of a table are: a grid of devices, and how rows are dealt to it.

A table of `rows` x `dim` is split over a grid of row shards and column shards. Rows are
dealt in turn (row r to shard r mod n), which spreads the busy small ids of a frequency-sorted
vocabulary, or in ranges, equal or not. Whole tables on single devices are ranges of one
table that holds them all (`tables.fused`). A replicated table is on every device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from shardpar.errors import PlanError

Deal = Literal["turns", "ranges"]


@dataclass(frozen=True)
class Placement:
    """How one table lies on devices.

    Attributes:
      rows: row shards.
      columns: column shards; a row is cut into this many pieces of equal width.
      deal: rows in turns, or in ranges.
      extents: with ranges, the rows of each shard; empty for equal ones.
      replicated: every device has all of it, and `rows` and `columns` are 1.

    >>> Placement(rows=4).devices, Placement(rows=2, columns=2).devices
    (4, 4)
    """

    rows: int = 1
    columns: int = 1
    deal: Deal = "turns"
    extents: tuple[int, ...] = ()
    replicated: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise PlanError(
                f"a table has at least 1 shard of rows and of columns, not {self.rows} and "
                f"{self.columns}"
            )
        if self.replicated and self.devices != 1:
            raise PlanError("a replicated table has no shards: leave rows and columns at 1")
        if self.extents and (self.deal != "ranges" or len(self.extents) != self.rows):
            raise PlanError(
                f"extents {self.extents} say the rows of each shard: write deal='ranges' and "
                f"one extent for each of the {self.rows} shards"
            )

    @property
    def devices(self) -> int:
        """How many devices share the table; of a replicated one, each is alone."""
        return self.rows * self.columns

    def bounds(self, rows: int) -> tuple[int, ...]:
        """With ranges: where each shard's rows begin, and where the last ends.

        >>> Placement(rows=2, deal="ranges").bounds(5)
        (0, 3, 5)

        Raises:
          PlanError: the extents are not those of a table with so many rows.
        """
        if self.extents:
            if sum(self.extents) != rows:
                raise PlanError(
                    f"the extents {self.extents} hold {sum(self.extents)} rows, but the table "
                    f"has {rows}"
                )
            return tuple(accumulate(self.extents, initial=0))
        each = -(-rows // self.rows)
        return tuple(min(rows, shard * each) for shard in range(self.rows + 1))

    def shard_rows(self, rows: int) -> int:
        """How many rows a shard has room for: what the fullest holds."""
        if self.deal == "turns":
            return -(-rows // self.rows)
        bounds = self.bounds(rows)
        return max(1, *(end - start for start, end in pairwise(bounds)))

    def shard_columns(self, dim: int) -> int:
        """How wide a shard is.

        Raises:
          PlanError: the columns do not divide.
        """
        if dim % self.columns:
            fits = [n for n in range(1, dim + 1) if dim % n == 0 and n < self.columns]
            raise PlanError(
                f"a table of {dim} columns is not cut into {self.columns} equal pieces; "
                f"columns={max(fits, default=1)} would fit, or cut rows instead (table.placement="
                "rows)"
            )
        return dim // self.columns

    def home(self, rows: Any, table_rows: int) -> tuple[Any, Any]:
        """(shard, place in it) of rows that are ids of the table; numpy or jax arrays.

        >>> shard, place = Placement(rows=2).home(np.arange(4), 4)
        >>> shard.tolist(), place.tolist()
        ([0, 1, 0, 1], [0, 0, 1, 1])
        """
        if self.deal == "turns":
            return rows % self.rows, rows // self.rows
        xp = np if isinstance(rows, np.ndarray) else jnp
        bounds = xp.asarray(self.bounds(table_rows), xp.int32)
        shard = xp.clip(xp.searchsorted(bounds, rows, side="right") - 1, 0, self.rows - 1)
        shard = shard.astype(xp.int32)
        return shard, rows - bounds[shard]

    def row_at(self, shard: Any, place: Any, table_rows: int) -> Any:
        """The id of the row at a place of a shard, or -1 where the shard has no row there.

        >>> Placement(rows=2).row_at(1, np.arange(3), 5).tolist()
        [1, 3, -1]
        """
        xp = np if isinstance(place, np.ndarray) else jnp
        if self.deal == "turns":
            row = place * self.rows + shard
            return xp.where(row < table_rows, row, -1)
        bounds = xp.asarray(self.bounds(table_rows), xp.int32)
        row = bounds[shard] + place
        return xp.where(row < bounds[shard + 1], row, -1)

    def text(self) -> str:
        """For people.

        >>> Placement(rows=4).text(), Placement(rows=2, columns=2).text()
        ('rows in turns over 4', 'rows in turns over 2, columns over 2')
        """
        if self.replicated:
            return "replicated"
        parts = [f"rows in {self.deal} over {self.rows}"] if self.rows > 1 else []
        if self.columns > 1:
            parts.append(f"columns over {self.columns}")
        return ", ".join(parts) or "one device"


def placement_of(
    given: Mapping[str, Placement] | Placement | None, name: str, devices: int
) -> Placement:
    """The placement of a table: its own, the one that is for all, or rows dealt over all devices.

    >>> placement_of({"users": Placement(replicated=True)}, "items", 4).text()
    'rows in turns over 4'
    """
    if isinstance(given, Placement):
        return given
    if given and name in given:
        return given[name]
    return Placement(rows=devices)


def whole_tables(loads: tuple[float, ...], devices: int) -> tuple[int, ...]:
    """Table-wise placement: which device takes each table, the heaviest first to the lightest.

    Longest-processing-time rule (Graham, 1969): the fullest device has at most 4/3 of the
    least possible load.

    Args:
      loads: bytes or lookups of each table.
      devices: how many there are.

    >>> whole_tables((3.0, 3.0, 2.0, 2.0, 2.0), 2)
    (0, 1, 0, 1, 0)
    """
    held = [0.0] * devices
    taken = [0] * len(loads)
    for table in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        device = min(range(devices), key=lambda d: (held[d], d))
        taken[table] = device
        held[device] += loads[table]
    return tuple(taken)


def grid(devices: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a grid over all devices.

    Raises:
      PlanError: the columns do not divide the devices.

    >>> grid(8, 2)
    (4, 2)
    """
    if devices % columns:
        raise PlanError(
            f"{devices} devices do not make a grid with {columns} columns; "
            f"use a divisor of {devices}, such as {math.gcd(devices, columns)}"
        )
    return devices // columns, columns
