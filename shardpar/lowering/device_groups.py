"""What a group of devices does once a step: its weights before the micro-batches, its update after.

A group holds one stage of a pipeline, or several where the schedule is interleaved. Each
parameter is held once per group, whichever of its stages read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from shardpar.capture.segments import Segments
from shardpar.capture.trace import Captured
from shardpar.lowering.elsewhere import in_order, is_here
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.ready import Ready
from shardpar.lowering.shardings import constrain, replicated
from shardpar.lowering.stage_programs import Arrays, StagePrograms
from shardpar.lowering.stages import StageLayouts
from shardpar.lowering.state import (
    Gathered,
    TrainState,
    gradient_sharding,
    shardings_of,
    state_shapes,
)
from shardpar.lowering.update import updated
from shardpar.spec.layout import Spans


class GroupPrograms:
    """The stages of one group and the programs they share.

    Attributes:
      pipeline, number: which group of which pipeline.
      mesh, devices: where it is; the devices as numbers of the cluster.
      is_here: whether any of its devices is this process's.
      stages: its stages' programs, by the stage's number.
      names: the parameters it holds.
      regions: of parameters whose optimizer state it has a slice of only, the indices it has
        of each dim.
    """

    def __init__(
        self,
        captured: Captured,
        optimizer: optax.GradientTransformation,
        options: ProgramOptions,
        pipeline: int,
        number: int,
        layouts: Mapping[int, StageLayouts],
        cut: Segments,
        min_run: int,
        orphans: Sequence[str] = (),
    ) -> None:
        """Gathers what the group's stages read.

        Args:
          captured: the model.
          optimizer: any optax rule that updates each parameter from itself alone.
          options: dtype, loops, clipping.
          pipeline: the pipeline's number.
          number: the group's, in the pipeline.
          layouts: of its stages, by their numbers.
          cut: the program in segments, for the pipeline's micro-batches.
          min_run: chains of at least so many equal layers become one loop.
          orphans: parameters that no stage reads, which this group keeps.
        """
        self.captured, self.optimizer, self.options = captured, optimizer, options
        self.pipeline, self.number, self.cut = pipeline, number, cut
        first = next(iter(layouts.values()))
        self.layouts, self.mesh, self.devices = first, first.mesh, first.stage.devices
        self.stages = {
            s: StagePrograms(cut, s, of_stage, min_run, options.compute_dtype)
            for s, of_stage in layouts.items()
        }
        self.whole = replicated(self.mesh)
        self.is_here = is_here(list(self.mesh.devices.flat))
        held = {name for s in self.stages for name in cut.stages[s].params} | set(orphans)
        self.names = tuple(name for name in captured.model.params if name in held)
        local = {name for s in self.stages for name in cut.stages[s].local}
        self.rest_names = tuple(
            name for name in captured.model.rest if name in cut.counters or name in local
        )
        self.regions: Mapping[str, tuple[Spans, ...]] = {}

    @cached_property
    def shapes(self) -> TrainState:
        """ShapeDtypeStructs of the group's part of the state."""
        return state_shapes(
            self.captured.model, self.optimizer, self.layouts, self.names, self.rest_names,
            {name: size_of(region) for name, region in self.regions.items()},
        )  # fmt: skip

    def gradient_sharding(self, name: str) -> NamedSharding:
        """How the gradient of a parameter lies here when the optimizer reads it."""
        return gradient_sharding(name, self.layouts)

    @cached_property
    def init(self) -> Callable[[Any], TrainState]:
        """The group's part of a fresh state, from a uint32 seed; no other part is computed."""

        def init(seed: jax.Array) -> TrainState:
            params, rest = self.captured.model.create(seed)
            mine = {name: constrain(params[name], self.layouts.stored(name)) for name in self.names}
            return TrainState(
                mine,
                self.optimizer.init({name: self._slice(name, x) for name, x in mine.items()}),
                {name: rest[name] for name in self.rest_names},
                jnp.int32(0),
            )

        return in_order(jax.jit(init, out_shardings=shardings_of(self.shapes)))

    def _slice(self, name: str, whole: Any) -> Any:
        """What the group updates of a parameter."""
        for dim, spans in enumerate(self.regions.get(name, ())):
            if spans != ((0, whole.shape[dim]),):
                parts = [jax.lax.slice_in_dim(whole, a, b, axis=dim) for a, b in spans]
                whole = jnp.concatenate(parts, axis=dim)
        return whole

    @cached_property
    def prepare(self) -> Ready:
        """From parameters to (each stage's weights, zeros to gather gradients in, zero sums)."""

        def prepare(params: Mapping[str, Any]) -> Any:
            weights = {s: stage.prepare(params) for s, stage in self.stages.items()}
            zeros = {
                s: {
                    key: constrain(jnp.zeros(g.shape, g.dtype), g.sharding)
                    for key, g in stage.gradient_shapes().items()
                }
                for s, stage in self.stages.items()
            }
            return weights, zeros, jnp.zeros(2, jnp.float32)

        weights, gathered = (
            jax.tree.map(lambda x: x.sharding, shapes)
            for shapes in (self._weight_shapes, self._gathered_shapes)
        )
        jitted = jax.jit(prepare, out_shardings=(weights, gathered, self.whole))
        return Ready(jitted, self.shapes.params)

    @property
    def _weight_shapes(self) -> Any:
        return {s: stage.weight_shapes for s, stage in self.stages.items()}

    @property
    def _gathered_shapes(self) -> Any:
        return {s: stage.gradient_shapes() for s, stage in self.stages.items()}

    def _scalars(self, count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count,), jnp.float32, sharding=self.whole)

    @cached_property
    def finished_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """ShapeDtypeStructs of its addends of gradients, each of a whole parameter."""
        return {
            name: jax.ShapeDtypeStruct(
                self.captured.model.params[name].shape,
                jnp.float32,
                sharding=self.gradient_sharding(name),
            )
            for name in self.names
        }

    @cached_property
    def gathered_shapes(self) -> Gathered:
        """ShapeDtypeStructs of what the group has gathered in a step, summed over groups."""
        grads = {name: self._sliced(name, s) for name, s in self.finished_shapes.items()}
        return Gathered(grads, self._scalars(2), self.shapes.rest)

    @cached_property
    def update_shapes(self) -> TrainState:
        """ShapeDtypeStructs of what its update reads and makes: of parameters, what it updates."""
        params = {
            name: self._sliced(name, shape, self.gradient_sharding(name))
            for name, shape in self.shapes.params.items()
        }
        return replace(self.shapes, params=params)

    def _sliced(
        self, name: str, whole: jax.ShapeDtypeStruct, sharding: NamedSharding | None = None
    ) -> jax.ShapeDtypeStruct:
        if name not in self.regions:
            return whole
        size = size_of(self.regions[name])
        return jax.ShapeDtypeStruct(size, whole.dtype, sharding=sharding or whole.sharding)

    @property
    def sums_shape(self) -> jax.ShapeDtypeStruct:
        """Of [loss, weight, squares]."""
        return self._scalars(3)

    @cached_property
    def finish(self) -> Ready:
        """From the gradients of its stages' weights to those of its parameters."""

        def finish(gathered: Any) -> Any:
            grads: Arrays = {}
            for s, stage in self.stages.items():
                for name, g in stage.gradients(gathered[s]).items():
                    grads[name] = grads[name] + g if name in grads else g
            for name, shape in self.finished_shapes.items():
                grads.setdefault(name, jnp.zeros(shape.shape, shape.dtype))
            return grads

        out = {name: self.gradient_sharding(name) for name in self.names}
        jitted = jax.jit(finish, out_shardings=out)
        return Ready(jitted, self._gathered_shapes)

    @cached_property
    def add(self) -> Ready:
        """Sums two gradients of each parameter."""

        def add(one: Any, other: Any) -> Any:
            return jax.tree.map(jnp.add, one, other)

        shapes = self.gathered_shapes.grads
        out = {name: shape.sharding for name, shape in shapes.items()}
        return Ready(jax.jit(add, out_shardings=out, donate_argnums=0), shapes, shapes)

    def squares(self, counts: Sequence[str]) -> Ready:
        """From [loss, weight] and gradients to [loss, weight, sum of their squares].

        Args:
          counts: the parameters whose squares this group adds.
        """

        def squares(sums: Any, grads: Mapping[str, Any]) -> Any:
            total = sum((jnp.sum(jnp.square(g)) for g in grads.values()), jnp.float32(0))
            return jnp.concatenate([sums, total[None]])

        jitted = jax.jit(squares, out_shardings=self.whole)
        shapes = {name: self.gathered_shapes.grads[name] for name in counts}
        return Ready(jitted, self._scalars(2), shapes)

    @cached_property
    def advance(self) -> Ready | None:
        """From the counters of random keys and a number to the counters after so many
        micro-batches; None where there are none.
        """
        if not self.cut.counters:
            return None

        def advance(counters: Any, k: Any) -> Any:
            return jax.lax.fori_loop(0, k, lambda _, c: self.cut.advance(c), counters)

        shapes = {name: self.shapes.rest[name] for name in self.cut.counters}
        jitted = jax.jit(advance, out_shardings=self.whole)
        return Ready(jitted, shapes, jax.ShapeDtypeStruct((), jnp.int32))

    @cached_property
    def update(self) -> Ready:
        """(state, grads, [loss, weight, squares] of all, variables after) to (state, metrics)."""

        def update(state: TrainState, grads: Any, sums: Any, rest: Any) -> Any:
            total, weight = sums[0], sums[1]
            norm = jnp.sqrt(sums[2]) / weight
            return updated(
                state, grads, rest, total, weight, norm, self.optimizer, self.options
            )  # fmt: skip

        state, grads = self.update_shapes, self.gathered_shapes.grads
        jitted = jax.jit(update, out_shardings=(shardings_of(state), self.whole), donate_argnums=0)
        return Ready(jitted, state, grads, self._scalars(3), self.shapes.rest)


def size_of(region: tuple[Spans, ...]) -> tuple[int, ...]:
    """The shape of the indices of each dim.

    >>> size_of((((0, 2), (4, 6)), ((0, 3),)))
    (4, 3)
    """
    return tuple(sum(stop - start for start, stop in spans) for spans in region)
