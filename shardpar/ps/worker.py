"""A worker: the same model and loss as in `ps.program`, with rows and parameters from servers.

One jitted program takes the rows of a step and gives their gradients; what is pulled before
and pushed after is numpy. A worker keeps nothing between steps that it could not get again:
its batch follows from its number and the step, its random numbers too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shardpar.capture.model import Init, Loss, abstract_model, loss_and_weight
from shardpar.errors import DataError, PlanError
from shardpar.ps.asked import Batch, HostFinder, Wanted, blank, calls_of, lend
from shardpar.ps.client import Rows
from shardpar.ps.embed import Embed, tables_of
from shardpar.ps.table import Table

Data = Callable[[int, int], Mapping[str, np.ndarray]]
"""From a worker and its step to the batch: the same whenever it is asked."""


@dataclass(frozen=True)
class Beginning:
    """A model's state before any step, as numpy arrays.

    Attributes:
      dense: parameters by path, for the servers.
      rest: other variables by path, for the workers.
      keys: from which the rows of each table begin.
    """

    dense: dict[str, np.ndarray]
    rest: dict[str, Any]
    keys: dict[str, np.ndarray]


@dataclass(frozen=True)
class Gradients:
    """Of a batch, summed over its samples.

    Attributes:
      loss, weight: its sum, and over what.
      dense: by path.
      rows: by table, (ids, float32[n, dim]).
    """

    loss: float
    weight: float
    dense: dict[str, np.ndarray]
    rows: dict[str, tuple[np.ndarray, np.ndarray]]


class WorkerProgram:
    """A model with tables, as a worker runs it.

    Args:
      loss: `loss(model, batch)` returns a scalar mean, or (sum, weight), as everywhere.
      init: `init(rngs)` makes the Flax model.
      batch: arrays or shapes of one worker's batch, by name.

    Attributes:
      tables: by path of their layer.

    Raises:
      PlanError: the model has no table, computes ids itself, or keeps running averages.
      CaptureError: the model cannot be traced.
    """

    def __init__(self, loss: Loss, init: Init, *, batch: Batch) -> None:
        self._loss = loss
        self.model = abstract_model(init)
        named = tables_of(self.model.merge(self.model.params, self.model.rest))
        if not named:
            raise PlanError("the model has no `ps.Embed` layer; train it with `shardpar.compile`")
        self.tables: dict[str, Table] = {name: layer.table for name, layer in named}
        self._names = tuple(self.tables)
        self._hidden = tuple(f"{name}.{part}" for name in self._names for part in ("rows", "key"))
        self._kept = {n: x for n, x in self.model.rest.items() if n not in self._hidden}
        averages = [n for n, x in self._kept.items() if jnp.issubdtype(x.dtype, jnp.floating)]
        if averages:
            raise PlanError(
                f"the model keeps running values in {averages[0]}, which workers with servers do "
                "not share; use a layer without them, such as LayerNorm, or train with "
                "`SparseProgram`"
            )
        self._shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in batch.items()}
        self._calls = calls_of(self._zeros, loss, self._shapes)
        if any(call.source is None for call in self._calls):
            raise PlanError(
                "the model computes ids itself, but a worker must know them before its step: "
                "give them in the batch, or train with `SparseProgram`"
            )
        limits = tuple(table.rows for table in self.tables.values())
        self._finder = HostFinder(self._calls, limits, 1)

    def begin(self, seed: int) -> Beginning:
        """The state that `SparseProgram.init` gives for the same seed; rows are born later."""

        def create(seed: jax.Array) -> tuple[Any, ...]:
            dense, rest = self.model.create(seed)
            keys = {name: rest[f"{name}.key"] for name in self._names}
            return dense, {name: rest[name] for name in self._kept}, keys

        dense, rest, keys = jax.jit(create)(jnp.uint32(seed))
        as_numpy = lambda arrays: {name: np.asarray(x) for name, x in arrays.items()}  # noqa: E731
        data = {n: jax.random.key_data(x) if _is_key(x) else x for n, x in rest.items()}
        return Beginning(as_numpy(dense), as_numpy(data), as_numpy(keys))

    def wanted(self, batch: Mapping[str, np.ndarray]) -> Wanted:
        """The distinct ids of a batch, and where each lookup finds its row among them.

        Raises:
          DataError: an id is outside its table, or the batch has other arrays.
        """
        if set(batch) != set(self._shapes):
            raise DataError(
                f"the batch has {sorted(batch)}, the program was made for {sorted(self._shapes)}"
            )
        return self._finder(batch)

    def ids(self, wanted: Wanted) -> dict[str, np.ndarray]:
        """The distinct ids by table, int64[n], without the padding."""
        return {
            name: ids[ids >= 0].astype(np.int64)
            for name, ids in zip(self._names, wanted.ids, strict=True)
        }

    def gradients(
        self,
        dense: Mapping[str, np.ndarray],
        rest: Mapping[str, Any],
        rows: Mapping[str, np.ndarray],
        batch: Mapping[str, np.ndarray],
        wanted: Wanted,
        *,
        worker: int,
        step: int,
    ) -> Gradients:
        """What a batch says about parameters and rows.

        Args:
          dense: parameters, by path.
          rest: other variables, by path.
          rows: of `ids(wanted)`, in that order.
          batch: of the step.
          wanted: of the batch.
          worker: whose random numbers it takes.
          step: likewise.
        """
        (total, weight), (dense_gradient, found) = self._program(
            dict(dense), dict(rest), self._padded(rows, wanted), wanted.positions, dict(batch),
            np.uint32(worker), np.uint32(step),
        )  # fmt: skip
        ids = self.ids(wanted)
        return Gradients(
            float(total), float(weight),
            {name: np.asarray(g) for name, g in dense_gradient.items()},
            {n: (ids[n], np.asarray(g)[: ids[n].size])
             for n, g in zip(self._names, found, strict=True)},
        )  # fmt: skip

    def apply(
        self, dense: Mapping[str, Any], rest: Mapping[str, Any], rows: Mapping[str, np.ndarray],
        batch: Mapping[str, np.ndarray], wanted: Wanted, run: Callable[[Any, Batch], Any],
    ) -> Any:  # fmt: skip
        """What `run(model, batch)` gives with these rows, as `SparseProgram.apply` does.

        Args:
          dense: parameters, by path.
          rest: other variables, by path.
          rows: of `ids(wanted)`, in that order.
          batch: of a worker's shapes.
          wanted: of the batch.
          run: a function with a name that lasts: programs are kept by it.
        """
        if run not in self._applied:

            def applied(dense: Any, rest: Any, pulled: Any, positions: Any, batch: Any) -> Any:
                model = self._lent(dense, self._random(rest, 0, 0), pulled, positions)
                model.eval()
                return run(model, batch)

            self._applied[run] = jax.jit(applied)
        pulled = self._padded(rows, wanted)
        return self._applied[run](dict(dense), dict(rest), pulled, wanted.positions, dict(batch))

    def evaluate(self, model: nnx.Module, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """A batch's loss as (sum, weight); a `run` for `apply`."""
        return loss_and_weight(self._loss(model, batch), next(iter(batch.values())).shape[0])

    @cached_property
    def _applied(self) -> dict[Any, Callable[..., Any]]:
        return {}

    def _padded(self, rows: Mapping[str, np.ndarray], wanted: Wanted) -> tuple[np.ndarray, ...]:
        pulled = []
        for name, ids in zip(self._names, wanted.ids, strict=True):
            padded = np.zeros((ids.size, self.tables[name].dim), np.float32)
            padded[: rows[name].shape[0]] = rows[name]
            pulled.append(padded)
        return tuple(pulled)

    @cached_property
    def _program(self) -> Callable[..., Any]:
        def run(
            dense: Any, rest: Any, pulled: Any, positions: Any, batch: Any, worker: Any, step: Any
        ) -> Any:
            rest = self._random(rest, worker, step)
            samples = next(iter(batch.values())).shape[0]

            def objective(dense: Any, pulled: Any) -> tuple[jax.Array, jax.Array]:
                model = self._lent(dense, rest, pulled, positions)
                return loss_and_weight(self._loss(model, batch), samples)

            return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(dense, pulled)

        return jax.jit(run)

    def _random(self, rest: Mapping[str, Any], worker: Any, step: Any) -> dict[str, Any]:
        """Other variables, with keys that no other worker or step has."""
        out = {}
        for name, x in rest.items():
            if _is_key(self._kept[name]):
                key = jax.random.wrap_key_data(jnp.asarray(x))
                out[name] = jax.random.fold_in(jax.random.fold_in(key, worker), step)
            else:
                out[name] = jnp.asarray(x)
        return out

    def _lent(self, dense: Any, rest: Any, pulled: Any, positions: Any) -> nnx.Module:
        model, layers = self._made(dense, rest)
        lend(layers, pulled, Wanted((), positions), tuple(call.table for call in self._calls))
        return model

    def _made(self, dense: Any, rest: Any) -> tuple[nnx.Module, list[Embed]]:
        """The model, with arrays of no rows in the place of tables."""
        hidden = {
            name: jnp.zeros((0, *self.model.rest[name].shape[1:]), self.model.rest[name].dtype)
            for name in self._hidden
        }
        model = self.model.merge(dense, {**rest, **hidden})
        return model, [layer for _, layer in tables_of(model)]

    def _zeros(self) -> tuple[nnx.Module, list[Embed]]:
        return self._made(
            jax.tree.map(blank, self.model.params), jax.tree.map(blank, dict(self._kept))
        )


@dataclass
class Worker:
    """Runs steps: pulls, takes gradients, pushes.

    Attributes:
      number: which worker this is.
      program: of the model.
      rest: the model's other variables.
      rows: the servers, or a cache before them.
      data: gives the batch of a step.
    """

    number: int
    program: WorkerProgram
    rest: Mapping[str, Any]
    rows: Rows
    data: Data

    def run(self, step: int) -> Gradients:
        """One step; when it returns, all servers have acknowledged it."""
        batch = self.data(self.number, step)
        wanted = self.program.wanted(batch)
        rows, dense = self.rows.pull(self.program.ids(wanted))
        found = self.program.gradients(
            dense, self.rest, rows, batch, wanted, worker=self.number, step=step
        )
        self.rows.push(
            step, found.rows, weight=found.weight, loss=found.loss, dense=found.dense
        )  # fmt: skip
        return found


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
