"""A plan of several stages or pipelines becomes many programs and one controller.

Each stage has its own programs on its own devices. The controller dispatches the plan's
tasks in one order, asynchronously; gradients of what several groups hold are summed as
reshards from addends to copies, and every update divides by the weight of the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import numpy as np
import optax

from shardpar.capture.segments import Segments, segments
from shardpar.capture.trace import Captured
from shardpar.errors import PlanError
from shardpar.lowering.device_groups import GroupPrograms
from shardpar.lowering.elsewhere import absent, placed, require_here
from shardpar.lowering.evaluating import Evaluation
from shardpar.lowering.homes import Homes
from shardpar.lowering.meshes import jax_mesh
from shardpar.lowering.microbatches import require_batch, shortest_loop, traced
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.routes import Routes, backwards, routes_of
from shardpar.lowering.saving import Saving
from shardpar.lowering.separable import require_elementwise, require_separable
from shardpar.lowering.shares import Order, counts_of, place, shares_of
from shardpar.lowering.stage_programs import Arrays
from shardpar.lowering.stages import StageLayouts, owners_of
from shardpar.lowering.state import Gathered, TrainState, whole_shapes
from shardpar.lowering.step_under_way import StepUnderWay
from shardpar.lowering.together import Together, gathered_over, share_out, sliced_leaves
from shardpar.lowering.union import UnionArray
from shardpar.spec.check import check
from shardpar.spec.plan import Pipeline, Plan
from shardpar.spec.schedule import Task
from shardpar.spec.select import strategies

_KEPT_ORDERS = 1024
"""Orders of tasks kept, each for other numbers of micro-batches: some milliseconds to find."""


class PipelinedProgram:
    """A plan of several groups of devices, lowered.

    Attributes:
      captured, plan, options: what it was made from.
      groups: the programs of each group of devices.
      order_of: from the micro-batches of each pipeline to the order of a step's tasks.
      order: that of the plan's own step.
      homes: which groups hold each array of the state.
      gathered_homes: which groups hold what of the gradients of a step.
    """

    def __init__(
        self,
        captured: Captured,
        plan: Plan,
        optimizer: optax.GradientTransformation,
        options: ProgramOptions = ProgramOptions(),
        devices: Sequence[jax.Device] | None = None,
        of_pipelines: Sequence[Captured] = (),
    ) -> None:
        """Checks the plan and cuts the model into its stages; nothing is compiled yet.

        Args:
          captured: from `capture.trace`.
          plan: from the planner, a file, or a person.
          optimizer: an optax rule that updates each parameter from itself alone.
          options: dtype, loops, clipping.
          devices: the cluster's devices in plan order; None takes `jax.devices()`.
          of_pipelines: the same model captured for the rows of each pipeline, where these have
            other lengths than those of `captured`, which evaluates.

        Raises:
          PlanError: the plan does not fit the model or the devices, or the optimizer
            couples parameters, or elements of one where the plan cuts parameters up.
        """
        check(plan, captured.graph)
        self.of_pipelines = tuple(of_pipelines) or (captured,) * len(plan.pipelines)
        for pipeline, own in zip(plan.pipelines, self.of_pipelines, strict=True):
            if own is not captured:
                check(replace(plan, global_batch=pipeline.sequences, pipelines=(pipeline,)),
                      own.graph)  # fmt: skip
        require_separable(optimizer, captured.model.params)
        if plan.zero == "pipelines":
            require_elementwise(optimizer, captured.model.params)
        self.captured, self.plan, self.options = captured, plan, options
        self.optimizer = optimizer
        self.devices = tuple(jax.devices() if devices is None else devices)
        require_here(plan, self.used_devices)
        self.groups: list[GroupPrograms] = []
        self._of_stage: dict[tuple[int, int], GroupPrograms] = {}
        self.order_of = lru_cache(maxsize=_KEPT_ORDERS)(partial(Order.of, plan.pipelines))
        self.order = self.order_of(tuple(p.num_microbatches for p in plan.pipelines))
        self._cuts = [self._cut(number) for number in range(len(plan.pipelines))]
        for number in range(len(plan.pipelines)):
            self._add_pipeline(number)
        self._refuse_separate_variables()
        slices = {} if plan.zero == "none" else share_out(self.groups, self.devices)
        whole = self._whole = whole_shapes(captured.model, optimizer)
        self.homes = Homes(
            whole, [g.shapes for g in self.groups], self.devices,
            slices=sliced_leaves(whole, slices),
        )  # fmt: skip
        self.gathered_homes = gathered_over(self.groups, slices, self.devices)
        self._together = Together(self.groups, self.homes, self.gathered_homes, self.devices)
        self._run_now: StepUnderWay | None = None

    def _cut(self, number: int, training: bool = True) -> Segments:
        pipeline = self.plan.pipelines[number]
        stage_of = {
            layer: s
            for s, stage in enumerate(pipeline.stages)
            for layer in strategies(stage, self.captured.graph)
        }
        captured = self.of_pipelines[number] if training else self.captured
        program = traced(captured, pipeline, self.options, training=training)
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
        graph, pipeline = self.of_pipelines[number].graph, self.plan.pipelines[number]
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
        run = self._run([p.params for p in parts], [p.rest for p in parts], self._shares(batch))
        return self._applied(parts, *run)

    def step_shares(
        self, state: TrainState, shares: Sequence[Mapping[str, Any]]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step in which pipelines have other numbers of micro-batches than planned.

        Args:
          state: donated.
          shares: of each pipeline, arrays whose dim 0 is a multiple of its micro-batch, of its
            micro-batch times its groups where it is interleaved; no rows or an empty dictionary
            where it gets nothing.

        Returns:
          What `step` does.

        Raises:
          CaptureError: an array is missing.
          PlanError: an array has another shape, or there are no sequences.
        """
        parts = self.homes.split(state)
        run = self._run([p.params for p in parts], [p.rest for p in parts], shares)
        return self._applied(parts, *run)

    def _shares(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        require_batch(batch, self.captured.batch, self.plan.global_batch)
        return shares_of({name: batch[name] for name in self.captured.batch}, self.plan)

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
        grads, stats, after = self._run(of_groups, variables, self._shares(batch))
        sums = self._together.spread_sums(stats)
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

    def begin(
        self, params: list[Arrays], rest: list[Arrays], shares: Sequence[Mapping[str, Any]]
    ) -> StepUnderWay:
        """A step of which no task is dispatched yet, from each group's arrays."""
        counts = counts_of(shares, self.plan, [own.batch for own in self.of_pipelines])
        batches = place(shares, counts, self.plan, self._of_stage)
        return StepUnderWay(self, params, rest, batches, self.order_of(counts))

    def _run(
        self, params: list[Arrays], rest: list[Arrays], shares: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Arrays], list[Any], list[Arrays]]:
        """By group: gradients summed over groups, its own [loss, weight], variables after."""
        run = self._run_now = self.begin(params, rest, shares)
        for task in run.order.tasks:
            run.do(task)
        grads = [
            group.finish.call(gathered) if group.is_here else absent(group.finished_shapes)
            for group, gathered in zip(self.groups, run.gathered, strict=True)
        ]
        self._together.sum_gradients(grads)
        after = []
        for group, counters, local in zip(self.groups, run.counters, run.local, strict=True):
            if group.is_here and group.advance:
                counters = group.advance.call(counters, np.int32(run.order.total))
            after.append({**counters, **local})
        return grads, run.stats, after

    def _applied(
        self, parts: list[TrainState], grads: list[Arrays], stats: list[Any], rest: list[Arrays]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        sums = self._together.sums(stats, grads)
        parts = self._together.cut(parts)
        metrics: dict[str, jax.Array] = {}
        after = []
        for group, *given in zip(self.groups, parts, grads, sums, rest, strict=True):
            new, found = group.update.call(*given) if group.is_here else (given[0], {})
            after.append(new)
            metrics = metrics or found
        return self.homes.joined(self._together.whole(after)), metrics

    @cached_property
    def routes(self) -> Routes:
        """Where each stage of each pipeline sends what it makes."""
        return routes_of({at: g.stages[at[1]] for at, g in self._of_stage.items()}, self.devices)

    @cached_property
    def routes_back(self) -> Routes:
        """Where each stage sends the gradients of what it received: back where it came from."""
        stages = {at: g.stages[at[1]] for at, g in self._of_stage.items()}
        return backwards(self.routes, stages, self.devices)

    def compile(self) -> None:
        """Compiles all programs of the step, so that the first one takes no longer."""
        jobs: list[Callable[[], Any]] = [self._together.prepare]
        for group in self.groups:
            jobs += [lambda g=group: (g.prepare, g.finish, g.advance, g.update)]  # type: ignore[misc]
            jobs += [lambda s=stage: s.backward for stage in group.stages.values()]  # type: ignore[misc]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.result()

    @property
    def compiled_parts(self) -> dict[str, Any]:
        """Every compiled program of a step by what it does, of this process's devices.

        Forwards and backwards run once a micro-batch, updates once a step.
        """
        self.compile()
        parts: dict[str, Any] = {}
        for (pipeline, number), group in sorted(self._of_stage.items()):
            if group.is_here:
                stage, at = group.stages[number], f"pipeline {pipeline}, stage {number}"
                parts[f"{at}: forward"] = stage.forward.compiled
                parts[f"{at}: backward"] = stage.backward.compiled
        for group in self.groups:
            if group.is_here:
                at = f"pipeline {group.pipeline}, group {group.number}"
                parts[f"{at}: update"] = group.update.compiled
        return parts

    def compile_gather(self) -> None:
        """Compiles what `gather` runs."""
        self.compile()

    def compile_apply(self) -> None:
        """Compiles what `add` and `apply` run."""
        for group in self.groups:
            _ = (group.add, group.update) if group.is_here else None
        self._together.prepare()

    def evaluate(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        """(loss sum, weight) of one micro-batch of the first pipeline, in Flax's eval mode."""
        require_batch(batch, self.captured.batch, self.pipeline.microbatch)
        return self._evaluation(self.homes.split(state), batch)

    @cached_property
    def _evaluation(self) -> Evaluation:
        of_stage = {s: self._of_stage[0, s] for s in range(len(self.pipeline.stages))}
        cut_ = self._cut(0, training=False)
        return Evaluation(cut_, of_stage, self._together, self.options, self.devices)
