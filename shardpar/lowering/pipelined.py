"""A plan of several stages or pipelines becomes many programs and one controller.

Each stage has its own programs on its own devices. The controller dispatches the plan's
tasks in one order, asynchronously; gradients of what several groups hold are summed as
reshards from addends to copies, and every update divides by the weight of the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax

from shardpar.capture.segments import Segments, segments
from shardpar.capture.trace import Captured
from shardpar.errors import PlanError
from shardpar.lowering.device_groups import GroupPrograms
from shardpar.lowering.elsewhere import absent, in_order, placed, require_here
from shardpar.lowering.homes import Home, Homes
from shardpar.lowering.meshes import jax_mesh
from shardpar.lowering.microbatches import require_batch, shortest_loop, traced
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.ready import Ready
from shardpar.lowering.routes import Routes, backwards, routes_of
from shardpar.lowering.saving import Saving
from shardpar.lowering.separable import require_separable
from shardpar.lowering.stage_programs import Arrays, StagePrograms
from shardpar.lowering.stages import StageLayouts, owners_of
from shardpar.lowering.state import Gathered, TrainState, whole_shapes
from shardpar.lowering.step_under_way import StepUnderWay
from shardpar.lowering.transfer import Transfer
from shardpar.lowering.union import UnionArray
from shardpar.spec.check import check
from shardpar.spec.plan import Pipeline, Plan
from shardpar.spec.reshard import Tensor, fuse
from shardpar.spec.schedule import Task, tasks
from shardpar.spec.select import strategies


class PipelinedProgram:
    """A plan of several groups of devices, lowered.

    Attributes:
      captured, plan, options: what it was made from.
      groups: the programs of each group of devices.
      order: the tasks of a step, as they are dispatched.
      homes: which groups hold each array of the state.
    """

    def __init__(
        self,
        captured: Captured,
        plan: Plan,
        optimizer: optax.GradientTransformation,
        options: ProgramOptions = ProgramOptions(),
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """Checks the plan and cuts the model into its stages; nothing is compiled yet.

        Args:
          captured: from `capture.trace`.
          plan: from the planner, a file, or a person.
          optimizer: an optax rule that updates each parameter from itself alone.
          options: dtype, loops, clipping.
          devices: the cluster's devices in plan order; None takes `jax.devices()`.

        Raises:
          PlanError: the plan does not fit the model or the devices, or the optimizer
            couples parameters.
        """
        check(plan, captured.graph)
        require_separable(optimizer, captured.model.params)
        self.captured, self.plan, self.options = captured, plan, options
        self.optimizer = optimizer
        self.devices = tuple(jax.devices() if devices is None else devices)
        require_here(plan, self.used_devices)
        self.order = tasks(plan.pipelines)
        self.groups: list[GroupPrograms] = []
        self._of_stage: dict[tuple[int, int], GroupPrograms] = {}
        counts = [p.num_microbatches for p in plan.pipelines]
        self._before = [sum(counts[:n]) for n in range(len(counts))]
        self._all = np.int32(sum(counts))
        self._cuts = [self._cut(number) for number in range(len(plan.pipelines))]
        for number in range(len(plan.pipelines)):
            self._add_pipeline(number)
        self._refuse_separate_variables()
        self._whole = whole_shapes(captured.model, optimizer)
        self.homes = Homes(self._whole, [g.shapes for g in self.groups], self.devices)
        self._run_now: StepUnderWay | None = None

    def _cut(self, number: int, training: bool = True) -> Segments:
        pipeline = self.plan.pipelines[number]
        stage_of = {
            layer: s
            for s, stage in enumerate(pipeline.stages)
            for layer in strategies(stage, self.captured.graph)
        }
        program = traced(self.captured, pipeline, self.options, training=training)
        return segments(program, stage_of)

    def _add_pipeline(self, number: int) -> None:
        pipeline, cut_ = self.plan.pipelines[number], self._cuts[number]
        read = {name for segment in cut_.stages for name in segment.params}
        orphans = [name for name in self.captured.model.params if name not in read]
        shortest = shortest_loop(self.options)
        for g in range(pipeline.num_groups):
            layouts = self._layouts(number, range(g, len(pipeline.stages), pipeline.num_groups))
            group = GroupPrograms(
                self.captured, self.optimizer, self.options, number, g, layouts, cut_, shortest,
                () if self.groups else orphans,
            )  # fmt: skip
            self.groups.append(group)
            self._of_stage.update({(number, s): group for s in layouts})

    def _layouts(self, number: int, numbers: Sequence[int]) -> dict[int, StageLayouts]:
        """The layouts of the stages of one group; a parameter lies the same for all of them."""
        graph, pipeline = self.captured.graph, self.plan.pipelines[number]
        mesh = jax_mesh(pipeline.stages[numbers[0]], self.devices)
        chosen = {s: strategies(pipeline.stages[s], graph) for s in numbers}
        owners = owners_of(graph, self._cuts[number].program, chosen.values())
        return {
            s: StageLayouts(
                graph, pipeline.stages[s], mesh, chosen[s], owners, self.plan.tensor_dims
            )
            for s in numbers
        }

    def _refuse_separate_variables(self) -> None:
        if len(self.plan.pipelines) == 1:
            return
        for cut_ in self._cuts:
            for segment in cut_.stages:
                if segment.local:
                    raise PlanError(
                        f"the model's variable {segment.local[0]} changes with the data, as batch "
                        "statistics do, and each of several pipelines would have its own; use a "
                        "plan of one pipeline"
                    )

    def group_of(self, task: Task) -> GroupPrograms:
        """The programs of the group that does a task."""
        return self._of_stage[task.pipeline, task.stage]

    def counted_before(self, task: Task) -> np.int32:
        """How many micro-batches of the step come before a task's."""
        return np.int32(self._before[task.pipeline] + task.microbatch)

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline that evaluates: the first."""
        return self.plan.pipelines[0]

    def init(self, seed: int = 0) -> TrainState:
        """A fresh state: every leaf an array over the groups that hold it.

        The values depend on the seed only, not on the plan or the number of devices.
        """
        return self.homes.joined(  # type: ignore[no-any-return]
            [
                group.init(np.uint32(seed)) if group.is_here else absent(group.shapes)
                for group in self.groups
            ]
        )

    @property
    def used_devices(self) -> list[jax.Device]:
        """The devices it runs on."""
        return [self.devices[d] for d in self.plan.devices]

    @property
    def saved_shapes(self) -> TrainState:
        """What a checkpoint of its state holds, and where it is restored to."""
        return self._saving.shapes

    def to_saved(self, state: TrainState) -> TrainState:
        """The state as a checkpoint holds it: one array per leaf."""
        return self._saving.to_saved(state)

    def from_saved(self, saved: TrainState) -> TrainState:
        """The state from what a checkpoint was restored to; the copies are made."""
        return self._saving.from_saved(saved)

    @cached_property
    def _saving(self) -> Saving:
        return Saving(self.homes, self._whole, self.used_devices, self.devices)

    def together(self, state: TrainState) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Parameters and other variables, whole, on one device of the first process."""
        return self._saving.together(state)

    def waiting_for(self) -> str:
        """The first task of the step under way that has not ended, in words."""
        return "" if self._run_now is None else self._run_now.waiting_for()

    def place(self, batch: Mapping[str, Any]) -> list[list[dict[int, dict[str, jax.Array]]]]:
        """Puts each pipeline's micro-batches on the devices of the stages that read them.

        Args:
          batch: arrays whose dim 0 is the plan's global batch; pipelines take their sequences
            in the plan's order.

        Returns:
          By pipeline and micro-batch, the arrays of each stage.

        Raises:
          CaptureError: an array is missing.
          PlanError: its shape is not what the plan expects.
        """
        require_batch(batch, self.captured.batch, self.plan.global_batch)
        values, targets, places = [], [], []
        start = 0
        out: list[list[dict[int, dict[str, jax.Array]]]] = []
        for number, pipeline in enumerate(self.plan.pipelines):
            out.append([])
            for m in range(pipeline.num_microbatches):
                rows = slice(start, start + pipeline.microbatch)
                start += pipeline.microbatch
                out[-1].append({})
                for s in range(len(pipeline.stages)):
                    out[-1][m][s] = {}
                    group = self._of_stage[number, s]
                    if not group.is_here:
                        continue
                    for name, shape in group.stages[s].batch.items():
                        values.append(batch[name][rows])
                        targets.append(shape.sharding)
                        places.append((number, m, s, name))
        for (number, m, s, name), array in zip(places, placed(values, targets), strict=True):
            out[number][m][s][name] = array
        return out

    def step(
        self, state: TrainState, batch: Mapping[str, Any]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step; the old state is donated and must not be used again.

        Args:
          state: from `init`, `step` or a checkpoint.
          batch: arrays whose dim 0 is the plan's global batch.

        Returns:
          The new state, and scalars: `loss` (mean over the weight), `weight`,
          `grad_norm` (before clipping), `skipped` (1 when a gradient was not
          finite and the state was left as it was).
        """
        parts = self.homes.split(state)
        run = self._run([p.params for p in parts], [p.rest for p in parts], batch)
        return self._applied(parts, *run)

    def accumulate(
        self, state: TrainState, batch: Mapping[str, Any], gathered: Gathered | None = None
    ) -> Gathered:
        """Gradients of a batch without an update: `apply` takes what several batches gathered.

        Args:
          state: stays as it is.
          batch: arrays whose dim 0 is the plan's global batch.
          gathered: of the step's batches before; it must not be used again.
        """
        rest = state.rest if gathered is None else gathered.rest
        return self.add(gathered, self.gather(state.params, rest, batch))

    def gather(
        self, params: Mapping[str, Any], rest: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> Gathered:
        """Gradients of a batch, from parameters and the model's other variables alone."""
        of_groups = [self._of_group(n, "params", params) for n in range(len(self.groups))]
        variables = [self._of_group(n, "rest", rest) for n in range(len(self.groups))]
        grads, stats, after = self._run(of_groups, variables, batch)
        sums = self._spread_sums(stats)
        parts = [Gathered(*of_group) for of_group in zip(grads, sums, after, strict=True)]
        return self.gathered_homes.joined(parts)  # type: ignore[no-any-return]

    def _of_group(self, number: int, kind: str, unions: Mapping[str, UnionArray]) -> Arrays:
        group = self.groups[number]
        names = group.names if kind == "params" else group.rest_names
        homes = self.homes.leaves
        return {
            name: unions[name].arrays[homes[f".{kind}['{name}']"].groups.index(number)]
            for name in names
        }

    def add(self, before: Gathered | None, new: Gathered) -> Gathered:
        """Two parts of one step together; the first is donated."""
        if before is None:
            return new
        parts = []
        for group, one, other in zip(
            self.groups,
            self.gathered_homes.split(before),
            self.gathered_homes.split(new),
            strict=True,
        ):
            if group.is_here:
                grads = group.add.call(one.grads, other.grads)
                other = Gathered(grads, one.sums + other.sums, other.rest)
            parts.append(other)
        return self.gathered_homes.joined(parts)  # type: ignore[no-any-return]

    def apply(
        self, state: TrainState, gathered: Gathered
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The update of what was gathered; both are donated. Returns what `step` does."""
        parts = self.gathered_homes.split(gathered)
        # Every group has the sums of all; one of them counts.
        stats = [
            part.sums
            if n == 0 or not group.is_here
            else placed([np.zeros(2, np.float32)], [group.whole])[0]
            for n, (group, part) in enumerate(zip(self.groups, parts, strict=True))
        ]
        return self._applied(
            self.homes.split(state), [p.grads for p in parts], stats, [p.rest for p in parts]
        )

    def _run(
        self, params: list[Arrays], rest: list[Arrays], batch: Mapping[str, Any]
    ) -> tuple[list[Arrays], list[Any], list[Arrays]]:
        """By group: gradients summed over groups, its own [loss, weight], variables after."""
        run = self._run_now = StepUnderWay(self, params, rest, self.place(batch))
        for task in self.order:
            run.do(task)
        grads = [
            group.finish.call(gathered) if group.is_here else absent(group.gathered_shapes.grads)
            for group, gathered in zip(self.groups, run.gathered, strict=True)
        ]
        if self._shared:
            self._sum_shared(grads)
        after = []
        for group, counters, local in zip(self.groups, run.counters, run.local, strict=True):
            if group.is_here and group.advance:
                counters = group.advance.call(counters, self._all)
            after.append({**counters, **local})
        return grads, run.stats, after

    def _applied(
        self, parts: list[TrainState], grads: list[Arrays], stats: list[Any], rest: list[Arrays]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        sums = [
            squares.call(of_group, {name: g[name] for name in names})
            if squares
            else absent(group.sums_shape)
            for group, (names, squares), of_group, g in zip(
                self.groups, self._squares, stats, grads, strict=True
            )
        ]
        sums = self._spread_sums(sums)
        metrics: dict[str, jax.Array] = {}
        after = []
        for group, *given in zip(self.groups, parts, grads, sums, rest, strict=True):
            new, found = group.update.call(*given) if group.is_here else (given[0], {})
            after.append(new)
            metrics = metrics or found
        return self.homes.joined(after), metrics

    @cached_property
    def gathered_homes(self) -> Homes:
        """Which groups hold what of the gradients of a step."""
        model = self.captured.model
        whole = Gathered(
            {
                name: jax.ShapeDtypeStruct(leaf.shape, np.float32)
                for name, leaf in model.params.items()
            },
            jax.ShapeDtypeStruct((2,), np.float32),
            dict(model.rest),
        )
        return Homes(whole, [g.gathered_shapes for g in self.groups], self.devices)

    @cached_property
    def _shared(self) -> dict[str, Home]:
        """Parameters that several groups hold, with the home of their gradients."""
        homes = {
            name: self.gathered_homes.leaves[f".grads['{name}']"]
            for name in self.captured.model.params
        }
        return {name: home for name, home in homes.items() if len(home.groups) > 1}

    @cached_property
    def _squares(self) -> list[tuple[list[str], Ready | None]]:
        """By group, the parameters whose squares it counts, each once, and what adds them."""
        first = {
            name: self.gathered_homes.leaves[f".grads['{name}']"].groups[0]
            for name in self.captured.model.params
        }
        out = []
        for n, group in enumerate(self.groups):
            mine = [name for name in group.names if first[name] == n]
            out.append((mine, group.squares(mine) if group.is_here else None))
        return out

    @cached_property
    def _summing(self) -> Transfer:
        tensors = [
            Tensor(home.across("partial"), home.layout, tuple(home.shapes[0].shape), 4)
            for home in self._shared.values()
        ]
        return Transfer(fuse(tensors), [np.dtype(np.float32)] * len(tensors), self.devices)

    def _sum_shared(self, grads: list[Arrays]) -> None:
        """Sums what several groups hold the gradient of: a reshard from addends to copies."""
        unions = [
            home.union([grads[n][name] for n in home.groups], "partial")
            for name, home in self._shared.items()
        ]
        for (name, home), union in zip(
            self._shared.items(), self._summing(unions, donate=True), strict=True
        ):
            for n, array in zip(home.groups, home.settled(union).arrays, strict=True):
                grads[n][name] = array

    @cached_property
    def _everywhere(self) -> Mapping[int, tuple[Home, Transfer]]:
        """What sums so many scalars over all groups and gives every group the sum."""
        out = {}
        for count in (2, 3):
            shapes = tuple(
                jax.ShapeDtypeStruct((count,), np.float32, sharding=g.whole) for g in self.groups
            )
            home = Home.of(tuple(range(len(self.groups))), shapes, self.devices)
            tensor = Tensor(home.across("partial"), home.layout, (count,), 4)
            out[count] = home, Transfer(fuse([tensor]), [np.dtype(np.float32)], self.devices)
        return out

    def _spread_sums(self, sums: list[Any]) -> list[Any]:
        """Scalars summed over all groups, on every group."""
        if len(self.groups) == 1:
            return sums
        home, transfer = self._everywhere[sums[0].size]
        (union,) = transfer([home.union(sums, "partial")], donate=True)
        return list(home.settled(union).arrays)

    @cached_property
    def routes(self) -> Routes:
        """Where each stage of each pipeline sends what it makes."""
        return routes_of({at: g.stages[at[1]] for at, g in self._of_stage.items()}, self.devices)

    @cached_property
    def _evaluation_routes(self) -> Routes:
        return routes_of({(0, s): stage for s, stage in self._evaluating.items()}, self.devices)

    @cached_property
    def routes_back(self) -> Routes:
        """Where each stage sends the gradients of what it received: back where it came from."""
        stages = {at: g.stages[at[1]] for at, g in self._of_stage.items()}
        return backwards(self.routes, stages, self.devices)

    def compile(self) -> None:
        """Compiles all programs of the step, so that the first one takes no longer."""
        jobs: list[Callable[[], Any]] = [lambda: self._squares]
        for group in self.groups:
            jobs += [lambda g=group: (g.prepare, g.finish, g.advance, g.update)]  # type: ignore[misc]
            jobs += [lambda s=stage: s.backward for stage in group.stages.values()]  # type: ignore[misc]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.result()

    def evaluate(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        """(loss sum, weight) of one micro-batch of the first pipeline, in Flax's eval mode."""
        require_batch(batch, self.captured.batch, self.pipeline.microbatch)
        parts = self.homes.split(state)
        arrived: dict[int, dict[int, jax.Array]] = {s: {} for s in self._evaluating}
        sums = [absent(g.gathered_shapes.sums) if not g.is_here else None for g in self.groups]
        for s, stage in self._evaluating.items():
            group = self._of_stage[0, s]
            n = self.groups.index(group)
            if group.is_here:
                names = list(stage.batch)
                targets = [stage.batch[name].sharding for name in names]
                given = dict(zip(names, placed([batch[x] for x in names], targets), strict=True))
                received = [arrived[s][i] for i in range(len(stage.received))]
                weights = self._evaluation_weights[s](parts[n].params)
                sent, found = stage.evaluate(weights, parts[n].rest, given, received)
                sums[n] = found if sums[n] is None else sums[n] + found
            else:
                sent = absent(stage.sent)
            for route in self._evaluation_routes[0, s]:
                moved = route.wire([sent[j] for j in route.takes])
                arrived[route.to].update(zip(route.puts, moved, strict=True))
        zeros = [
            placed([np.zeros(2, np.float32)], [g.whole])[0] if x is None else x
            for g, x in zip(self.groups, sums, strict=True)
        ]
        mine = next(n for n, group in enumerate(self.groups) if group.is_here)
        total = self._spread_sums(zeros)[mine]
        return total[0], total[1]

    @cached_property
    def _evaluating(self) -> dict[int, StagePrograms]:
        cut_ = self._cut(0, training=False)
        shortest = shortest_loop(self.options)
        return {
            s: StagePrograms(
                cut_, s, self._of_stage[0, s].stages[s].layouts, shortest,
                self.options.compute_dtype,
            )
            for s in range(len(self.pipeline.stages))
        }  # fmt: skip

    @cached_property
    def _evaluation_weights(self) -> dict[int, Any]:
        return {s: in_order(jax.jit(stage.prepare)) for s, stage in self._evaluating.items()}
