"""What a table is, and its state on devices: rows, the slots of its optimizer, and a count.

A table's arrays are stored shard after shard: `[shards * shard_rows, dim]`, split evenly over
the grid of its placement, so that one NamedSharding says where everything is. Ids are turned
into stored places by `Placement.home`; people and checkpoints see ids only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from shardpar.errors import DataError, PlanError
from shardpar.lowering.shardings import grid_sharding
from shardpar.ps.dedup import rounded_size
from shardpar.ps.exchange import COLUMNS, ROWS, Exchange, usual_capacity
from shardpar.ps.initializers import Initializer, Normal
from shardpar.ps.optimizers import AdaGrad, RowOptimizer
from shardpar.ps.placement import Placement

_MOST_ROWS = 2**31 - 1


@dataclass(frozen=True)
class Table:
    """A table of embeddings, as a value: what it holds and how its rows learn.

    Attributes:
      rows: ids are 0 to rows - 1; for other ids see `ps.ids`.
      dim: width of a row.
      optimizer: the rule of its rows.
      init: how a row begins.

    >>> Table(rows=1000, dim=16).bytes
    128000
    """

    rows: int
    dim: int
    optimizer: RowOptimizer = field(default_factory=AdaGrad)
    init: Initializer = field(default_factory=Normal)

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= _MOST_ROWS or self.dim < 1:
            raise PlanError(
                f"a table has 1 to {_MOST_ROWS} rows and at least 1 column, not {self.rows} x "
                f"{self.dim}; map ids of a wider range to rows (table.ids=mapped, `ps.IdMap`)"
            )

    @property
    def bytes(self) -> int:
        """Of all rows and slots, in float32."""
        widths = self.dim + sum(width for width, _ in self.optimizer.slots(self.dim))
        return 4 * self.rows * widths


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TableState:
    """The arrays of a table on a mesh.

    Attributes:
      rows: float32[stored, dim].
      slots: float32[stored, width] each, as the optimizer says.
      step: int32, how many updates there were.
      scratch: int32[stored], of no meaning between steps, and not in checkpoints.
      key: data of the jax.random key that rows begin from.
    """

    rows: jax.Array
    slots: tuple[jax.Array, ...]
    step: jax.Array
    scratch: jax.Array
    key: jax.Array

    @property
    def pieces(self) -> tuple[jax.Array, ...]:
        """Everything that has a row per row."""
        return (self.rows, *self.slots)


@dataclass(frozen=True)
class PlacedTable:
    """A table on devices.

    Attributes:
      table, placement: what, and where.
      mesh: jax mesh with the axes ROWS and COLUMNS, over all devices that work together;
        a replicated table is on each of them.
    """

    table: Table
    placement: Placement
    mesh: Mesh

    def __post_init__(self) -> None:
        shape = (self.mesh.shape[ROWS], self.mesh.shape[COLUMNS])
        if not self.placement.replicated and shape != (self.placement.rows, self.placement.columns):
            raise PlanError(
                f"the placement '{self.placement.text()}' is for a grid of "
                f"{self.placement.rows} x {self.placement.columns} devices, not {shape[0]} x "
                f"{shape[1]}"
            )
        self.placement.shard_columns(self.table.dim)
        for width, _ in self.table.optimizer.slots(self.table.dim):
            if self.placement.columns > 1 and width != self.table.dim:
                raise PlanError(
                    f"{self.table.optimizer} keeps {width} numbers for a whole row, so a row "
                    "cannot be cut into columns; use AdaGrad, or placement columns=1"
                )

    @property
    def shard_rows(self) -> int:
        """Places in one row shard."""
        return self.placement.shard_rows(self.table.rows)

    @property
    def stored_rows(self) -> int:
        """Places in all."""
        return self.placement.rows * self.shard_rows

    def sharding(self, *, split_columns: bool = True) -> NamedSharding:
        """Of an array with a row per row; or of one without columns."""
        if self.placement.replicated:
            return grid_sharding(self.mesh, (), 1)
        axes = (ROWS, COLUMNS) if split_columns else (ROWS,)
        return grid_sharding(self.mesh, axes, len(axes))

    @property
    def shardings(self) -> TableState:
        """The state's shardings in the state's shape."""
        whole = self.sharding()
        return TableState(
            rows=whole,
            slots=tuple(whole for _ in self.table.optimizer.slots(self.table.dim)),
            step=grid_sharding(self.mesh, (), 0),
            scratch=self.sharding(split_columns=False),
            key=grid_sharding(self.mesh, (), 0),
        )

    def exchange(
        self,
        requests: int,
        by_owner: bool,
        *,
        capacity: int | None = None,
        ragged: bool | None = None,
    ) -> Exchange:
        """How rows travel when a device asks for so many; for other arguments see `Exchange`.

        With `ragged` None, only what is asked for travels on TPUs, and whole parts elsewhere.
        """
        capacity = capacity or usual_capacity(requests, self.placement)
        if ragged is None:
            ragged = all(device.platform == "tpu" for device in self.mesh.devices.flat)
        return Exchange(self.placement, self.table.rows, self.table.dim, capacity, by_owner, ragged)

    def init(self, key: jax.Array) -> TableState:
        """Every row as its initializer says, born sharded. `key` is a typed jax.random key."""

        def begin(key: jax.Array) -> TableState:
            ids = jnp.asarray(self.stored_ids())
            rows = self.table.init(key, jnp.maximum(ids, 0), self.table.dim)
            slots = tuple(
                jnp.full((ids.shape[0], width), value, jnp.float32)
                for width, value in self.table.optimizer.slots(self.table.dim)
            )
            scratch = jnp.zeros(ids.shape[0], jnp.int32)
            return TableState(rows, slots, jnp.int32(0), scratch, jax.random.key_data(key))

        return jax.jit(begin, out_shardings=self.shardings)(key)

    def stored_ids(self) -> np.ndarray:
        """The id at each stored place, int32[stored]; -1 where there is none."""
        place = np.arange(self.shard_rows, dtype=np.int32)
        return np.concatenate(
            [
                self.placement.row_at(shard, place, self.table.rows).astype(np.int32)
                for shard in range(self.placement.rows)
            ]
        )

    def stored_places(self, ids: np.ndarray) -> np.ndarray:
        """Where ids are stored.

        Raises:
          DataError: an id is not in the table.
        """
        require_ids(ids, self.table.rows, "the table")
        shard, place = self.placement.home(np.asarray(ids), self.table.rows)
        return np.asarray(shard) * self.shard_rows + place

    def lookup(self, state: TableState, ids: np.ndarray) -> np.ndarray:
        """The rows of some ids as a numpy array [..., dim]: for looking, not for training."""
        rows = self.pieces_of(state, np.asarray(ids).reshape(-1))[0]
        return rows.reshape(*np.shape(ids), self.table.dim)

    def pieces_of(self, state: TableState, ids: np.ndarray) -> tuple[np.ndarray, ...]:
        """Rows and slots of some ids int[n], on the host; [n, width] each."""
        places = np.zeros(rounded_size(ids.size), np.int32)
        places[: ids.size] = self.stored_places(ids)
        return tuple(
            np.asarray(_taken(piece, jnp.asarray(places)))[: ids.size] for piece in state.pieces
        )

    def whole(self, state: TableState) -> tuple[np.ndarray, ...]:
        """Rows and slots in the order of ids, on the host; [rows, width] each."""
        places = self.stored_places(np.arange(self.table.rows))
        return tuple(np.asarray(piece)[places] for piece in state.pieces)

    def placed(
        self, pieces: Sequence[np.ndarray], step: int, key: np.ndarray | None = None
    ) -> TableState:
        """The state whose rows and slots, in the order of ids, are given: `whole`'s inverse."""
        ids = self.stored_ids()
        kept = [np.where(ids[:, None] >= 0, piece[np.maximum(ids, 0)], 0) for piece in pieces]
        state = TableState(
            rows=kept[0],
            slots=tuple(kept[1:]),
            step=np.int32(step),
            scratch=np.zeros(ids.shape[0], np.int32),
            key=jax.random.key_data(jax.random.key(0)) if key is None else key,
        )
        return jax.device_put(state, self.shardings)


@jax.jit
def _taken(rows: jax.Array, places: jax.Array) -> jax.Array:
    return rows[places]


def require_ids(ids: np.ndarray, rows: int, what: str) -> None:
    """Refuses ids that no row has; negative ones too.

    Raises:
      DataError: with the first of them and where it is.
    """
    bad = np.flatnonzero((ids.reshape(-1) < 0) | (ids.reshape(-1) >= rows))
    if bad.size:
        at = tuple(int(i) for i in np.unravel_index(bad[0], ids.shape)) if ids.ndim else ()
        raise DataError(
            f"{what} has rows 0 to {rows - 1}, but id {ids.reshape(-1)[bad[0]]} is asked for at "
            f"{list(at)} ({bad.size} of {ids.size} ids are outside); give the table "
            "more rows (model.rows), or map ids to rows (table.ids=mapped, `ps.IdMap`)"
        )


def device_grid(devices: Sequence[jax.Device], rows: int, columns: int) -> Mesh:
    """The mesh of a grid of row and column shards.

    Raises:
      PlanError: there are other than rows * columns devices.
    """
    if len(devices) != rows * columns:
        raise PlanError(
            f"a grid of {rows} x {columns} needs {rows * columns} devices, there are {len(devices)}"
        )
    array = np.empty(math.prod((rows, columns)), dtype=object)
    array[:] = devices
    return Mesh(array.reshape(rows, columns), (ROWS, COLUMNS))
