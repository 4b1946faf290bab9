"""What a client does between two messages: steps of SGD over its own examples.

The one loop that every algorithm uses. The number of steps is read from the examples while the
program runs, so steps that are only padding cost nothing, and change nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shardpar.fl.examples import Examples
from shardpar.fl.task import Params, Task


class Trained(NamedTuple):
    """What came of local steps.

    Attributes:
      params: after the last step.
      steps: float32 scalar, how many were taken.
      weight: float32 scalar, examples seen; one seen in two epochs counts twice.
      loss: float32 scalar, the sum of the losses of the examples as they were seen.
    """

    params: Params
    steps: jax.Array
    weight: jax.Array
    loss: jax.Array

    def sums(self, start: Params) -> dict[str, Any]:
        """The client's message in federated averaging: its difference times its examples."""
        delta = jax.tree.map(lambda new, old: self.weight * (new - old), self.params, start)
        return {"delta": delta, "weight": self.weight, "loss": self.loss}

    def alone(self, start: Params) -> dict[str, Any]:
        """The client's message where clients count alike: its difference as it is."""
        delta = jax.tree.map(jnp.subtract, self.params, start)
        return {"delta": delta, "weight": self.weight, "loss": self.loss}


def local_sgd(
    task: Task,
    start: Params,
    examples: Examples,
    *,
    learning_rate: float,
    momentum: float = 0.0,
    pull: float = 0.0,
    towards: Params | None = None,
    correction: Params | None = None,
) -> Trained:
    """Goes through a client's examples in their order.

    A step is `v = momentum v + g`, `w = w - learning_rate v`, where g is the gradient of the
    batch's mean loss, plus `pull (w - towards)`, plus `correction`.

    Args:
      task: the model and its loss.
      start: parameters before the first step.
      examples: one client's; steps without any example are left out, wherever they are.
      learning_rate: of every step.
      momentum: 0 is plain SGD.
      pull: strength of the proximal term; 0 leaves it out of the program.
      towards: what it pulls to; `start` if None.
      correction: added to every gradient (a control variate); None adds nothing.
    """
    order = examples.order
    weight = jnp.sum(order >= 0).astype(jnp.float32)
    active = jnp.any(order >= 0, axis=1)
    steps = jnp.sum(active).astype(jnp.float32)
    if order.shape[0] == 0:
        return Trained(start, steps, weight, jnp.float32(0))
    last = jnp.max(jnp.where(active, jnp.arange(1, order.shape[0] + 1), 0))
    anchor = start if towards is None else towards

    def step(i: jax.Array, carry: tuple[Params, Any, jax.Array]) -> tuple[Params, Any, jax.Array]:
        params, velocity, loss = carry
        grads, sum_, _ = task.gradient(params, examples.batch(order[i]))
        if pull:
            grads = jax.tree.map(lambda g, p, a: g + pull * (p - a), grads, params, anchor)
        if correction is not None:
            grads = jax.tree.map(jnp.add, grads, correction)
        if momentum:
            grads = jax.tree.map(lambda v, g: momentum * v + g, velocity, grads)
        stepped = jax.tree.map(lambda p, g: p - learning_rate * g, params, grads)

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(active[i], n, o), new, old)

        return (
            kept(stepped, params),
            kept(grads, velocity) if momentum else velocity,
            loss + jnp.where(active[i], sum_, 0.0),
        )

    velocity = jax.tree.map(jnp.zeros_like, start) if momentum else ()
    params, _, loss = jax.lax.fori_loop(0, last, step, (start, velocity, jnp.float32(0)))
    return Trained(params, steps, weight, loss)
