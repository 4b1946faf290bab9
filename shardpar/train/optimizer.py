"""Decides how a gradient becomes a step: the learning rate over time, and the optax rule."""

from __future__ import annotations

from typing import Any

import jax
import optax

from shardpar.errors import ConfigError
from shardpar.train.options import OptimizerOptions


def schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """The learning rate of each step, counted from 0.

    Warm-up rises in equal parts and reaches the peak with its last step, so that no step is
    spent at rate zero; the rest falls from the peak to `final_fraction` of it, which it
    reaches at `decay_steps` and then keeps.

    Args:
      options: section `optimizer` of a config.
      steps: of the whole run; where the schedule ends unless `decay_steps` says otherwise.

    Raises:
      ConfigError: the warm-up leaves no step to decay in.

    >>> rate = schedule(OptimizerOptions(learning_rate=1.0, warmup_steps=2), steps=12)
    >>> [round(float(rate(step)), 3) for step in (0, 1, 2, 7, 12, 99)]
    [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]
    """
    peak, warmup = options.learning_rate, options.warmup_steps
    decay = options.decay_end(steps) - warmup
    if options.schedule == "constant":
        falling = optax.constant_schedule(peak)
    elif decay <= 0:
        raise ConfigError(
            f"optimizer.warmup_steps is {warmup}, but the {options.schedule} schedule ends at "
            f"step {options.decay_steps} (optimizer.decay_steps) and must "
            "decay in between; lower optimizer.warmup_steps, or write optimizer.schedule=constant"
        )
    elif options.schedule == "cosine":
        falling = optax.cosine_decay_schedule(peak, decay, alpha=options.final_fraction)
    else:
        falling = optax.linear_schedule(peak, peak * options.final_fraction, decay)
    if not warmup:
        return falling
    part = peak / warmup
    return optax.join_schedules(
        [optax.linear_schedule(part, peak + part, warmup), falling], [warmup]
    )


def matrices(params: Any) -> Any:
    """Which parameters decay: those of two and more dims, not biases and norms' scales."""
    return jax.tree.map(lambda param: param.ndim >= 2, params)


def make_optimizer(options: OptimizerOptions, steps: int) -> optax.GradientTransformation:
    """The optax rule that `options` name, with its schedule and its decoupled weight decay.

    Gradients are clipped by the program, not here. Parameters are told apart by their dims,
    so the tree must hold each layer's arrays as the model has them, not stacked for a scan.

    Args:
      options: section `optimizer` of a config.
      steps: of the whole run.

    Raises:
      ConfigError: the schedule contradicts itself.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> rule = make_optimizer(OptimizerOptions(schedule="constant", learning_rate=0.5), 10)
    >>> still = jax.tree.map(jnp.zeros_like, params)
    >>> steps, _ = rule.update(still, rule.init(params), params)
    >>> round(float(steps["kernel"][0, 0]), 3), float(steps["bias"][0]) + 0.0
    (-0.05, 0.0)
    """
    rate = schedule(options, steps)
    if options.name == "adamw":
        return optax.adamw(
            rate,
            b1=options.b1,
            b2=options.b2,
            eps=options.eps,
            weight_decay=options.weight_decay,
            mask=matrices,
        )
    if options.name == "lion":
        return optax.lion(
            rate, b1=options.b1, b2=options.b2, weight_decay=options.weight_decay, mask=matrices
        )
    if options.name == "sgd":
        return optax.chain(
            optax.trace(options.momentum) if options.momentum else optax.identity(),
            optax.add_decayed_weights(options.weight_decay, matrices),
            optax.scale_by_learning_rate(rate),
        )
    # Optax's own adafactor decays by a fixed share per step whatever the learning rate; its
    # result is a descent direction already, hence the sign of the decay.
    return optax.chain(
        optax.adafactor(learning_rate=None),
        optax.add_decayed_weights(-options.weight_decay, matrices),
        optax.scale_by_schedule(rate),
    )
