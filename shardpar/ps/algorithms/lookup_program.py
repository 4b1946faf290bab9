"""A training step of tables alone, whose gradients are a formula: pull, formula, push.

`ps.SparseProgram` differentiates any model. Where the whole model is a few products of rows,
writing the gradient down saves what differentiation keeps and the losses nobody looks at.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from shardpar.errors import PlanError
from shardpar.lowering.shardings import grid_sharding
from shardpar.ps.algorithms.embeddings import Progress
from shardpar.ps.algorithms.keeping import NOTHING, Keeper, Place
from shardpar.ps.asked import Call, HostFinder, Wanted
from shardpar.ps.exchange import COLUMNS, ROWS, Exchange, Route
from shardpar.ps.placement import Placement
from shardpar.ps.table import PlacedTable, Table, TableState, device_grid

Batch = Mapping[str, Any]
Rows = tuple[jax.Array, ...]
Formula = Callable[[Rows, Batch], tuple[Rows, jax.Array, jax.Array]]
"""From the rows of each lookup and the batch to the gradient of each lookup's rows, a sum of
losses, and how many losses that is. Padding gets zeros, and nobody takes its gradient."""

_EVERYWHERE = (ROWS, COLUMNS)
_STEPS_BETWEEN_REPORTS = 100


@dataclass(frozen=True)
class Lookup:
    """Ids of a batch, looked up in a table.

    Attributes:
      table: which, counted from 0.
      source: the batch's array of ids; negative ones are padding.
    """

    table: int
    source: str


class LookupProgram:
    """Tables and a formula, lowered to one program over all devices.

    Gradients are summed over the batch, not averaged: a table's learning rate is that of a
    single sample.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        lookups: Sequence[Lookup],
        formula: Formula,
        *,
        devices: Sequence[jax.Device] | None = None,
        placement: Placement | None = None,
        rate: optax.Schedule | None = None,
        rows_at_once: int | None = None,
    ) -> None:
        """Places the tables; nothing is compiled yet.

        Args:
          tables: what is learnt.
          lookups: what a step needs of them.
          formula: how it learns; sees a device's part of the batch.
          devices: None takes all.
          placement: of all tables; None deals rows over all devices.
          rate: scales the learning rates of a step, counted from 0.
          rows_at_once: of the batch, that go through the formula together, so that what is
            between stays in the processor's cache; a step's outcome is the same. None takes all.

        Raises:
          PlanError: the placement is not for so many devices.
        """
        self.devices = tuple(jax.devices() if devices is None else devices)
        placement = placement or Placement(rows=len(self.devices))
        grid = (placement.rows, placement.columns)
        if placement.replicated:
            grid = (len(self.devices), 1)
        self.mesh = device_grid(self.devices, *grid)
        self.tables = tuple(PlacedTable(table, placement, self.mesh) for table in tables)
        self._rows_at_once = rows_at_once
        self._lookups, self._formula = tuple(lookups), formula
        self._rate = rate or optax.constant_schedule(1.0)
        calls = tuple(Call(lookup.table, lookup.source, ()) for lookup in self._lookups)
        self._finder = HostFinder(
            calls,
            tuple(table.rows for table in tables),
            len(self.devices),
            (placement,) * len(tables),
        )

    def init(self, seed: int = 0) -> tuple[TableState, ...]:
        """Every table as it begins; its values depend on the seed only."""
        keys = jax.random.split(jax.random.key(seed), len(self.tables))
        return tuple(placed.init(key) for placed, key in zip(self.tables, keys, strict=True))

    def step(
        self, states: tuple[TableState, ...], batch: Mapping[str, np.ndarray]
    ) -> tuple[tuple[TableState, ...], dict[str, jax.Array]]:
        """One step; the old states are donated and must not be used again.

        Args:
          states: from `init` or `step`.
          batch: numpy arrays by name, dim 0 of each shared evenly by the devices.

        Returns:
          The new states; and "loss" and "weight", a sum and what it is divided by.

        Raises:
          DataError: an id is outside its table.
        """
        for name, array in batch.items():
            if array.shape[0] % len(self.devices):
                raise PlanError(
                    f"batch[{name!r}] has {array.shape[0]} rows, which {len(self.devices)} "
                    "devices do not share evenly; change the batch size"
                )
        wanted = self._finder(batch)
        used = {lookup.source for lookup in self._lookups}
        rest = {name: array for name, array in batch.items() if name not in used}
        return self._step(states, rest, wanted)

    @cached_property
    def _step(self) -> Callable[..., Any]:
        whole = grid_sharding(self.mesh, (), 0).spec
        split = grid_sharding(self.mesh, (_EVERYWHERE,), 1).spec
        states = tuple(
            jax.tree.map(lambda sharding: sharding.spec, placed.shardings) for placed in self.tables
        )
        local = jax.shard_map(
            self._local,
            mesh=self.mesh,
            in_specs=(states, split, split),
            out_specs=(states, whole),
            check_vma=False,
        )
        return jax.jit(local, donate_argnums=0)

    def _local(
        self, states: tuple[TableState, ...], batch: Batch, wanted: Wanted
    ) -> tuple[tuple[TableState, ...], dict[str, jax.Array]]:
        routes, pulled, found = [], [], []
        for index, (placed, state) in enumerate(zip(self.tables, states, strict=True)):
            ids = wanted.ids[index]
            exchange = placed.exchange(ids.shape[0], wanted.is_by_owner(index))
            route = exchange.route(ids)
            routes.append((exchange, route))
            rows, read = exchange.pull(state.rows, route)
            pulled.append(rows)
            found.append(read)
        gradients, total, weight = self._worked(pulled, batch, wanted)
        new = [
            self._pushed(placed, state, way, read, gradient)
            for placed, state, way, read, gradient in zip(
                self.tables, states, routes, found, gradients, strict=True
            )
        ]
        total, weight = lax.psum((total, weight), _EVERYWHERE)
        return tuple(new), {"loss": total, "weight": weight}

    def _worked(
        self, pulled: list[jax.Array], batch: Batch, wanted: Wanted
    ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """The gradients of the pulled rows, and the formula's two sums."""
        places = list(wanted.positions)

        def some(carry: Any, part: tuple[list[jax.Array], Batch]) -> tuple[Any, None]:
            sums, total, weight = carry
            places, batch = part
            rows = tuple(
                pulled[lookup.table].at[at].get(mode="promise_in_bounds")
                for lookup, at in zip(self._lookups, places, strict=True)
            )
            gradients, more, counted = self._formula(rows, batch)
            sums = list(sums)
            for lookup, at, gradient in zip(self._lookups, places, gradients, strict=True):
                flat = gradient.reshape(-1, gradient.shape[-1])
                sums[lookup.table] = (
                    sums[lookup.table].at[at.reshape(-1)].add(flat, mode="promise_in_bounds")
                )
            return (sums, total + more, weight + counted), None

        zeros = ([jnp.zeros_like(rows) for rows in pulled], jnp.float32(0), jnp.float32(0))
        length = places[0].shape[0]
        if self._rows_at_once is None or length <= self._rows_at_once:
            return some(zeros, (places, batch))[0]
        turns = length // math.gcd(length, self._rows_at_once)
        parts = jax.tree.map(lambda x: x.reshape(turns, -1, *x.shape[1:]), (places, batch))
        return lax.scan(some, zeros, parts)[0]

    def _pushed(
        self,
        placed: PlacedTable,
        state: TableState,
        way: tuple[Exchange, Route],
        found: jax.Array | None,
        gradient: jax.Array,
    ) -> TableState:
        exchange, route = way
        rule, rate = placed.table.optimizer, self._rate(state.step)

        def take(rows: Rows, gradient: jax.Array) -> Rows:
            new, slots = rule.update(rows[0], rows[1:], gradient, state.step + 1, rate)
            return (new, *slots)

        pieces, scratch = exchange.push(
            route, gradient, state.pieces, state.scratch, take, found=found
        )
        return TableState(pieces[0], pieces[1:], state.step + 1, scratch, state.key)


def trained(
    program: LookupProgram,
    seed: int,
    passes: Iterable[Iterable[Mapping[str, np.ndarray]]],
    steps: int,
    progress: Progress,
    keeper: Keeper = NOTHING,
    part: int = 0,
    batch_size: int = 0,
) -> tuple[tuple[TableState, ...], tuple[float, ...]]:
    """Runs a program over the batches of each pass.

    Args:
      program: fresh.
      seed: of its tables.
      passes: of each, its batches.
      steps: about how many there are in all, for progress.
      progress: called every hundred steps, and after each pass.
      keeper: where it begins, and what becomes of its state now and then.
      part: which of an algorithm's programs this is, counted from 0.
      batch_size: of a step, whose streams of batches differ by it.

    Returns:
      The tables, and the mean loss of each pass; NaN where nothing was weighed.

    Raises:
      StoppedError: the keeper wants no more.
    """
    states, begun = keeper.begin(program, seed, part, steps, batch_size)
    done, losses = begun.done, list(begun.losses)
    for number, batches in enumerate(passes):
        coming = iter(batches)
        if number < len(begun.losses):
            # Whatever is drawn for a pass comes from where the one before ended.
            deque(coming, maxlen=0)
            continue
        goes_on = number == len(begun.losses)
        skipped = begun.in_pass if goes_on else 0
        sums = np.array(begun.sums if goes_on else (0.0, 0.0))
        deque(islice(coming, skipped), maxlen=0)
        lately = _Lately()
        for in_pass, batch in enumerate(coming, skipped + 1):
            states, now = program.step(states, batch)
            lately.add(now)
            done += 1
            if done % _STEPS_BETWEEN_REPORTS == 0:
                seen = lately.taken()
                sums = sums + seen
                progress(done, max(done, steps), float(seen[0] / max(seen[1], 1)))
            if keeper.wants(done):
                sums = sums + lately.taken()
                at = Place(part, done, in_pass, tuple(losses), (float(sums[0]), float(sums[1])))
                keeper.take(program, states, at)
        sums = sums + lately.taken()
        losses.append(float(sums[0] / sums[1]) if sums[1] else float("nan"))
        progress(done, max(done, steps), losses[-1])
    return states, tuple(losses)


class _Lately:
    """Losses and weights of steps that may still be under way on the devices."""

    def __init__(self) -> None:
        self._metrics: list[tuple[jax.Array, jax.Array]] = []

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        self._metrics.append((metrics["loss"], metrics["weight"]))

    def taken(self) -> np.ndarray:
        """Their sums, float64[2]; those of what comes after are new ones."""
        taken, self._metrics = self._metrics, []
        return np.sum(jax.device_get(taken), axis=0, dtype=np.float64) if taken else np.zeros(2)
