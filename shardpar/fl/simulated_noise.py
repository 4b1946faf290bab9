"""Noise of simulations alone: equal seeds give equal runs, and so it hides nothing from anyone.

Deployments draw theirs by `noise` from the system's randomness.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def simulated_noise(key: jax.Array, tree: Tree, sigma: Any) -> Tree:
    """A tree plus Gaussian noise of a standard deviation, from a seed.

    >>> tree = simulated_noise(jax.random.key(0), {"w": jnp.zeros(3)}, 0.0)
    >>> tree["w"].tolist()
    [0.0, 0.0, 0.0]
    """
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    pairs = zip(keys, leaves, strict=True)
    noisy = [x + sigma * jax.random.normal(k, jnp.shape(x), jnp.float32) for k, x in pairs]
    return jax.tree.unflatten(structure, noisy)


def simulated_sample(key: jax.Array, rows: int, real: jax.Array, rate: float) -> jax.Array:
    """A Poisson sample of the first `real` of so many rows, bool [rows], from a seed."""
    drawn = jax.random.uniform(key, (rows,)) < rate
    return drawn & (jnp.arange(rows) < real)
