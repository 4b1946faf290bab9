"""A plan of equal stages becomes one jitted step: a pipeline inside a single program.

All stages run in lockstep on a mesh with one more axis, so that a step is dispatched once
instead of once per action. Parameters of the stages' layers lie stacked over that axis; those
of the first and last layers are copies on every stage, which share these layers' work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shardpar.capture.trace import Captured
from shardpar.lowering.elsewhere import absent, in_order, is_here, require_here
from shardpar.lowering.equal_segments import EqualSegments, equal_segments
from shardpar.lowering.lockstep import Lockstep
from shardpar.lowering.meshes import jax_mesh, manual_over, mesh_over_stages
from shardpar.lowering.microbatches import placed_batch, shortest_loop, traced
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.saving import Saving
from shardpar.lowering.separable import require_alike, require_separable
from shardpar.lowering.shardings import batch_sharding, over_axis, replicated
from shardpar.lowering.stacked import Stacked, StackedHomes
from shardpar.lowering.stage_programs import StagePrograms
from shardpar.lowering.stages import StageLayouts, owners_of
from shardpar.lowering.state import (
    Gathered,
    TrainState,
    gradient_sharding,
    shardings_of,
    state_shapes,
    whole_shapes,
)
from shardpar.lowering.update import updated
from shardpar.spec.check import check
from shardpar.spec.lockstep import STAGE, equal_stages, folded
from shardpar.spec.plan import LayerStrategy, Plan
from shardpar.spec.select import strategies


class SingleJitProgram:
    """A plan of equal stages in one program.

    The names of `state.params` are those of the first stage and of what lies outside the
    stages; a checkpoint has the model's own names.

    Attributes:
      captured, plan, options: what it was made from.
      pipeline: the plan's pipelines as one, with an axis over them.
      devices: of the cluster, in order.
      mesh: the jax mesh it runs on, its first axis over the stages.
      homes: which stages hold each array of the state.
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
          plan: of single_jit pipelines, from the planner, a file, or a person.
          optimizer: an optax rule that updates each parameter from itself alone.
          options: dtype, loops, clipping.
          devices: the cluster's devices in plan order; None takes `jax.devices()`.

        Raises:
          PlanError: the plan does not fit the model or the devices, the stages do not compute
            alike, or the optimizer couples parameters.
        """
        check(plan, captured.graph)
        require_separable(optimizer, captured.model.params)
        self.captured, self.plan, self.options = captured, plan, options
        self.optimizer = optimizer
        self.devices = tuple(jax.devices() if devices is None else devices)
        self.pipeline = folded(plan)
        self.mesh = mesh_over_stages(self.pipeline.stages, STAGE, self.devices)
        require_here(plan, self.used_devices)
        self._ends = equal_stages(plan.pipelines[0], captured.graph)
        self._equal = self._cut(training=True)
        first = self.pipeline.stages[0]
        self._chosen = {
            layer: s
            for stage in self.pipeline.stages
            for layer, s in strategies(stage, captured.graph).items()
        }
        self._data_axes = self._chosen[captured.graph.layers[0].name].batch_axes(first.mesh)
        self._owners = owners_of(captured.graph, self._equal.cut.program, [self._chosen])
        own = self._equal.params
        for names in own.values():
            require_alike(optimizer, captured.model.params, names)
        stages_own = {name for names in own.values() for name in names}
        shared = [name for name in captured.model.params if name not in stages_own]
        self._names = [
            [*shared, *(names[s] for names in own.values())]
            for s in range(len(self.pipeline.stages))
        ]
        self._placed = [
            self._layouts(jax_mesh(stage, self.devices), self._chosen)
            for stage in self.pipeline.stages
        ]
        self._state = self._stacked(
            [
                state_shapes(captured.model, optimizer, layouts, names)
                for layouts, names in zip(self._placed, self._names, strict=True)
            ]
        )
        self._whole = whole_shapes(captured.model, optimizer)
        self.homes = StackedHomes(self._whole, self._state, self.devices)

    def _stacked(self, parts: Sequence[Any]) -> Stacked:
        return Stacked(parts, self._equal.params, self.mesh, STAGE)

    def _layouts(self, mesh: Any, chosen: Mapping[str, LayerStrategy]) -> StageLayouts:
        first = self.pipeline.stages[0]
        graph, dims = self.captured.graph, self.plan.tensor_dims
        return StageLayouts(graph, first, mesh, chosen, self._owners, dims)

    def _cut(self, training: bool) -> EqualSegments:
        program = traced(self.captured, self.pipeline, self.options, training=training)
        return equal_segments(program, self._ends)

    def _lockstep(self, equal: EqualSegments) -> Lockstep:
        mesh, shortest = manual_over(self.mesh, STAGE), shortest_loop(self.options)
        last = len(equal.cut.stages) - 1
        programs = []
        for number, names in (
            (0, self._ends.lead),
            (1, self._ends.runs[0]),
            (last, self._ends.tail),
        ):
            chosen = {name: self._chosen[name] for name in names}
            layouts = self._layouts(mesh, chosen)
            programs.append(StagePrograms(equal.cut, number, layouts, shortest, "float32"))
        return Lockstep(equal, *programs, STAGE, self.options.compute_dtype)

    def init(self, seed: int = 0) -> TrainState:
        """A fresh state, born sharded: each stage computes its own part.

        The values depend on the seed only, not on the plan or the number of devices.
        """
        parts = []
        for s, (layouts, names) in enumerate(zip(self._placed, self._names, strict=True)):
            shapes = self._state.parts[s]
            if not is_here(list(layouts.mesh.devices.flat)):
                parts.append(absent(shapes))
                continue

            def init(seed: jax.Array, names: Sequence[str] = names) -> TrainState:
                params, rest = self.captured.model.create(seed)
                mine = {name: params[name] for name in names}
                return TrainState(mine, self.optimizer.init(mine), rest, jnp.int32(0))

            made = jax.jit(init, out_shardings=shardings_of(shapes))
            parts.append(in_order(made)(np.uint32(seed)))
        return self._state.join(parts)  # type: ignore[no-any-return]

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
        return in_order(self.compiled_step)(state, self.place(batch))  # type: ignore[no-any-return]

    def accumulate(
        self, state: TrainState, batch: Mapping[str, Any], gathered: Gathered | None = None
    ) -> Gathered:
        """Gradients of a batch without an update: `apply` takes what several batches gathered.

        Args:
          state: stays as it is.
          batch: arrays whose dim 0 is the plan's global batch.
          gathered: of the step's batches before.
        """
        rest = state.rest if gathered is None else gathered.rest
        return self.add(gathered, self._gathering(state.params, rest, self.place(batch)))

    def gather(
        self, params: Mapping[str, Any], rest: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> Gathered:
        """Gradients of a batch, from parameters and the model's other variables alone.

        Args:
          params: over the stages that hold them, under the model's own names.
          rest: the model's other variables, the same way.
          batch: arrays whose dim 0 is the plan's global batch.
        """
        given = {f".params['{name}']": x for name, x in params.items()}
        given |= {f".rest['{name}']": x for name, x in rest.items()}
        found = self._weight_homes.settled(given)
        return self._gathering(found.params, found.rest, self.place(batch))  # type: ignore[no-any-return]

    def add(self, before: Gathered | None, new: Gathered) -> Gathered:
        """Two parts of one step together; the first is donated."""
        return new if before is None else self._adding(before, new)

    def apply(
        self, state: TrainState, gathered: Gathered
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The update of what was gathered; the state is donated. Returns what `step` does."""
        return self._apply(state, gathered)  # type: ignore[no-any-return]

    def evaluate(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        """(loss sum, weight) of one micro-batch-sized batch, in Flax's eval mode."""
        return self._evaluate(state.params, state.rest, self.place(batch, stacked=False))

    def place(self, batch: Mapping[str, Any], stacked: bool = True) -> dict[str, jax.Array]:
        """Cuts a global batch into micro-batches and puts each piece on its devices.

        Raises:
          PlanError: if an array's first dim is not what the plan expects.
        """
        sharding = batch_sharding(self.mesh, self._data_axes, stacked=int(stacked))
        sequences = self.plan.global_batch if stacked else self.pipeline.microbatch
        cut_in = self.pipeline.num_microbatches if stacked else None
        return placed_batch(batch, self.captured.batch, sequences, cut_in, sharding)

    @property
    def used_devices(self) -> list[jax.Device]:
        """The devices it runs on."""
        return list(self.mesh.devices.flat)

    @property
    def state_shapes(self) -> TrainState:
        """ShapeDtypeStructs of the state, with shardings."""
        return self._state.shapes  # type: ignore[no-any-return]

    @cached_property
    def _saving(self) -> Saving:
        return Saving(self.homes, self._whole, self.used_devices, self.devices)

    @property
    def saved_shapes(self) -> TrainState:
        """What a checkpoint of its state holds, and where it is restored to."""
        return self._saving.shapes

    def to_saved(self, state: TrainState) -> TrainState:
        """The state as a checkpoint holds it: one array per leaf, under the model's names."""
        return self._saving.to_saved(state)

    def from_saved(self, saved: TrainState) -> TrainState:
        """The state from what a checkpoint was restored to; the copies are made."""
        return self._saving.from_saved(saved)

    def together(self, state: TrainState) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Parameters and other variables, whole, on one device of the first process."""
        return self._saving.together(state)

    def waiting_for(self) -> str:
        """The tasks of a step that have not ended, in words: the step is one task."""
        return "the step"

    def compile(self) -> None:
        """Compiles the step, so that the first one takes no longer than the others."""
        _ = self.compiled_step

    @cached_property
    def compiled_step(self) -> Any:
        """The compiled step, a function of (state, placed batch): the first use compiles it."""
        return self.lower_step().compile()

    def lower_step(self) -> Any:
        """The step lowered for this plan's devices but not compiled yet."""
        sharding = batch_sharding(self.mesh, self._data_axes, stacked=1)
        batch = {
            name: jax.ShapeDtypeStruct(
                (self.pipeline.num_microbatches, self.pipeline.microbatch, *leaf.shape[1:]),
                leaf.dtype,
                sharding=sharding,
            )
            for name, leaf in self.captured.batch.items()
        }
        programs = self._lockstep(self._equal)

        def step(state: TrainState, batch: Any) -> Any:
            total, weight, rest, grads = programs.gradients(state.params, state.rest, batch)
            return self._updated(state, grads, rest, total, weight)

        jitted = jax.jit(
            self._on_stages(step, (self._state, None), (self._state, None)),
            donate_argnums=0,
            out_shardings=(shardings_of(self._state.shapes), replicated(self.mesh)),
        )
        return jitted.lower(self._state.shapes, batch)

    def _updated(
        self, state: TrainState, grads: Mapping[str, Any], rest: Any, total: Any, weight: Any
    ) -> Any:
        """A stage's part of the state after a step: every stage updates the copies alike."""
        squares = {name: jnp.sum(jnp.square(g)) for name, g in grads.items()}
        own = sum(squares.pop(name) for name in self._equal.params)
        norm = jnp.sqrt(sum(squares.values()) + jax.lax.psum(own, STAGE)) / weight
        return updated(
            state, grads, rest, total, weight, norm, self.optimizer, self.options
        )  # fmt: skip

    def _on_stages(
        self, function: Callable[..., Any], given: Sequence[Any], made: Sequence[Any]
    ) -> Callable[..., Any]:
        """A function of one stage's trees as one of stacked trees.

        Args:
          function: what each stage computes.
          given: for each argument how it is stacked, a `Stacked`, or a tree of what is stacked;
            None is whole on every stage.
          made: the same for each result.
        """
        given, made = [_own(x) for x in given], [_own(x) for x in made]

        def on_stage(*args: Any) -> Any:
            out = function(*map(_unstacked, given, args))
            return tuple(map(_restacked, made, out))

        specs = [jax.tree.map(lambda own: over_axis(STAGE, own), x) for x in (given, made)]
        # Values that are alike on all stages are so by what this file does with them.
        return jax.shard_map(
            on_stage, mesh=self.mesh, in_specs=tuple(specs[0]), out_specs=tuple(specs[1]),
            axis_names={STAGE}, check_vma=False,
        )  # fmt: skip

    @cached_property
    def _gathered(self) -> Stacked:
        """How what a step gathers is stacked."""
        parts = []
        for layouts, names in zip(self._placed, self._names, strict=True):
            grads = {
                name: jax.ShapeDtypeStruct(
                    self.captured.model.params[name].shape,
                    jnp.float32,
                    sharding=gradient_sharding(name, layouts),
                )
                for name in names
            }
            sums = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=replicated(layouts.mesh))
            parts.append(Gathered(grads, sums, self._state.parts[len(parts)].rest))
        return self._stacked(parts)

    @cached_property
    def gathered_homes(self) -> StackedHomes:
        """Where each array of what a step gathers lies."""
        model = self.captured.model
        grads = {
            name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
            for name, leaf in model.params.items()
        }
        sums = jax.ShapeDtypeStruct((2,), jnp.float32)
        return StackedHomes(Gathered(grads, sums, dict(model.rest)), self._gathered, self.devices)

    @cached_property
    def _weight_homes(self) -> StackedHomes:
        """Where parameters and other variables lie, without the optimizer's state."""

        def without(state: TrainState) -> TrainState:
            return replace(state, optimizer=(), step=())

        stacked = self._stacked([without(part) for part in self._state.parts])
        return StackedHomes(without(self._whole), stacked, self.devices)

    @cached_property
    def _gathering(self) -> Callable[..., Gathered]:
        programs = self._lockstep(self._equal)

        def gather(params: Any, rest: Any, batch: Any) -> Any:
            total, weight, rest, grads = programs.gradients(params, rest, batch)
            return (Gathered(grads, jnp.stack([total, weight]), rest),)

        own = self._state.own
        on_stages = self._on_stages(gather, (own.params, None, None), (self._gathered,))
        out = (shardings_of(self._gathered.shapes),)
        jitted = in_order(jax.jit(on_stages, out_shardings=out))
        return lambda params, rest, batch: jitted(dict(params), dict(rest), batch)[0]  # type: ignore[no-any-return]

    @cached_property
    def _adding(self) -> Callable[[Gathered, Gathered], Gathered]:
        def add(before: Gathered, new: Gathered) -> Gathered:
            grads = jax.tree.map(jnp.add, before.grads, new.grads)
            return Gathered(grads, before.sums + new.sums, new.rest)

        out = shardings_of(self._gathered.shapes)
        return jax.jit(add, out_shardings=out, donate_argnums=0)

    @cached_property
    def _apply(self) -> Callable[..., Any]:
        def apply(state: TrainState, gathered: Gathered) -> Any:
            total, weight = gathered.sums
            return self._updated(state, gathered.grads, gathered.rest, total, weight)

        jitted = jax.jit(
            self._on_stages(apply, (self._state, self._gathered), (self._state, None)),
            donate_argnums=0,
            out_shardings=(shardings_of(self._state.shapes), replicated(self.mesh)),
        )
        return in_order(jitted)

    @cached_property
    def _evaluate(self) -> Callable[..., Any]:
        programs = self._lockstep(self._cut(training=False))
        own = self._state.own
        on_stages = self._on_stages(programs.evaluate, (own.params, None, None), (None, None))
        return in_order(jax.jit(on_stages, out_shardings=replicated(self.mesh)))


def _own(tree: Any) -> Any:
    return False if tree is None else tree.own if isinstance(tree, Stacked) else tree


def _unstacked(own: Any, tree: Any) -> Any:
    if own is False:
        return tree
    return jax.tree.map(lambda stacked, x: x[0] if stacked else x, own, tree)


def _restacked(own: Any, tree: Any) -> Any:
    if own is False:
        return tree
    return jax.tree.map(lambda stacked, x: x[None] if stacked else x, own, tree)
