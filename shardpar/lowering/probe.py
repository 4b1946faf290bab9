"""How fast each device of this process is now: a product of matrices, timed on each in turn.

Steps say how long a whole group took, and a group waits for its slowest device; a probe says
which one that is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

SIDE = 2048
"""Rows and columns: enough for an accelerator to reach its rate, and milliseconds of work."""
REPEATS = 3


def probe_s(
    devices: Mapping[int, jax.Device], side: int = SIDE, repeats: int = REPEATS
) -> dict[int, float]:
    """Seconds of one product on each device that is of this process, by its number.

    Args:
      devices: by number; they must have nothing to do.
      side: rows and columns of the matrices, float32.
      repeats: the quickest of so many counts, after one that warms up.

    >>> list(probe_s({0: jax.devices()[0]}, side=64))
    [0]
    """
    out = {}
    for number, device in devices.items():
        if device.process_index != jax.process_index():
            continue
        matrix = jax.device_put(jnp.ones((side, side), jnp.float32), device)
        jax.block_until_ready(_product(matrix))
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            jax.block_until_ready(_product(matrix))
            times.append(time.perf_counter() - begun)
        out[number] = min(times)
    return out


@jax.jit
def _product(matrix: jax.Array) -> jax.Array:
    return matrix @ matrix


def product_flops(side: int = SIDE) -> float:
    """Operations of one product."""
    return 2.0 * side**3
