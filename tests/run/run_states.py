"""States to save and an independent way to compare them: their bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

ROOT = Path(__file__).parents[2]


class Moments(NamedTuple):
    count: jax.Array
    mu: dict[str, jax.Array]


def make_state(step: int) -> dict[str, Any]:
    """All the kinds of leaves that a training state has, different at every step."""
    key = jax.random.key(step)
    weights = {
        "blocks/0/kernel": jax.random.normal(key, (16, 8)),
        "embed": jax.random.normal(key, (8, 4)).astype(jnp.bfloat16),
    }
    return {
        "params": weights,
        "optimizer": (Moments(jnp.int32(step), {k: v * 2 for k, v in weights.items()}), ()),
        "key": key,
        "keys": jax.random.split(key, 8),
        "sum": jnp.uint32(2**32 - 1 - step),
        "flags": jnp.array([True, False, step % 2 == 0]),
        "nothing": jnp.zeros((0, 3)),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42]),
    }


def bits(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every leaf's dtype, shape and bytes by its path."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = str(leaf.dtype)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        host = np.array(leaf)
        found[jax.tree_util.keystr(path)] = (dtype, host.shape, host.tobytes())
    return found


def target_of(tree: Any, place: Callable[[Any], Any] | None = None) -> Any:
    """The tree as shapes with shardings: its own, or those that `place` gives."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place(leaf) if place else leaf.sharding
        ),
        tree,
    )


def split_over(devices: list[jax.Device], *axes: int) -> Callable[[Any], NamedSharding]:
    """Splits each dim that an axis of the mesh divides, over as many axes as there are dims."""
    names = tuple("abc"[: len(axes)])
    mesh = jax.sharding.Mesh(np.array(devices[: np.prod(axes)]).reshape(axes), names)

    def place(leaf: Any) -> NamedSharding:
        spec = [
            name if size and size % mesh.shape[name] == 0 else None
            for size, name in zip(leaf.shape, names, strict=False)
        ]
        return NamedSharding(mesh, P(*spec))

    return place


def run_child(script: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def child_environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests" / "run"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
