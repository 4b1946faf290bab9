"""One step of a plan of several stages: tasks are dispatched, and what they make is sent on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from shardpar.lowering.device_groups import GroupPrograms
from shardpar.lowering.elsewhere import absent
from shardpar.lowering.routes import Routes
from shardpar.lowering.shares import Order, Placed
from shardpar.lowering.stage_programs import Arrays, StagePrograms
from shardpar.spec.schedule import Task


class _Stages(Protocol):
    """What a step needs of its program."""

    groups: list[GroupPrograms]

    @property
    def routes(self) -> Routes: ...

    @property
    def routes_back(self) -> Routes: ...

    def group_of(self, task: Task) -> GroupPrograms: ...


class StepUnderWay:
    """One step under way: what has arrived where, and what waits for its backward."""

    def __init__(
        self,
        program: _Stages,
        params: list[Arrays],
        rest: list[Arrays],
        batches: Placed,
        order: Order,
    ) -> None:
        self.program, self.batches, self.order = program, batches, order
        self.weights, self.gathered, self.stats, self.local, self.counters = [], [], [], [], []
        for group, part, variables in zip(program.groups, params, rest, strict=True):
            if group.is_here:
                weights, zeros, stats = group.prepare.call(part)
            else:
                weights, zeros, stats = None, None, absent(group.gathered_shapes.sums)
            self.weights.append(weights)
            self.gathered.append(zeros)
            self.stats.append(stats)
            counters = set(group.cut.counters)
            self.counters.append({n: x for n, x in variables.items() if n in counters})
            self.local.append({n: x for n, x in variables.items() if n not in counters})
        self.number = {id(group): n for n, group in enumerate(program.groups)}
        self.arrived: dict[tuple[int, int, int], dict[int, jax.Array]] = {}
        self.returned: dict[tuple[int, int, int], dict[int, jax.Array]] = {}
        self.saved: dict[tuple[int, int, int], list[Any]] = {}
        self.sent: list[tuple[Task, jax.Array]] = []

    def waiting_for(self) -> str:
        """The first task dispatched here that has not ended; "" if all have."""
        return next((str(task) for task, made in self.sent if not _has_ended(made)), "")

    def do(self, task: Task) -> None:
        """Dispatches one task and sends on what it makes."""
        group = self.program.group_of(task)
        stage, n = group.stages[task.stage], self.number[id(group)]
        if task.kind == "forward":
            self._forward(task, stage, n)
        else:
            self._backward(task, stage, n)

    def _forward(self, task: Task, stage: StagePrograms, n: int) -> None:
        at = task.pipeline, task.stage, task.microbatch
        came = self.arrived.pop(at, {})
        if not self.program.groups[n].is_here:
            self._send(task, self.program.routes, self.arrived, absent(stage.sent))
            return
        received = [came[i] for i in range(len(stage.received))]
        batch = self.batches[task.pipeline][task.microbatch][task.stage]
        local = {name: self.local[n][name] for name in stage.segment.local}
        k = np.int32(self.order.before[task.pipeline] + task.microbatch)
        sent, self.stats[n], after, kept = stage.forward.call(
            self.weights[n][task.stage], self.counters[n], local, k, batch, received, self.stats[n]
        )
        self.local[n].update(after)
        self.sent.append((task, self.stats[n]))
        self.saved[at] = stage.saved_of(batch, received, sent, kept)
        self._send(task, self.program.routes, self.arrived, sent)

    def _backward(self, task: Task, stage: StagePrograms, n: int) -> None:
        at = task.pipeline, task.stage, task.microbatch
        came = self.returned.pop(at, {})
        if not self.program.groups[n].is_here:
            back = absent([stage.received[i] for i in stage.gives_back()])
            self._send(task, self.program.routes_back, self.returned, back)
            return
        cotangents = [came[j] for j in stage.takes_back()]
        self.gathered[n][task.stage], back = stage.backward.call(
            self.weights[n][task.stage], self.saved.pop(at), cotangents,
            self.gathered[n][task.stage],
        )  # fmt: skip
        made = jax.tree.leaves((self.gathered[n][task.stage], back))
        self.sent += [(task, made[0])] if made else []
        self._send(task, self.program.routes_back, self.returned, back)

    def _send(
        self,
        task: Task,
        routes: Routes,
        there: dict[tuple[int, int, int], dict[int, jax.Array]],
        arrays: Sequence[jax.Array],
    ) -> None:
        for route in routes[task.pipeline, task.stage]:
            moved = route.wire([arrays[i] for i in route.takes])
            box = there.setdefault((task.pipeline, route.to, task.microbatch), {})
            for j, x in zip(route.puts, moved, strict=True):
                # Several stages may have read one array: their gradients add up.
                box[j] = box[j] + x if j in box and route.wire.arrives_here else x


def _has_ended(made: jax.Array) -> bool:
    # What was donated since was made before.
    return made.is_deleted() or made.is_ready()
