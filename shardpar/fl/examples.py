"""One client's examples and the order in which it goes through them, whatever they are padded to.

The order comes from (seed, round, client) alone, so a client alone in its process and one among
thousands in a simulation take the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Examples:
    """A client's data for one round, as a client's program reads it.

    Attributes:
      arrays: each of shape [rows, ...]; only rows that `order` names are the client's. Others are
        padding, or in a simulation other clients'.
      order: int32 [steps, batch], rows of `arrays`; -1 is padding. A step of nothing but padding
        changes nothing.
    """

    arrays: Mapping[str, Any]
    order: Any

    def batch(self, rows: jax.Array) -> dict[str, jax.Array]:
        """The batch of these rows [batch], with `weights`: 1 for a real row and 0 for padding.

        Where the arrays have `weights` of their own, those of real rows are kept.
        """
        real = rows >= 0
        at = jnp.where(real, rows, 0)
        batch = {name: array[at] for name, array in self.arrays.items()}
        weights = batch.get("weights", jnp.ones(rows.shape, jnp.float32))
        shown = real.reshape(-1, *[1] * (weights.ndim - 1))
        return {**batch, "weights": jnp.where(shown, weights, 0.0)}


def order_of(
    examples: int, *, batch: int, epochs: int, seed: int, round_: int, client: int
) -> np.ndarray:
    """The rows of each step, int32 [epochs * ceil(examples / batch), batch].

    Each epoch is a permutation of its own; its last batch may be part padding (-1).

    >>> order_of(3, batch=2, epochs=1, seed=0, round_=0, client=0).shape
    (2, 2)
    >>> sorted(order_of(3, batch=2, epochs=1, seed=0, round_=0, client=0).ravel().tolist())
    [-1, 0, 1, 2]
    """
    steps = -(-examples // batch)
    order = np.full((epochs, steps * batch), -1, np.int32)
    # Which examples a client reads first is no secret: where privacy comes from sampling them
    # (DP-SGD), `privacy` draws the sample itself.
    draw = np.random.Generator(
        np.random.Philox(key=np.array([seed, (round_ << 32) | client], np.uint64))
    )
    for epoch in range(epochs):
        order[epoch, :examples] = draw.permutation(examples)
    return order.reshape(epochs * steps, batch)
