"""A Flax model with tables becomes a training step: dense parameters everywhere, rows sharded.

One jitted program over a grid of devices. Each device has its part of the batch; it pulls
the rows that its part asks for, takes gradients with respect to those rows alone, and pushes
them to the rows' owners, who apply the table's rule. Gradients of a step are summed over all
samples and divided once by the global weight, so the result does not depend on the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from shardpar.capture.model import AbstractModel, Init, Loss, abstract_model, loss_and_weight
from shardpar.errors import DataError, PlanError
from shardpar.lowering.shardings import grid_sharding, replicated
from shardpar.ps.asked import (
    Batch,
    Call,
    HostFinder,
    Wanted,
    blank,
    calls_of,
    found_in_program,
    lend,
    recorded,
)
from shardpar.ps.dedup import rounded_size
from shardpar.ps.embed import Embed, tables_of
from shardpar.ps.exchange import COLUMNS, ROWS, Exchange, Route
from shardpar.ps.placement import Placement, placement_of
from shardpar.ps.table import PlacedTable, TableState, device_grid

_EVERYWHERE = (ROWS, COLUMNS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseState:
    """All that training changes.

    Attributes:
      dense, rest: the model's parameters and other variables, by path.
      optimizer: optax's state for `dense`.
      tables: by path of their layer.
      step: int32.
    """

    dense: dict[str, jax.Array]
    rest: dict[str, jax.Array]
    optimizer: Any
    tables: dict[str, TableState]
    step: jax.Array


@dataclass(frozen=True)
class SparseOptions:
    """How tables are laid out and asked.

    Attributes:
      placements: of each table by path, or one for all; None deals rows over all devices.
      capacity: rows that a device asks of an owner in one round; None takes twice the mean
        of what a batch may ask for, which one round holds but for very skewed ids.
      find: where distinct ids are found; "auto" is the host where ids come straight from
        the batch.
      skip_nonfinite: leave the state as it is when a step's loss is not finite.
      ragged: only the rows that are asked for travel between devices, by XLA's ragged
        all-to-all, instead of equal parts; None does so on TPUs. XLA on CPUs has none.
    """

    placements: Mapping[str, Placement] | Placement | None = None
    capacity: int | None = None
    find: str = "auto"
    skip_nonfinite: bool = True
    ragged: bool | None = None


class SparseProgram:
    """A model with tables, lowered.

    Attributes:
      model: the model's structure.
      tables: its tables on devices, by path of their layer.
      calls: its lookups, in order.
    """

    def __init__(
        self,
        loss: Loss,
        init: Init,
        optimizer: optax.GradientTransformation,
        *,
        batch: Batch,
        devices: Sequence[jax.Device] | None = None,
        options: SparseOptions = SparseOptions(),
        rate: optax.Schedule | None = None,
    ) -> None:
        """Traces the model; nothing is compiled yet.

        Args:
          loss: `loss(model, batch)` returns a scalar mean, or (sum, weight).
          init: `init(rngs)` makes the Flax model.
          optimizer: optax's rule for everything but the tables.
          batch: arrays or shapes of a global batch, by name, dim 0 counting samples.
          devices: None takes all.
          options: layouts of the tables.
          rate: scales the tables' learning rates at each step; None leaves them.

        Raises:
          PlanError: a placement does not fit, or the batch does not divide.
          CaptureError: the model cannot be traced.
        """
        self._loss, self._optimizer = loss, optimizer
        self._rate = rate or optax.constant_schedule(1.0)
        self.options = options
        self.devices = tuple(jax.devices() if devices is None else devices)
        if options.ragged and any(device.platform == "cpu" for device in self.devices):
            raise PlanError(
                "XLA on CPUs has no ragged all-to-all; leave ragged (table.ragged) out, or write "
                "false"
            )
        self.model: AbstractModel = abstract_model(init, may_be_empty=True)
        named = tables_of(self.model.merge(self.model.params, self.model.rest))
        if not named:
            raise PlanError("the model has no `ps.Embed` layer; train it with `shardpar.compile`")
        self._names = tuple(name for name, _ in named)
        count = len(self.devices)
        placements = [placement_of(options.placements, name, count) for name in self._names]
        grids = {(p.rows, p.columns) for p in placements if not p.replicated}
        if len(grids) > 1:
            raise PlanError(
                f"tables lie on grids of {sorted(grids)} devices; give all the same rows and "
                "columns, or replicate some"
            )
        rows, columns = grids.pop() if grids else (len(self.devices), 1)
        self.mesh = device_grid(self.devices, rows, columns)
        self.tables = {
            name: PlacedTable(layer.table, placement, self.mesh)
            for (name, layer), placement in zip(named, placements, strict=True)
        }
        self._batch = {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in batch.items()
        }
        self._require_divisible(self._batch)
        self._hidden = tuple(f"{name}.{part}" for name in self._names for part in ("rows", "key"))
        local = {
            name: jax.ShapeDtypeStruct((x.shape[0] // len(self.devices), *x.shape[1:]), x.dtype)
            for name, x in self._batch.items()
        }
        dense, rest = self._shapes
        zeros = jax.tree.map(blank, rest)
        make = lambda: self._made(  # noqa: E731
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dense), zeros
        )
        self.calls: tuple[Call, ...] = calls_of(make, loss, local)
        self._on_host = options.find != "program" and all(
            call.source is not None for call in self.calls
        )
        if options.find == "host" and not self._on_host:
            raise PlanError(
                "find='host' needs ids that come straight from the batch, but the model computes "
                "some; use find='auto'"
            )
        limits = tuple(self.tables[name].table.rows for name in self._names)
        self._finding = Lock()
        self._finder = HostFinder(
            self.calls,
            limits,
            len(self.devices),
            tuple(self.tables[name].placement for name in self._names),
            options.capacity,
        )

    @cached_property
    def _shapes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        kept = {name: x for name, x in self.model.rest.items() if name not in self._hidden}
        return self.model.params, kept

    @property
    def finds_on_host(self) -> bool:
        """Whether distinct ids are found before a step, so that it is known what it touches."""
        return self._on_host

    @cached_property
    def state_shapes(self) -> SparseState:
        """Shapes, dtypes and shardings of everything but the tables, which are empty."""
        whole = replicated(self.mesh)
        dense, rest = self._shapes
        shapes = (dense, rest, jax.eval_shape(self._optimizer.init, dense))
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes
        )
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        return SparseState(placed[0], placed[1], placed[2], {}, step)

    def init(self, seed: int = 0) -> SparseState:
        """A fresh state, born sharded; its values depend on the seed only."""
        whole = replicated(self.mesh)

        def begin(seed: jax.Array) -> tuple[Any, ...]:
            dense, rest = self.model.create(seed)
            keys = {name: rest[f"{name}.key"] for name in self._names}
            kept = {name: x for name, x in rest.items() if name not in self._hidden}
            return dense, kept, self._optimizer.init(dense), keys

        dense, rest, optimizer, keys = jax.jit(begin, out_shardings=whole)(jnp.uint32(seed))
        tables = {
            name: placed.init(jax.random.wrap_key_data(keys[name]))
            for name, placed in self.tables.items()
        }
        return SparseState(dense, rest, optimizer, tables, jax.device_put(jnp.int32(0), whole))

    def renew(self, state: SparseState, name: str, rows: np.ndarray) -> SparseState:
        """Lets rows of a table begin anew, as `init` made them; for rows that changed hands.

        Args:
          state: donated; use the one that is returned.
          name: path of the table's layer.
          rows: int[n], no row twice.

        Raises:
          DataError: a row is not in the table.
        """
        placed = self.tables[name]
        places = np.full(rounded_size(rows.size), placed.stored_rows, np.int32)
        places[: rows.size] = placed.stored_places(rows)
        ids = np.zeros(places.size, np.int32)
        ids[: rows.size] = rows
        table = self._renew(name)(state.tables[name], places, ids)
        return replace(state, tables={**state.tables, name: table})

    def _renew(self, name: str) -> Callable[..., TableState]:
        placed = self.tables[name]

        def begin(state: TableState, places: jax.Array, ids: jax.Array) -> TableState:
            fresh = placed.table.init(jax.random.wrap_key_data(state.key), ids, placed.table.dim)
            firsts = [first for _, first in placed.table.optimizer.slots(placed.table.dim)]
            return replace(
                state,
                rows=state.rows.at[places].set(fresh, mode="drop", unique_indices=True),
                slots=tuple(
                    slot.at[places].set(first, mode="drop")
                    for slot, first in zip(state.slots, firsts, strict=True)
                ),
            )

        kept = self._programs
        if ("renew", name) not in kept:
            kept["renew", name] = jax.jit(begin, donate_argnums=0, out_shardings=placed.shardings)
        return kept["renew", name]

    def step(
        self, state: SparseState, batch: Mapping[str, Any]
    ) -> tuple[SparseState, dict[str, jax.Array]]:
        """One step; the old state is donated and must not be used again.

        Args:
          state: from `init` or `step`.
          batch: numpy arrays by name, of the global batch.

        Returns:
          The new state; and "loss", "weight", "rounds" (of exchange, 1 unless the capacity
          did not do) and "ids_outside" (counted where the program finds ids).

        Raises:
          DataError: an id is outside its table, or the batch has other arrays than the one
            the program was made for.
        """
        return self.take(state, *self.prepared(batch))

    def take(
        self, state: SparseState, batch: dict[str, Any], wanted: Wanted | None
    ) -> tuple[SparseState, dict[str, jax.Array]]:
        """`step`, of what `prepared` gave."""
        return self._step(state, batch, wanted)

    def prepared(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Wanted | None]:
        """What a step takes besides the state; may run ahead, in another thread."""
        if set(batch) != set(self._batch):
            raise DataError(
                f"the batch has {sorted(batch)}, the program was made for {sorted(self._batch)}"
            )
        self._require_divisible(batch)
        if not self._on_host:
            return dict(batch), None
        # The next batch may be prepared while another is evaluated.
        with self._finding:
            return dict(batch), self._finder(batch)

    def evaluate(self, state: SparseState, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The loss of a batch, {"loss", "weight"}; the state stays."""
        total, weight = self.apply(state, batch, self._summed)
        return {"loss": total.sum() / weight.sum(), "weight": weight.sum()}

    def apply(
        self, state: SparseState, batch: Mapping[str, Any], run: Callable[[Any, Batch], Any]
    ) -> Any:
        """What `run(model, batch)` gives for each sample, such as a prediction.

        The model is as `model.eval()` leaves it: without dropout, with running averages.

        Args:
          state: from `init` or `step`; it stays.
          batch: as for `step`.
          run: a function with a name that lasts: programs are kept by it. It sees a part of
            the batch, looks up what the loss does in the same order, and returns arrays
            whose dim 0 counts samples, or scalars, of which one per device comes back.
        """
        return self._applied(run)(state, *self.prepared(batch))

    def _applied(self, run: Callable[[Any, Batch], Any]) -> Callable[..., Any]:
        kept = self._programs
        if run not in kept:
            kept[run] = self._apply_program(run)
        return kept[run]

    @cached_property
    def _programs(self) -> dict[Any, Callable[..., Any]]:
        return {}

    @cached_property
    def _step(self) -> Callable[..., Any]:
        return jax.jit(self._sharded(self._local_step, training=True), donate_argnums=0)

    def _apply_program(self, run: Callable[[Any, Batch], Any]) -> Callable[..., Any]:
        def local(state: SparseState, batch: Batch, wanted: Wanted | None) -> Any:
            wanted, _ = self._wanted(state, batch, wanted, run)
            pulled = tuple(
                self._pulled(index, state, wanted)[0][0] for index in range(len(self._names))
            )
            model, _ = self._lent(state.dense, state.rest, pulled, wanted)
            model.eval()
            return jax.tree.map(lambda x: jnp.atleast_1d(jnp.asarray(x)), run(model, batch))

        return jax.jit(self._sharded(local, training=False))

    def _sharded(self, local: Callable[..., Any], *, training: bool) -> Callable[..., Any]:
        """Runs a function on every device, with its pieces of the tables and of the batch."""
        whole = grid_sharding(self.mesh, (), 0).spec
        split = grid_sharding(self.mesh, (_EVERYWHERE,), 1).spec
        state = SparseState(
            dense=whole,
            rest=whole,
            optimizer=whole,
            tables={
                name: jax.tree.map(lambda sharding: sharding.spec, placed.shardings)
                for name, placed in self.tables.items()
            },
            step=whole,
        )
        out = (state, whole) if training else split
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(state, split, split),
            out_specs=out,
            check_vma=False,
        )

    def _local_step(
        self, state: SparseState, batch: Batch, wanted: Wanted | None
    ) -> tuple[SparseState, dict[str, jax.Array]]:
        wanted, outside = self._wanted(state, batch, wanted, self._loss)
        got = [self._pulled(index, state, wanted) for index in range(len(self._names))]

        def objective(dense: Any, pulled: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
            model, _ = self._lent(dense, self._own_keys(state.rest), pulled, wanted)
            total, weight = self._summed(model, batch)
            _, rest = self.model.split(model)
            return total, (weight, {name: rest[name] for name in state.rest})

        pulled = tuple(rows for (rows, _), _, _ in got)
        (total, (weight, rest)), gradients = jax.value_and_grad(
            objective, argnums=(0, 1), has_aux=True
        )(state.dense, pulled)
        total, weight, dense_gradient = lax.psum((total, weight, gradients[0]), _EVERYWHERE)
        scale = 1 / jnp.where(weight == 0, 1, weight)
        loss = total * scale
        fine = jnp.isfinite(loss) if self.options.skip_nonfinite else jnp.bool_(True)
        dense_gradient = jax.tree.map(lambda g: g * scale.astype(g.dtype), dense_gradient)
        updates, optimizer = self._optimizer.update(dense_gradient, state.optimizer, state.dense)
        dense = optax.apply_updates(state.dense, updates)
        kept = jax.tree.map(
            lambda new, old: jnp.where(fine, new, old),
            (dense, optimizer, self._agreed(rest, state.rest)),
            (state.dense, state.optimizer, state.rest),
        )
        tables = {
            name: self._pushed(name, state, got[index], gradients[1][index] * scale, fine)
            for index, name in enumerate(self._names)
        }
        rounds = jnp.stack([jnp.asarray(route.rounds, jnp.int32) for *_, route in got]).max()
        new = SparseState(kept[0], kept[2], kept[1], tables, state.step + 1)
        return new, {
            "loss": loss,
            "weight": weight,
            "rounds": rounds,
            "ids_outside": outside,
        }

    def _summed(self, model: nnx.Module, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The loss as a sum and a weight."""
        return loss_and_weight(self._loss(model, batch), next(iter(batch.values())).shape[0])

    def _wanted(
        self,
        state: SparseState,
        batch: Batch,
        wanted: Wanted | None,
        run: Callable[[Any, Batch], Any],
    ) -> tuple[Wanted, jax.Array]:
        if wanted is not None:
            return wanted, jnp.int32(0)
        asked = recorded(lambda: self._made(state.dense, state.rest), run, batch)
        rows = tuple(self.tables[name].table.rows for name in self._names)
        wanted, outside = found_in_program(asked, rows)
        return wanted, lax.psum(outside, _EVERYWHERE)

    def _pulled(
        self, index: int, state: SparseState, wanted: Wanted
    ) -> tuple[tuple[jax.Array, jax.Array | None], Exchange, Route]:
        """What `Exchange.pull` gives of a table for a step, and the way it came."""
        name = self._names[index]
        placed, ids = self.tables[name], wanted.ids[index]
        exchange = placed.exchange(
            ids.shape[0],
            wanted.is_by_owner(index),
            capacity=self.options.capacity,
            ragged=self.options.ragged,
        )
        route = exchange.route(ids)
        return exchange.pull(state.tables[name].rows, route), exchange, route

    def _pushed(
        self,
        name: str,
        state: SparseState,
        got: tuple[tuple[jax.Array, jax.Array | None], Exchange, Route],
        gradient: jax.Array,
        fine: jax.Array,
    ) -> TableState:
        (_, found), exchange, route = got
        old, rule = state.tables[name], self.tables[name].table.optimizer
        rate = self._rate(state.step)

        def take(rows: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
            new, slots = rule.update(rows[0], rows[1:], gradient, old.step + 1, rate)
            return (new, *slots)

        pieces, scratch = exchange.push(
            route, gradient, old.pieces, old.scratch, take, found=found, take=fine
        )
        step = jnp.where(fine, old.step + 1, old.step)
        return TableState(pieces[0], pieces[1:], step, scratch, old.key)

    def _made(self, dense: Any, rest: Any) -> tuple[nnx.Module, list[Embed]]:
        """The model, with arrays of no rows in the place of tables."""
        hidden = {
            name: jnp.zeros((0, *self.model.rest[name].shape[1:]), self.model.rest[name].dtype)
            for name in self._hidden
        }
        model = self.model.merge(dense, {**rest, **hidden})
        return model, [layer for _, layer in tables_of(model)]

    def _lent(
        self, dense: Any, rest: Any, pulled: tuple[jax.Array, ...], wanted: Wanted
    ) -> tuple[nnx.Module, list[Embed]]:
        model, layers = self._made(dense, rest)
        lend(layers, pulled, wanted, tuple(call.table for call in self.calls))
        return model, layers

    def _own_keys(self, rest: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Random keys of this device alone, so that no two drop the same units."""
        place = lax.axis_index(_EVERYWHERE)
        return {name: x if _plain(x) else jax.random.fold_in(x, place) for name, x in rest.items()}

    def _agreed(self, new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
        """Other variables after a step: keys as they were, statistics averaged."""
        return {
            name: old[name]
            if not _plain(x)
            else (lax.pmean(x, _EVERYWHERE) if jnp.issubdtype(x.dtype, jnp.floating) else x)
            for name, x in new.items()
        }

    def _require_divisible(self, batch: Mapping[str, Any]) -> None:
        for name, value in batch.items():
            if value.shape[0] % len(self.devices):
                fits = max(1, round(value.shape[0] / len(self.devices))) * len(self.devices)
                raise PlanError(
                    f"batch[{name!r}] has {value.shape[0]} samples, which {len(self.devices)} "
                    f"devices do not share evenly; change the batch size (train.global_batch="
                    f"{fits}), or fill the last batch with samples of weight 0"
                )


def _plain(x: Any) -> bool:
    return not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
