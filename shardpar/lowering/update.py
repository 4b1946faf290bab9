"""From summed gradients to the next state: one division by the global weight, clipping, the rule.

The same for a plan of one jit and for the stages of many: what differs is who summed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.state import TrainState


def updated(
    state: TrainState,
    grads: Mapping[str, Any],
    rest: Any,
    total: Any,
    weight: Any,
    norm: Any,
    optimizer: optax.GradientTransformation,
    options: ProgramOptions,
) -> tuple[TrainState, dict[str, Any]]:
    """The state after a step, and its metrics.

    Args:
      state: before the step.
      grads: of the loss sum, float32, by parameter.
      rest: the model's other variables after the step.
      total: the loss sum over the whole batch.
      weight: what it is to be divided by.
      norm: of all parameters' gradients, divided by the weight.
      optimizer: the rule.
      options: clipping, and what to do where a gradient is not finite.
    """
    # One global weight: micro-batches with more tokens count for more.
    scale = 1.0 / weight
    if options.gradient_clip is not None:
        scale *= jnp.minimum(1.0, options.gradient_clip / jnp.maximum(norm, 1e-16))
    grads = jax.tree.map(lambda g: g * scale, dict(grads))
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    after = TrainState(params, optimizer_state, rest, state.step + 1)
    metrics = {"loss": total / weight, "weight": weight, "grad_norm": norm}
    metrics["skipped"] = jnp.int32(0)
    if options.skip_nonfinite:
        finite = jnp.isfinite(norm) & jnp.isfinite(total)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        metrics["skipped"] = 1 - finite.astype(jnp.int32)
    return after, metrics
