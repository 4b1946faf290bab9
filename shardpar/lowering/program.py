"""A captured model and a plan become a Program: sharded init, one jitted step, evaluation.

With one pipeline of one stage everything is one donated jit with sharding
constraints at layer borders, which is what an expert writes by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shardpar.capture.trace import OUTSIDE, Captured
from shardpar.errors import PlanError
from shardpar.lowering.elsewhere import first_device, in_order
from shardpar.lowering.homes import Homes, Move
from shardpar.lowering.meshes import jax_mesh
from shardpar.lowering.microbatches import placed_batch, shortest_loop, traced
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.ready import Ready
from shardpar.lowering.shardings import batch_sharding, constrain, replicated
from shardpar.lowering.stages import Forward, StageLayouts, forward_program
from shardpar.lowering.state import (
    Gathered,
    TrainState,
    gradient_sharding,
    shardings_of,
    state_shapes,
)
from shardpar.lowering.update import updated
from shardpar.spec.check import check
from shardpar.spec.layout import Group, Layout
from shardpar.spec.plan import LayerStrategy, Plan
from shardpar.spec.select import strategies


class Program:
    """A plan lowered to XLA.

    Attributes:
      captured, plan, options: what it was made from.
      devices: of the cluster, in order.
      mesh: the jax mesh it runs on.
      state_shapes: ShapeDtypeStructs of the state, with shardings.
    """

    def __init__(
        self,
        captured: Captured,
        plan: Plan,
        optimizer: optax.GradientTransformation,
        options: ProgramOptions = ProgramOptions(),
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """Checks the plan and prepares the programs; nothing is compiled yet.

        Args:
          captured: from `capture.trace`.
          plan: from the planner, a file, or a person.
          optimizer: any optax transformation; parameters are a flat dict by path.
          options: dtype, loops, clipping.
          devices: the cluster's devices in plan order; None takes `jax.devices()`.

        Raises:
          PlanError: if the plan does not fit the model or the devices, or has
            several stages, which `PipelinedProgram` is for.
        """
        check(plan, captured.graph)
        if len(plan.pipelines) != 1 or len(plan.pipelines[0].stages) != 1:
            raise PlanError(
                f"the plan has {len(plan.pipelines)} pipelines with "
                f"{[len(p.stages) for p in plan.pipelines]} stages; lower it with "
                "`shardpar.lowering.lower.lower`, which makes programs of stages"
            )
        self.captured, self.plan, self.options = captured, plan, options
        self.optimizer = optimizer
        self.pipeline = plan.pipelines[0]
        stage = self.pipeline.stages[0]
        self.devices = tuple(jax.devices() if devices is None else devices)
        self.mesh = jax_mesh(stage, self.devices)
        chosen = strategies(stage, captured.graph)
        self._layouts = StageLayouts(
            captured.graph, stage, self.mesh, chosen, _owners(captured, chosen), plan.tensor_dims
        )
        self._data_axes = chosen[captured.graph.layers[0].name].batch_axes(stage.mesh)
        self.state_shapes = state_shapes(captured.model, optimizer, self._layouts)

    def init(self, seed: int = 0) -> TrainState:
        """A fresh state, born sharded: no device holds more of it than the plan gives it.

        The values depend on the seed only, not on the plan or the number of devices.
        """
        return self.init_program(jnp.uint32(seed))

    @cached_property
    def init_program(self) -> Callable[[jax.Array], TrainState]:
        """The jitted initialiser, from a uint32 seed."""

        def init(seed: jax.Array) -> TrainState:
            params, rest = self.captured.model.create(seed)
            params = {
                name: constrain(value, self.state_shapes.params[name].sharding)
                for name, value in params.items()
            }
            return TrainState(params, self.optimizer.init(params), rest, jnp.int32(0))

        return jax.jit(init, out_shardings=shardings_of(self.state_shapes))

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
        return self.add(gathered, self.gather(state.params, rest, batch))

    def gather(
        self, params: Mapping[str, Any], rest: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> Gathered:
        """Gradients of a batch, from parameters and the model's other variables alone."""
        return self._gathering(dict(params), dict(rest), self.place(batch))  # type: ignore[no-any-return]

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
        """Cuts a global batch into micro-batches and puts each piece on its device.

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

    @cached_property
    def homes(self) -> Homes:
        """Where each array of the state lies."""
        return Homes(self.state_shapes, [self.state_shapes], self.devices, single=True)

    @cached_property
    def gathered_homes(self) -> Homes:
        """Where each array of what a step gathers lies."""
        return Homes(self.gathered_shapes, [self.gathered_shapes], self.devices, single=True)

    @cached_property
    def gathered_shapes(self) -> Gathered:
        """ShapeDtypeStructs of what a step gathers, with shardings."""
        grads = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, jnp.float32, sharding=gradient_sharding(name, self._layouts)
            )
            for name, leaf in self.captured.model.params.items()
        }
        sums = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=replicated(self.mesh))
        return Gathered(grads, sums, self.state_shapes.rest)

    @property
    def saved_shapes(self) -> TrainState:
        """What a checkpoint of its state holds, and where it is restored to."""
        return self.state_shapes

    def to_saved(self, state: TrainState) -> TrainState:
        """The state as a checkpoint holds it: one array per leaf."""
        return state

    def from_saved(self, saved: TrainState) -> TrainState:
        """The state from what a checkpoint was restored to."""
        return saved

    def together(self, state: TrainState) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Parameters and other variables, whole, on one device of the first process.

        Where one process has all devices they stay as they lie, unless those share one memory.
        """
        if jax.process_count() == 1:
            if any(device.platform != "cpu" for device in self.used_devices):
                return state.params, state.rest
            return jax.device_put((state.params, state.rest), first_device(self.used_devices))
        here = Layout((Group((self.devices.index(first_device(self.used_devices)),)),))
        unions = self.homes.unions(state)
        go = [p for p in unions if p.startswith((".params", ".rest"))]
        moved = Move(dict.fromkeys(go, here), self.devices)(
            {path: unions[path] for path in go}, donate=False
        )
        params, rest = (
            {name: moved[f".{kind}['{name}']"].arrays[0] for name in getattr(state, kind)}
            for kind in ("params", "rest")
        )
        return params, rest

    def waiting_for(self) -> str:
        """The tasks of a step that have not ended, in words: the step is one task."""
        return "the step"

    def compile(self) -> None:
        """Compiles the step, so that the first one takes no longer than the others."""
        _ = self.compiled_step

    def compile_gather(self) -> None:
        """Compiles what `gather` runs."""
        _ = self._gathering

    def compile_apply(self) -> None:
        """Compiles what `add` and `apply` run."""
        _ = self._adding, self._apply

    @cached_property
    def compiled_step(self) -> Any:
        """The compiled step, a function of (state, placed batch): the first use compiles it."""
        return self.lower_step().compile()

    def lower_step(self) -> Any:
        """The step lowered for this plan's devices but not compiled yet."""
        gather = self._gather

        def step(state: TrainState, batch: Any) -> Any:
            total, weight, rest, grads = gather(state.params, state.rest, batch)
            norm = optax.tree.norm(grads) / weight
            return updated(state, grads, rest, total, weight, norm, self.optimizer, self.options)

        jitted = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings_of(self.state_shapes), replicated(self.mesh)),
        )
        return jitted.lower(self.state_shapes, self._batch_shapes)

    @property
    def _batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        sharding = batch_sharding(self.mesh, self._data_axes, stacked=1)
        stacked = (self.pipeline.num_microbatches, self.pipeline.microbatch)
        return {
            name: jax.ShapeDtypeStruct((*stacked, *leaf.shape[1:]), leaf.dtype, sharding=sharding)
            for name, leaf in self.captured.batch.items()
        }

    @cached_property
    def _gather(self) -> Any:
        return _gather_function(
            self._forward(training=True),
            self.options,
            self._layouts,
            self.pipeline.num_microbatches,
        )

    @cached_property
    def _gathering(self) -> Any:
        def gather(params: Any, rest: Any, batch: Any) -> Gathered:
            total, weight, rest, grads = self._gather(params, rest, batch)
            return Gathered(grads, jnp.stack([total, weight]), rest)

        jitted = jax.jit(gather, out_shardings=shardings_of(self.gathered_shapes))
        shapes = self.state_shapes
        return Ready(jitted, shapes.params, shapes.rest, self._batch_shapes).call

    @cached_property
    def _adding(self) -> Any:
        def add(before: Gathered, new: Gathered) -> Gathered:
            grads = jax.tree.map(jnp.add, before.grads, new.grads)
            return Gathered(grads, before.sums + new.sums, new.rest)

        shapes = self.gathered_shapes
        jitted = jax.jit(add, out_shardings=shardings_of(shapes), donate_argnums=0)
        return Ready(jitted, shapes, shapes).call

    @cached_property
    def _apply(self) -> Any:
        def apply(state: TrainState, gathered: Gathered) -> Any:
            total, weight = gathered.sums
            norm = optax.tree.norm(gathered.grads) / weight
            return updated(
                state, gathered.grads, gathered.rest, total, weight, norm, self.optimizer,
                self.options,
            )  # fmt: skip

        jitted = jax.jit(
            apply,
            donate_argnums=0,
            out_shardings=(shardings_of(self.state_shapes), replicated(self.mesh)),
        )
        return Ready(jitted, self.state_shapes, self.gathered_shapes).call

    @cached_property
    def _evaluate(self) -> Any:
        forward = self._forward(training=False)

        def evaluate(params: Any, rest: Any, batch: Any) -> Any:
            total, weight, _ = forward(_cast(params, self.options.compute_dtype), rest, batch)
            return total, weight

        return in_order(jax.jit(evaluate, out_shardings=replicated(self.mesh)))

    def _forward(self, training: bool) -> Forward:
        program = traced(self.captured, self.pipeline, self.options, training=training)
        return forward_program(program, self._layouts, shortest_loop(self.options))


def _owners(captured: Captured, chosen: Mapping[str, LayerStrategy]) -> dict[str, Any]:
    return {
        name: (parameter, chosen[layer.name])
        for name, layer, parameter in captured.graph.parameters
        if layer.name in chosen or layer.name == OUTSIDE
    }


def _gather_function(
    forward: Forward, options: ProgramOptions, layouts: StageLayouts, microbatches: int
) -> Callable[..., tuple[Any, Any, Any, dict[str, Any]]]:
    """From (params, rest, batch) to (loss sum, weight, rest, gradients) over all micro-batches."""

    def gradients(params: Any, rest: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            total, weight, changed = forward(params, rest, batch)
            return total, (weight, changed)

        (total, (weight, changed)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return total, weight, changed, grads

    def accumulate(params: Any, rest: Any, batch: Any) -> Any:
        if microbatches == 1:
            return gradients(params, rest, jax.tree.map(lambda x: x[0], batch))

        def add(carry: Any, microbatch: Any) -> Any:
            total, weight, rest, grads = carry
            one_total, one_weight, rest, one = gradients(params, rest, microbatch)
            grads = {
                name: constrain(g + one[name].astype(g.dtype), gradient_sharding(name, layouts))
                for name, g in grads.items()
            }
            return (total + one_total, weight + one_weight, rest, grads), None

        zeros = {
            name: constrain(jnp.zeros(p.shape, jnp.float32), gradient_sharding(name, layouts))
            for name, p in params.items()
        }
        start = (jnp.float32(0), jnp.float32(0), rest, zeros)
        return jax.lax.scan(add, start, batch)[0]

    def gather(params: Any, rest: Any, batch: Any) -> Any:
        params = _cast(params, options.compute_dtype)
        total, weight, rest, grads = accumulate(params, rest, batch)
        grads = {
            name: constrain(g.astype(jnp.float32), gradient_sharding(name, layouts))
            for name, g in grads.items()
        }
        return total, weight, rest, grads

    return gather


def _cast(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    kind = np.dtype(jnp.dtype(dtype))
    return {
        name: value.astype(kind) if jnp.issubdtype(value.dtype, jnp.floating) else value
        for name, value in params.items()
    }
