"""Krum and multi-Krum: only updates that lie close to most others are believed.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent" (2017),
section 4. The server must see every update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shardpar.fl.algorithms.plain import Robust, moved
from shardpar.fl.task import Params

Tree = Any


@dataclass(frozen=True)
class Krum(Robust):
    """The server moves by the mean of the `chosen` updates with the lowest scores.

    An update's score is the sum of its squared distances to the n - byzantine - 2 nearest others
    of n updates. The paper needs n > 2 byzantine + 2.

    Attributes:
      byzantine: how many clients of a round may be wrong; the paper's f.
      chosen: how many updates are averaged: 1 is Krum, more is multi-Krum.
      learning_rate: of the clients' steps.
      server_learning_rate: by how much of the result the global model moves.
      momentum: of the clients' steps.
    """

    byzantine: int = 1
    chosen: int = 1
    learning_rate: float = 0.1
    server_learning_rate: float = 1.0
    momentum: float = 0.0

    def server(self, state: Tree, total: Tree, clients: Any) -> Tree:
        """Moves by the mean of the believed updates; those without examples are not counted."""
        there = total["weight"] > 0
        score = scores(total["delta"], there, self.byzantine)
        rank = jnp.argsort(jnp.argsort(score))
        believed = ((rank < self.chosen) & there).astype(jnp.float32)
        share = believed / jnp.maximum(jnp.sum(believed), 1.0)

        def mean(updates: jax.Array) -> jax.Array:
            # A wrong update may hold infinities, which 0 does not multiply away.
            shown = believed.reshape(-1, *[1] * (updates.ndim - 1)) > 0
            return jnp.tensordot(share, jnp.where(shown, updates, 0.0), 1)

        delta = jax.tree.map(mean, total["delta"])
        return {**state, "params": moved(state["params"], delta, self.server_learning_rate)}


def scores(updates: Params, there: jax.Array, byzantine: int) -> jax.Array:
    """Krum's score of each update, float32 [clients]; infinite for those that are not there.

    >>> rows = {"w": jnp.array([[0.0], [1.0], [2.0], [50.0]])}
    >>> scores(rows, jnp.ones(4, bool), 1)
    Array([1.000e+00, 1.000e+00, 1.000e+00, 2.304e+03], dtype=float32)
    """
    count = there.shape[0]

    def distances(one: jax.Array) -> jax.Array:
        """From update `one` to all; row by row, since Gram matrices cancel where it matters."""
        parts = [jnp.sum((x - x[one]) ** 2, axis=tuple(range(1, x.ndim))) for x in updates.values()]
        total = sum(parts, jnp.zeros(count))
        return jnp.where(jnp.isfinite(total), total, jnp.inf)

    square = jax.lax.map(distances, jnp.arange(count))
    others = there[None, :] & there[:, None] & ~jnp.eye(count, dtype=bool)
    ordered = jnp.sort(jnp.where(others, square, jnp.inf), axis=1)
    nearest = jnp.maximum(jnp.sum(there) - byzantine - 2, 1)
    near = jnp.arange(count)[None, :] < nearest
    return jnp.where(there, jnp.sum(jnp.where(near, ordered, 0.0), axis=1), jnp.inf)
