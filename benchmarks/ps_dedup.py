"""Finding distinct ids and summing their gradients: 160,000 Zipf ids, rows of 16 numbers.

    python -m benchmarks.ps_dedup [--ids N] [--dim N] [--json]

CPU-milliseconds of the whole process, the least of many turns in which all take part. Ours are
the program's way, which keeps a scratch of one number per row of the table, and the host's,
which finds ids with NumPy and leaves the sum to a program. Peers: sorting inside a program,
jnp.unique, NumPy, and torch's `coalesce` if it is installed. All sums are compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardpar.lowering.allocator import keep_freed_memory
from shardpar.ps.dedup import HostDedup, padded, rounded_size, sorted_representatives
from shardpar.ps.exchange import summed

ROWS, TURNS = 1 << 20, 40


def zipf_ids(count: int) -> np.ndarray:
    """Ids of which few are frequent, hashed over all rows; about a fifth are distinct."""
    drawn = np.random.default_rng(0).zipf(1.2, count) % 50_000
    return (drawn * 2_654_435_761 % ROWS).astype(np.int32)


def in_program(ids: np.ndarray, gradient: np.ndarray) -> Callable[[], tuple[Any, Any]]:
    """The way of `Exchange.push`: a scratch that is written and read, no sort."""
    run = jax.jit(summed, donate_argnums=2)
    held = [jnp.zeros(ROWS, jnp.int32)]
    at, parts = jax.device_put((ids, gradient))

    def turn() -> tuple[Any, Any]:
        places, total, held[0] = run(at, parts, held[0])
        return jax.block_until_ready((places, total))

    return turn


def on_host(ids: np.ndarray, gradient: np.ndarray) -> Callable[[], tuple[Any, Any]]:
    """The way of a training step: ids on the host, the sum where the gradient is."""
    find = HostDedup(ROWS)
    size = rounded_size(find(ids).ids.size)
    parts = jax.device_put(gradient)

    @jax.jit
    def add(positions: jax.Array, parts: jax.Array) -> jax.Array:
        zeros = jnp.zeros((size, parts.shape[1]), parts.dtype)
        return zeros.at[positions].add(parts, mode="promise_in_bounds")

    def turn() -> tuple[Any, Any]:
        found = find(ids)
        return padded(found.ids, size), jax.block_until_ready(add(found.positions, parts))

    return turn


def by_sorting(ids: np.ndarray, gradient: np.ndarray) -> Callable[[], tuple[Any, Any]]:
    """A program that sorts, as those do that keep no scratch."""

    @jax.jit
    def run(ids: jax.Array, parts: jax.Array) -> tuple[jax.Array, jax.Array]:
        winners = sorted_representatives(ids)
        total = jnp.zeros_like(parts).at[winners].add(parts)
        return jnp.where(winners == jnp.arange(ids.shape[0]), ids, -1), total

    at, parts = jax.device_put((ids, gradient))
    return lambda: jax.block_until_ready(run(at, parts))


def by_unique(ids: np.ndarray, gradient: np.ndarray) -> Callable[[], tuple[Any, Any]]:
    """jnp.unique of a fixed size, then a segment sum."""
    size = np.unique(ids).size

    @jax.jit
    def run(ids: jax.Array, parts: jax.Array) -> tuple[jax.Array, jax.Array]:
        found, at = jnp.unique(ids, return_inverse=True, size=size)
        return found, jax.ops.segment_sum(parts, at.reshape(-1), size)

    at, parts = jax.device_put((ids, gradient))
    return lambda: jax.block_until_ready(run(at, parts))


def by_numpy(ids: np.ndarray, gradient: np.ndarray) -> Callable[[], tuple[Any, Any]]:
    """np.unique, then np.add.at."""

    def turn() -> tuple[Any, Any]:
        found, at = np.unique(ids, return_inverse=True)
        total = np.zeros((found.size, gradient.shape[1]), gradient.dtype)
        np.add.at(total, at.reshape(-1), gradient)
        return found, total

    return turn


def by_torch(ids: np.ndarray, gradient: np.ndarray) -> Callable[[], tuple[Any, Any]]:
    """What torch's optimizers do with a sparse gradient."""
    import torch

    index, parts = torch.from_numpy(ids.astype(np.int64))[None], torch.from_numpy(gradient)

    def turn() -> tuple[Any, Any]:
        both = torch.sparse_coo_tensor(index, parts, (ROWS, gradient.shape[1])).coalesce()
        return both.indices()[0].numpy(), both.values().numpy()

    return turn


def by_id(found: tuple[Any, Any]) -> np.ndarray:
    """The sums in the order of ids, without padding."""
    ids, total = (np.asarray(array) for array in found)
    there = np.flatnonzero(ids >= 0)
    return total[there[np.argsort(ids[there])]]


def main(argv: list[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ids", type=int, default=160_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(argv)
    keep_freed_memory()
    ids = zipf_ids(given.ids)
    gradient = np.random.default_rng(1).normal(size=(given.ids, given.dim)).astype(np.float32)
    contestants = {
        "in a program": in_program, "on the host": on_host, "sorting": by_sorting,
        "jnp.unique": by_unique, "NumPy": by_numpy, "torch": by_torch,
    }  # fmt: skip
    turns = {}
    for name, make in contestants.items():
        try:
            turns[name] = make(ids, gradient)
        except ImportError:
            print(f"{name} is not installed and left out")
    expected = by_id(turns["NumPy"]())
    best: dict[str, float] = {}
    for turn in range(TURNS):
        for name, run in turns.items():
            begun = time.process_time()
            found = run()
            took_ms = (time.process_time() - begun) * 1e3
            if turn:
                best[name] = min(best.get(name, took_ms), took_ms)
            else:
                np.testing.assert_allclose(by_id(found), expected, rtol=1e-3, atol=1e-3)
    out = {"distinct": len(expected)} | {name: round(took, 2) for name, took in best.items()}
    print(json.dumps(out) if given.json else out)


if __name__ == "__main__":
    main()
