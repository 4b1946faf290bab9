"""Coordinate-wise median and trimmed mean: a few wrong updates cannot carry the model away.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (2018), arXiv
1803.01498, definitions 1 and 2. Clients count alike, and the server must see every update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from shardpar.fl.algorithms.plain import Robust, moved

Tree = Any


@dataclass(frozen=True)
class Coordinatewise(Robust):
    """The server moves by the median, or a trimmed mean, of each coordinate over the clients.

    Attributes:
      keep: "median", or "trimmed": the mean of what is left when at both ends a share is cut off.
      trim: that share; it should be no less than the share of clients that may be wrong.
      learning_rate: of the clients' steps.
      server_learning_rate: by how much of the result the global model moves.
      momentum: of the clients' steps.
    """

    keep: Literal["median", "trimmed"] = "median"
    trim: float = 0.1
    learning_rate: float = 0.1
    server_learning_rate: float = 1.0
    momentum: float = 0.0

    def server(self, state: Tree, total: Tree, clients: Any) -> Tree:
        """Moves by the robust mean; updates without examples are not counted."""
        there = total["weight"] > 0
        middle = median if self.keep == "median" else self._trimmed
        delta = jax.tree.map(lambda updates: middle(updates, there), total["delta"])
        return {**state, "params": moved(state["params"], delta, self.server_learning_rate)}

    def _trimmed(self, updates: jax.Array, there: jax.Array) -> jax.Array:
        return trimmed_mean(updates, there, self.trim)


def median(updates: jax.Array, there: jax.Array) -> jax.Array:
    """The median over the first dim, of the rows that are there; 0 where none is.

    >>> median(jnp.array([[1.0], [5.0], [9.0], [7.0]]), jnp.array([True, True, False, True]))
    Array([5.], dtype=float32)
    """
    ordered, count = _ordered(updates, there)
    low, high = jnp.maximum(count - 1, 0) // 2, count // 2
    return jnp.where(count > 0, (ordered[low] + ordered[high]) / 2, 0.0)


def trimmed_mean(updates: jax.Array, there: jax.Array, trim: float) -> jax.Array:
    """The mean over the first dim, of the rows that are there but ⌊trim · rows⌋ at either end.

    >>> rows = jnp.array([[1.0], [2.0], [4.0], [90.0]])
    >>> trimmed_mean(rows, jnp.ones(4, bool), 0.25)
    Array([3.], dtype=float32)
    """
    ordered, count = _ordered(updates, there)
    # What is 3 to a person may be 2.9999999 here.
    cut = jnp.floor(trim * count + 1e-4).astype(jnp.int32)
    rank = jnp.arange(updates.shape[0]).reshape(-1, *[1] * (updates.ndim - 1))
    kept = (rank >= cut) & (rank < count - cut)
    total = jnp.sum(jnp.where(kept, ordered, 0.0), axis=0)
    return total / jnp.maximum(count - 2 * cut, 1)


def _ordered(updates: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rows that are there sorted to the front, coordinate by coordinate; and how many."""
    shown = there.reshape(-1, *[1] * (updates.ndim - 1))
    return jnp.sort(jnp.where(shown, updates, jnp.inf), axis=0), jnp.sum(there)
