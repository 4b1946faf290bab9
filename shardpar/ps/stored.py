"""The rows that a server holds: born when first asked for, changed by their table's rule.

A row's beginning follows from the table's key and its id (`ps.initializers`), so a row that
nobody has updated needs no memory on disk, and is the same on whichever server it is born.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from shardpar.errors import DataError
from shardpar.ps.dedup import rounded_size
from shardpar.ps.initializers import Initializer
from shardpar.ps.optimizers import RowOptimizer
from shardpar.ps.placement import Placement
from shardpar.ps.table import Table

_FIRST_ROOM = 1024


@dataclass(frozen=True, eq=False)
class Rules:
    """How a table's rows begin and take gradients: programs, compiled for few sizes.

    Attributes:
      table: whose.
      key: the data of the table's jax.random key; None where no row is born.
    """

    table: Table
    key: np.ndarray | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Of a row and of each of its slots."""
        slots = self.table.optimizer.slots(self.table.dim)
        return (self.table.dim, *(width for width, _ in slots))

    def born(self, ids: np.ndarray) -> tuple[np.ndarray, ...]:
        """Rows and slots, [n, width], as they are before any update."""
        padded = np.zeros(rounded_size(ids.size), np.int32)
        padded[: ids.size] = ids
        rows = np.asarray(_begun(self.table.init, self.key, padded, self.table.dim))[: ids.size]
        slots = self.table.optimizer.slots(self.table.dim)
        return (rows, *(np.full((ids.size, width), value, np.float32) for width, value in slots))

    def updated(
        self, pieces: tuple[np.ndarray, ...], gradient: np.ndarray, step: int, rate: float
    ) -> tuple[np.ndarray, ...]:
        """Rows and slots after the rule; `step` counts from 1."""
        count = gradient.shape[0]
        size = rounded_size(count)
        given = [_padded(array, size) for array in (*pieces, gradient)]
        rule, counts = self.table.optimizer, (np.int32(step), np.float32(rate))
        new = _updated(rule, tuple(given[:-1]), given[-1], *counts)
        return tuple(np.asarray(piece)[:count] for piece in new)


# Programs of all tables in a process, so that tables with one rule compile it once.
@partial(jax.jit, static_argnums=(0, 3))
def _begun(init: Initializer, key: jax.Array, ids: jax.Array, dim: int) -> jax.Array:
    return init(jax.random.wrap_key_data(key), ids, dim)


@partial(jax.jit, static_argnums=0)
def _updated(
    rule: RowOptimizer, pieces: tuple[jax.Array, ...], gradient: jax.Array,
    step: jax.Array, rate: jax.Array,
) -> tuple[jax.Array, ...]:  # fmt: skip
    rows, slots = rule.update(pieces[0], pieces[1:], gradient, step, rate)
    return (rows, *slots)


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros((size, array.shape[1]), np.float32)
    out[: array.shape[0]] = array
    return out


@dataclass
class StoredRows:
    """One table's rows on one shard.

    Attributes:
      rules: of the table.
      placement: how the table's rows are dealt to shards.
      shard: which of them this is.
      step: updates of the table so far.
    """

    rules: Rules
    placement: Placement
    shard: int
    step: int = 0
    _count: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        # Four bytes for each row of the shard; rows and slots take memory once they are born.
        rows = self.placement.shard_rows(self.rules.table.rows)
        self._slot_of = np.full(rows, -1, np.int32)
        self._ids = np.zeros(0, np.int64)
        self._versions = np.zeros(0, np.int64)
        self._pieces = [np.zeros((0, width), np.float32) for width in self.rules.widths]

    def require(self, ids: np.ndarray, what: str) -> None:
        """Refuses ids that are not of this shard.

        Raises:
          DataError: naming the first of them.
        """
        rows = self.rules.table.rows
        good = (ids >= 0) & (ids < rows)
        good[good] = self.placement.home(ids[good], rows)[0] == self.shard
        if not good.all():
            bad = ids[~good][0]
            raise DataError(
                f"{what} has id {bad}, which shard {self.shard} of a table with {rows} rows, "
                f"{self.placement.text()}, does not hold; use `ps.client`, which knows where ids go"
            )

    def at(self, ids: np.ndarray) -> np.ndarray:
        """Where ids are in this object's arrays; those not born yet are born."""
        places = self._places(ids)
        found = self._slot_of[places]
        missing = np.flatnonzero(found < 0)
        if missing.size:
            self._grow(self._count + missing.size)
            new = np.arange(self._count, self._count + missing.size, dtype=np.int32)
            self._ids[new] = ids[missing]
            for piece, begin in zip(self._pieces, self.rules.born(ids[missing]), strict=True):
                piece[new] = begin
            self._versions[new] = 0
            self._slot_of[places[missing]] = new
            self._count += missing.size
            found[missing] = new
        return found

    def read(
        self, at: np.ndarray, *, slots: bool = False
    ) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Copies of rows, and of their slots where asked for; and their versions."""
        pieces = self._pieces if slots else self._pieces[:1]
        return tuple(piece[at] for piece in pieces), self._versions[at]

    def versions(self, at: np.ndarray) -> np.ndarray:
        """How many updates rows have had, int64[n]."""
        return self._versions[at]

    def take_gradients(
        self, ids: np.ndarray, gradient: np.ndarray, counts: np.ndarray, rate: float
    ) -> None:
        """Rows take their gradients by the table's rule; ids are distinct."""
        at = self.at(ids)
        old = tuple(piece[at] for piece in self._pieces)
        new = self.rules.updated(old, gradient, self.step + 1, rate)
        self._write(at, new, counts)

    def add(self, ids: np.ndarray, differences: tuple[np.ndarray, ...], counts: np.ndarray) -> None:
        """Rows and slots move by what a worker's own updates made of its copies."""
        at = self.at(ids)
        moved = tuple(p[at] + d for p, d in zip(self._pieces, differences, strict=True))
        self._write(at, moved, counts)

    def replace(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Rows become others, which counts as one update; their slots stay."""
        at = self.at(ids)
        self._write(at, (rows, *(piece[at] for piece in self._pieces[1:])), np.ones_like(ids))

    def all_ids(self) -> np.ndarray:
        """Every id of this shard, born or not, int64[n]."""
        places = np.arange(self._slot_of.size, dtype=np.int64)
        ids = np.asarray(self.placement.row_at(self.shard, places, self.rules.table.rows))
        return ids[ids >= 0].astype(np.int64)

    def arrays(self) -> dict[str, Any]:
        """What a snapshot keeps: the rows that had updates."""
        at = np.flatnonzero(self._versions[: self._count] > 0)
        pieces, versions = self.read(at, slots=True)
        kept = {"ids": self._ids[at], "pieces": list(pieces), "versions": versions}
        return kept | {"step": self.step}

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """The inverse of `arrays`, on an object that has no rows yet."""
        at = self.at(arrays["ids"])
        for piece, values in zip(self._pieces, arrays["pieces"], strict=True):
            piece[at] = values
        self._versions[at] = arrays["versions"]
        self.step = arrays["step"]

    def _write(self, at: np.ndarray, new: tuple[np.ndarray, ...], counts: np.ndarray) -> None:
        for piece, values in zip(self._pieces, new, strict=True):
            piece[at] = values
        self._versions[at] += counts

    def _places(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.placement.home(ids, self.rules.table.rows)[1])

    def _grow(self, rows: int) -> None:
        room = self._ids.size
        if rows <= room:
            return
        room = max(_FIRST_ROOM, 2 * room, rows)

        def grown(array: np.ndarray) -> np.ndarray:
            out = np.zeros((room, *array.shape[1:]), array.dtype)
            out[: self._count] = array[: self._count]
            return out

        self._ids, self._versions = grown(self._ids), grown(self._versions)
        self._pieces = [grown(piece) for piece in self._pieces]
