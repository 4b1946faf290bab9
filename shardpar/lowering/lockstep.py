"""What every device of a single_jit pipeline computes: all stages in lockstep, tick by tick.

On tick t stage s has micro-batch t - s; between ticks activations go one stage on. The first
layers and the last ones are shared out: each stage does them for its part of the micro-batches,
so that no stage waits while another embeds or computes logits, and none holds the logits of
more than one micro-batch. (The loop over ticks is GSPMD's, Xu et al., arXiv 2105.04663.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shardpar.lowering.equal_segments import EqualSegments
from shardpar.lowering.shardings import constrain
from shardpar.lowering.stage_programs import Arrays, StagePrograms
from shardpar.lowering.state import gradient_sharding


@dataclass(frozen=True, eq=False)
class Lockstep:
    """The maths of a pipeline of equal stages, to be run inside a `shard_map` over them.

    Attributes:
      equal: how the model is cut.
      lead, first, tail: the equations of the first layers, of any stage, of the last layers;
        their weights are float32 and cast where they are used, so that gradients of several
        micro-batches are summed in float32.
      axis: the mesh's, over stages.
      dtype: that layers compute in.
    """

    equal: EqualSegments
    lead: StagePrograms
    first: StagePrograms
    tail: StagePrograms
    axis: str
    dtype: str

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.equal.cut.stages) - 2

    def gradients(
        self, params: Mapping[str, Any], rest: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> tuple[Any, Any, Arrays, Arrays]:
        """(loss sum, weight, variables afterwards, gradients in float32) of some micro-batches.

        Args:
          params: those outside the stages, and this stage's under the names of the first one's.
          rest: the model's other variables, of all stages.
          batch: arrays [micro-batches, ...], whole on every stage.
        """
        count = next(iter(batch.values())).shape[0]
        mine = count // self.stages
        counted, after = self._counted(rest, count)
        here = self._stage() * mine + jnp.arange(mine)
        weights = [stage.prepare(params) for stage in (self.lead, self.first, self.tail)]

        def lead(weights: Any) -> list[Any]:
            return jax.lax.map(lambda m: self._lead(weights, counted, batch, m), here)

        entered, of_lead = jax.vjp(lead, weights[0])
        entering = [self._gathered(entered[i]) for i in self.equal.enters]

        def pipeline(weights: Any, entering: Any) -> list[Any]:
            return self._ticks(weights, entering, counted, batch, count)

        made, of_pipeline = jax.vjp(pipeline, weights[1], entering)
        left = [self._shared_out(made[i], self.stages - 1) for i in self.equal.leaves]
        skipped = [entered[i] for i, _ in self.equal.around]

        def tail(carry: Any, x: Any) -> Any:
            m, left, skipped = x

            def loss(weights: Any, left: Any, skipped: Any) -> Any:
                return self._tail(weights, counted, batch, m, left, skipped)

            (total, weight), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
                weights[2], left, skipped
            )
            carry = jax.tree.map(jnp.add, carry, (total, weight, grads[0]))
            return carry, grads[1:]

        zero = jnp.float32(0)
        start = (zero, zero, jax.tree.map(jnp.zeros_like, weights[2]))
        (total, weight, to_tail), (back, around) = jax.lax.scan(tail, start, (here, left, skipped))
        last = self._stage() == self.stages - 1
        cotangents = [jnp.zeros_like(x) for x in made]
        for i, x in zip(self.equal.leaves, back, strict=True):
            x = self._gathered(x)
            cotangents[i] = jnp.where(last, x, jnp.zeros_like(x))
        to_first, returned = of_pipeline(cotangents)
        cotangents = [jnp.zeros_like(x) for x in entered]
        for i, x in zip(self.equal.enters, returned, strict=True):
            cotangents[i] += self._shared_out(x, 0)
        for (i, _), x in zip(self.equal.around, around, strict=True):
            cotangents[i] += x
        (to_lead,) = of_lead(cotangents)
        total, weight = jax.lax.psum((total, weight), self.axis)
        return total, weight, after, self._gathered_gradients(params, to_lead, to_first, to_tail)

    def evaluate(
        self, params: Mapping[str, Any], rest: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        """(loss sum, weight) of one micro-batch, whose ends every stage computes."""
        batch = {name: x[None] for name, x in batch.items()}
        counted, _ = self._counted(rest, 1)
        weights = [stage.prepare(params) for stage in (self.lead, self.first, self.tail)]
        entered = self._lead(weights[0], counted, batch, 0)
        entering = [entered[i][None] for i in self.equal.enters]
        made = self._ticks(weights[1], entering, counted, batch, 1)
        left = [jax.lax.all_gather(made[i], self.axis)[-1, 0] for i in self.equal.leaves]
        skipped = [entered[i] for i, _ in self.equal.around]
        return self._tail(weights[2], counted, batch, 0, left, skipped)

    def _stage(self) -> Any:
        return jax.lax.axis_index(self.axis)

    def _counted(self, rest: Mapping[str, Any], count: int) -> tuple[Arrays, Arrays]:
        """The model's other variables before each micro-batch, stacked, and after all."""

        def one(now: Arrays, _: Any) -> Any:
            return {**now, **self.equal.cut.advance(now)}, now

        after, before = jax.lax.scan(one, dict(rest), length=count)
        return before, after

    def _cast(self, weights: Mapping[str, Any]) -> Arrays:
        return {
            key: x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
            for key, x in weights.items()
        }

    def _lead(self, weights: Any, counted: Any, batch: Any, m: Any) -> list[Any]:
        rest, given = _at(counted, m), _at(batch, m)
        return self.lead.compute(self._cast(weights), rest, given, [])[0]

    def _tail(
        self, weights: Any, counted: Any, batch: Any, m: Any, left: Any, skipped: Any
    ) -> tuple[Any, Any]:
        received: list[Any] = [None] * (len(left) + len(skipped))
        for n, x in zip(self.equal.arrives, left, strict=True):
            received[n] = x
        for (_, n), x in zip(self.equal.around, skipped, strict=True):
            received[n] = x
        rest, given = _at(counted, m), _at(batch, m)
        _, total, weight, _ = self.tail.compute(self._cast(weights), rest, given, received)
        return jnp.float32(total), jnp.float32(weight)

    def _ticks(
        self, weights: Any, entering: Sequence[Any], counted: Any, batch: Any, count: int
    ) -> list[Any]:
        """What this stage makes of each micro-batch; of use on the last stage only."""
        stage, ahead = self._stage(), [(s, s + 1) for s in range(self.stages - 1)]
        # A stage computes on every tick. What it is given where it has no micro-batch leads
        # nowhere, but it must be numbers of which no gradient is infinite.
        fed = [jnp.concatenate([x, *[x[-1:]] * (self.stages - 1)]) for x in entering]
        first = {name: batch[name] for name in self.first.segment.batch}

        def tick(arrived: Any, x: Any) -> Any:
            t, fed = x
            m = t - stage
            own = (stage > 0) & (m >= 0) & (m < count)
            received = [jnp.where(own, a, f) for a, f in zip(arrived, fed, strict=True)]
            m = jnp.clip(m, 0, count - 1)
            rest, given = self._own_rest(_at(counted, m)), _at(first, m)
            made = self.first.compute(self._cast(weights), rest, given, received)[0]
            made = [made[i] for i in self.equal.passes]
            return [jax.lax.ppermute(x, self.axis, ahead) for x in made], made

        start = [jnp.zeros_like(x[0]) for x in entering]
        _, made = jax.lax.scan(tick, start, (jnp.arange(count + self.stages - 1), fed))
        return [x[self.stages - 1 :] for x in made]

    def _own_rest(self, rest: Arrays) -> Arrays:
        """The other variables, this stage's in the places of the first one's."""
        stage = self._stage()
        return rest | {
            name: jnp.stack([rest[other] for other in names])[stage]
            for name, names in self.equal.rest.items()
        }

    def _gathered(self, x: Any) -> Any:
        """All micro-batches, of each stage's."""
        return jax.lax.all_gather(x, self.axis, tiled=True)

    def _shared_out(self, x: Any, source: int) -> Any:
        """Each stage's micro-batches, of all those that one stage has."""
        parts = x.reshape(self.stages, -1, *x.shape[1:])
        return jax.lax.all_to_all(parts, self.axis, 0, 0)[source]

    def _gathered_gradients(
        self, params: Mapping[str, Any], to_lead: Any, to_first: Any, to_tail: Any
    ) -> Arrays:
        shared: Arrays = {}
        for stage, grads in ((self.lead, to_lead), (self.tail, to_tail)):
            for name, g in stage.gradients(grads).items():
                shared[name] = shared[name] + g if name in shared else g
        out = {**jax.lax.psum(shared, self.axis), **self.first.gradients(to_first)}
        return {
            name: constrain(
                out[name].astype(jnp.float32)
                if name in out
                else jnp.zeros(params[name].shape, jnp.float32),
                gradient_sharding(name, self.first.layouts),
            )
            for name in params
        }


def _at(arrays: Mapping[str, Any], m: Any) -> Arrays:
    return {name: jax.lax.dynamic_index_in_dim(x, m, keepdims=False) for name, x in arrays.items()}
