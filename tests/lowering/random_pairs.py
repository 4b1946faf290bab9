"""Reshards random pairs of layouts on virtual devices and compares with NumPy, bit for bit.

    python -m tests.lowering.random_pairs FIRST COUNT

Each pair compiles some ten tiny programs, which are most of its time; XLA's passes that make
programs fast are left out.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter

import jax
import numpy as np

from shardpar.lowering.devices import use_virtual_devices
from shardpar.lowering.transfer import Transfer
from shardpar.lowering.union import UnionArray, from_buffers
from shardpar.spec.layout import Layout
from shardpar.spec.reshard import Reshard, Tensor, fuse
from tests.lowering.layouts import held_by, numpy_pieces, random_pair, whole


def put(layout: Layout, value: np.ndarray, seed: int, devices) -> UnionArray:
    """The array in a layout, its addends random."""
    process = jax.process_index()
    held = {
        d: jax.device_put(piece, devices[d])
        for d, piece in numpy_pieces(layout, value, seed).items()
        if devices[d].process_index == process
    }
    return from_buffers(held, layout, value.shape, value.dtype, devices)


def check_pair(seed: int) -> Reshard:
    """One pair, in int32 and float32 at once; integers are summed exactly in both."""
    src, dst, shape = random_pair(random.Random(seed))
    devices = jax.devices()
    rng = np.random.default_rng(seed)
    values = [rng.integers(-99, 99, shape).astype(t) for t in (np.int32, np.float32)]
    resolved = fuse([Tensor(src, dst, shape, 4)] * 2)
    arrays = [put(src, value, seed, devices) for value in values]
    moved = Transfer(resolved, [v.dtype for v in values])(arrays)
    for array, value in zip(moved, values, strict=True):
        assert array.layout == dst, (seed, src, dst)
        got = whole(dst, shape, held_by(array, devices))
        assert got.dtype == value.dtype, (seed, src, dst)
        assert np.array_equal(got, value), (seed, shape, str(src), str(dst))
    return resolved


QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"


def main() -> None:
    first, count = map(int, sys.argv[1:])
    os.environ["XLA_FLAGS"] = QUICK_TO_COMPILE
    use_virtual_devices(8)
    kinds: Counter[str] = Counter()
    for seed in range(first, first + count):
        kinds.update(c.kind for c in check_pair(seed).communications)
        if (seed - first) % 250 == 249:
            # Every pair has programs of its own; none is needed again.
            jax.clear_caches()
    print(json.dumps({"pairs": count, "communications": dict(kinds.most_common())}))


if __name__ == "__main__":
    main()
