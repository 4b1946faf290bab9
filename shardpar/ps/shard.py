"""A shard of all tables in memory: gives rows, takes updates, and knows which it has had.

The shape is Angel's (Jiang et al., "Angel: a new large-scale machine learning system",
2018): rows and the slots of their optimizer lie together, and the rule runs where they are.
What makes a shard outlive its process is in `ps.server`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax

from shardpar.errors import DataError, PlanError, RunError
from shardpar.ps.consistency import BSP, Consistency, delay_scale
from shardpar.ps.messages import (
    FreshRows,
    Position,
    Pulled,
    PullRequest,
    Push,
    RowsUpdate,
    push_bytes,
    push_from_bytes,
)
from shardpar.ps.placement import Placement
from shardpar.ps.stored import Rules, StoredRows
from shardpar.ps.table import Table


@dataclass(frozen=True)
class Dense:
    """The parameters that are not rows: whole, on one server, under optax.

    Attributes:
      parameters: by path, as they begin.
      optimizer: optax's rule.
    """

    parameters: Mapping[str, np.ndarray]
    optimizer: optax.GradientTransformation


@dataclass(frozen=True)
class ShardSpec:
    """What a server holds, as a value.

    Attributes:
      tables: by path of their layer.
      keys: data of the jax.random key that each table's rows begin from.
      placement: how rows are dealt to servers; its rows are the number of servers.
      index: which of them this is.
      workers: how many push.
      consistency: in lockstep, a step's pushes are summed over workers and taken together;
        otherwise each is taken when it comes.
      dense: what else this server holds, or None.
      rate: scales the tables' learning rates by a worker's step; None leaves them.
      delay_scaled: divide updates by how many rounds old their rows were; not in lockstep.
    """

    tables: Mapping[str, Table]
    keys: Mapping[str, np.ndarray]
    placement: Placement = field(default_factory=Placement)
    index: int = 0
    workers: int = 1
    consistency: Consistency = BSP
    dense: Dense | None = None
    rate: optax.Schedule | None = None
    delay_scaled: bool = False

    def __post_init__(self) -> None:
        if self.placement.columns > 1 or self.placement.replicated:
            raise PlanError(
                f"servers hold whole rows, each of them once, but the placement is "
                f"'{self.placement.text()}'; use Placement(rows=servers)"
            )
        if not 0 <= self.index < self.placement.rows or self.workers < 1:
            raise PlanError(
                f"server {self.index} of {self.placement.rows} for {self.workers} workers: "
                "servers count from 0, and there is at least 1 worker"
            )

    def text(self) -> str:
        """What must not change between two starts over one directory."""
        tables = {name: (t.rows, t.dim, repr(t.optimizer)) for name, t in self.tables.items()}
        return (
            f"server {self.index} of {self.placement.rows} ({self.placement.text()}), "
            f"{self.workers} workers, {self.consistency.text()}, "
            f"tables {dict(sorted(tables.items()))}, "
            f"keys {[np.asarray(self.keys[name]).tolist() for name in sorted(tables)]}"
        )


class DenseParameters:
    """Dense parameters and optax's state, updated on the server."""

    def __init__(self, dense: Dense) -> None:
        self.parameters = {name: np.asarray(x) for name, x in dense.parameters.items()}
        self._optimizer = dense.optimizer
        self._state = jax.jit(dense.optimizer.init)(self.parameters)

    def take(self, gradients: Mapping[str, np.ndarray], scale: float, factor: float) -> None:
        """One step: the gradients times `scale`, their update times `factor`."""
        given = (dict(gradients), self._state, self.parameters)
        new, self._state = self._step(*given, np.float32(scale), np.float32(factor))
        self.parameters = {name: np.asarray(x) for name, x in new.items()}

    def arrays(self) -> dict[str, Any]:
        """For a snapshot."""
        return {
            "parameters": self.parameters,
            "optimizer": [np.asarray(leaf) for leaf in jax.tree.leaves(self._state)],
        }

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """The inverse of `arrays`."""
        self.parameters = dict(arrays["parameters"])
        self._state = jax.tree.unflatten(jax.tree.structure(self._state), arrays["optimizer"])

    @cached_property
    def _step(self) -> Callable[..., Any]:
        def run(gradients: Any, state: Any, parameters: Any, scale: Any, factor: Any) -> Any:
            scaled = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
            updates, state = self._optimizer.update(scaled, state, parameters)
            updates = jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)
            return optax.apply_updates(parameters, updates), state

        return jax.jit(run)


class Shard:
    """Rows, dense parameters and the updates they have had.

    Attributes:
      spec: what it holds.
      tables: rows by table.
      dense: the other parameters, where this shard has them.
      taken: updates so far; in lockstep, of whole steps.
      duplicates: pushes that came again and were left alone.
      skipped: updates left out since their loss was not finite.
    """

    def __init__(self, spec: ShardSpec) -> None:
        self.spec = spec
        self.tables = {
            name: StoredRows(Rules(table, np.asarray(spec.keys[name])), spec.placement, spec.index)
            for name, table in sorted(spec.tables.items())
        }
        self.dense = DenseParameters(spec.dense) if spec.dense is not None else None
        self.taken = self.duplicates = self.skipped = 0
        # The last one is who calls functions: it pushes nothing.
        self._positions = [Position()] * (spec.workers + 1)
        self._waiting: dict[int, Push] = {}

    def position(self, worker: int) -> Position:
        """What a worker has pushed so far; `spec.workers` stands for who calls functions."""
        self._require_worker(worker)
        return self._positions[worker]

    def pull(self, request: PullRequest) -> Pulled:
        """Rows whose copies are too old for the request's bound, and all that have no copy.

        Raises:
          DataError: an id is not of this shard.
        """
        rows = {}
        for name, asked in request.rows.items():
            stored = self._table(name)
            stored.require(asked.ids, f"a pull from table {name!r}")
            at = stored.at(asked.ids)
            positions = np.arange(at.size)
            if asked.versions is not None:
                lacking = stored.versions(at) - asked.versions
                positions = np.flatnonzero((asked.versions < 0) | (lacking > asked.bound))
            pieces, versions = stored.read(at[positions], slots=asked.slots)
            rows[name] = FreshRows(positions, pieces, versions)
        dense = dict(self.dense.parameters) if request.dense and self.dense else {}
        return Pulled(rows, dense, self.taken)

    def get(self, table: str, run: Callable[[Any, Any], Any]) -> Any:
        """psFunc: what `run(rows [n, dim], ids int[n])` makes of all rows of this shard.

        As in `ps.functions.get`; the caller merges what the shards return.
        """
        stored = self._table(table)
        ids = stored.all_ids()
        (rows,), _ = stored.read(stored.at(ids))
        return jax.tree.map(np.asarray, run(rows, ids))

    def update(
        self, table: str, run: Callable[[Any, Any], Any], worker: int, sequence: int
    ) -> None:
        """psFunc: all rows of this shard become what `run(rows, ids)` makes of them.

        It takes a number of the worker's pushes, so that it is done once.
        """
        stored = self._table(table)
        ids = stored.all_ids()
        (rows,), _ = stored.read(stored.at(ids))
        new = np.asarray(run(rows, ids), np.float32)
        if new.shape != rows.shape:
            raise DataError(
                f"the function made {new.shape} of rows {rows.shape}; it returns one row for each"
            )
        stored.replace(ids, new)
        self._positions[worker] = replace(self._positions[worker], pushes=sequence + 1)

    def _table(self, name: str) -> StoredRows:
        if name not in self.tables:
            raise DataError(f"there is no table {name!r}; there are {sorted(self.tables)}")
        return self.tables[name]

    def _require_worker(self, worker: int) -> None:
        if not 0 <= worker <= self.spec.workers:
            raise RunError(
                f"worker {worker} pushes, but the servers were made for workers 0 to "
                f"{self.spec.workers - 1}"
            )

    def seen_before(self, worker: int, sequence: int) -> bool:
        """Whether a push was taken already.

        Raises:
          RunError: a push before it is missing.
        """
        self._require_worker(worker)
        due = self._positions[worker].pushes
        if sequence > due:
            raise RunError(
                f"worker {worker} pushes number {sequence}, but {due} has not come; a worker "
                "that starts anew goes on from `position`"
            )
        return sequence < due

    def check(self, push: Push) -> None:
        """Refuses what cannot be taken, before it is in a log.

        Raises:
          DataError: ids or shapes do not fit.
          RunError: in lockstep, the worker has not waited for the others.
        """
        if push.worker == self.spec.workers:
            raise RunError(f"worker {push.worker} is who calls functions, and pushes nothing else")
        if push.worker in self._waiting:
            raise RunError(
                f"worker {push.worker} pushes step {push.step} before all have pushed step "
                f"{self._waiting[push.worker].step}, in lockstep; ask the clock before a step"
            )
        for name, update in push.rows.items():
            self._check_rows(name, update)
        expected = set(self.dense.parameters) if self.dense else set()
        if push.dense and set(push.dense) != expected:
            raise DataError(
                f"gradients of {sorted(push.dense)} are pushed, but this server has the "
                f"parameters {sorted(expected)}"
            )
        for name, gradient in push.dense.items():
            assert self.dense is not None
            if gradient.shape != self.dense.parameters[name].shape:
                raise DataError(
                    f"the gradient of {name} has shape {gradient.shape}, the parameter "
                    f"{self.dense.parameters[name].shape}"
                )

    def _check_rows(self, name: str, update: RowsUpdate) -> None:
        stored = self._table(name)
        stored.require(update.ids, f"a push to table {name!r}")
        if np.unique(update.ids).size != update.ids.size:
            raise DataError(f"a push to table {name!r} has an id twice; sum its gradients first")
        widths = stored.rules.widths
        if update.kind == "gradient":
            widths = widths[:1]
        shapes = [value.shape for value in update.values]
        if shapes != [(update.ids.size, width) for width in widths]:
            raise DataError(
                f"a push of {update.kind}s to table {name!r} has arrays {shapes} for "
                f"{update.ids.size} ids; their widths are {list(widths)}"
            )
        if update.counts.shape != update.ids.shape:
            raise DataError(f"a push to table {name!r} has other counts than ids")

    def take(self, push: Push) -> None:
        """Takes an update that `check` let pass and that was not seen before."""
        self._positions[push.worker] = Position(push.sequence + 1, push.step + 1)
        if not self.spec.consistency.lockstep:
            delay = (self.taken - push.seen) // self.spec.workers
            self._apply([push], delay_scale(delay) if self.spec.delay_scaled else 1.0)
            self.taken += 1
            return
        self._waiting[push.worker] = push
        if len(self._waiting) == self.spec.workers:
            # In the order of workers, so that sums do not depend on who came first.
            pushes = [self._waiting[worker] for worker in range(self.spec.workers)]
            self._waiting.clear()
            self._apply(pushes, 1.0)
            self.taken += self.spec.workers

    def _apply(self, pushes: list[Push], factor: float) -> None:
        for name, stored in self.tables.items():
            for update in (push.rows[name] for push in pushes if name in push.rows):
                # Workers have these in their copies already, so they count whatever the loss.
                if update.kind == "difference" and update.ids.size:
                    stored.add(update.ids, update.values, update.counts)
        if not np.isfinite(sum(push.loss for push in pushes)):
            self.skipped += 1
            return
        weight = sum(push.weight for push in pushes)
        scale = 1 / weight if weight else 1.0
        rate = factor
        if self.spec.rate is not None:
            rate *= float(self.spec.rate(pushes[0].step))
        for name, stored in self.tables.items():
            updates = [push.rows[name] for push in pushes if name in push.rows]
            gradients = [u for u in updates if u.kind == "gradient" and u.ids.size]
            if gradients:
                ids, gradient, counts = summed_rows(gradients)
                stored.take_gradients(ids, gradient * np.float32(scale), counts, rate)
            stored.step += 1
        dense = [push.dense for push in pushes if push.dense]
        if dense and self.dense is not None:
            total = {name: sum(part[name] for part in dense) for name in dense[0]}
            self.dense.take(total, scale, factor)

    def arrays(self) -> dict[str, Any]:
        """All that it is, for a snapshot; see `ps.messages.encoded`."""
        return {
            "positions": [[p.pushes, p.steps] for p in self._positions],
            "taken": self.taken,
            "waiting": {str(worker): push_bytes(push) for worker, push in self._waiting.items()},
            "dense": self.dense.arrays() if self.dense else {},
        }

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """The inverse of `arrays`, but for the tables, which have their own."""
        self._positions = [Position(*numbers) for numbers in arrays["positions"]]
        self.taken = arrays["taken"]
        self._waiting = {int(w): push_from_bytes(data) for w, data in arrays["waiting"].items()}
        if self.dense is not None:
            self.dense.restore(arrays["dense"])


def summed_rows(updates: list[RowsUpdate]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of several workers as one: distinct ids, sums, and how many updates each is.

    >>> one = RowsUpdate(np.array([4, 2]), (np.ones((2, 1)),), np.array([1, 1]))
    >>> two = RowsUpdate(np.array([2]), (np.ones((1, 1)),), np.array([1]))
    >>> [part.ravel().tolist() for part in summed_rows([one, two])]
    [[2, 4], [2.0, 1.0], [2, 1]]
    """
    if len(updates) == 1:
        return updates[0].ids, updates[0].values[0], updates[0].counts
    ids, inverse = np.unique(np.concatenate([u.ids for u in updates]), return_inverse=True)
    total = np.zeros((ids.size, updates[0].values[0].shape[1]), np.float32)
    counts = np.zeros(ids.size, np.int64)
    offset = 0
    for update in updates:
        # Ids are distinct within an update, so that plain indexing adds each once.
        at = inverse[offset : offset + update.ids.size]
        total[at] += update.values[0]
        counts[at] += update.counts
        offset += update.ids.size
    return ids, total, counts
