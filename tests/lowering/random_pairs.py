"""Reshards random pairs of layouts on virtual devices and compares with NumPy, bit for bit.

python -m tests.lowering.random_pairs FIRST COUNT
"""

from __future__ import annotations

import random
import sys
from collections import Counter

import jax
import numpy as np

from shardpar.lowering.devices import use_virtual_devices
from shardpar.lowering.transfer import Transfer
from shardpar.lowering.union import UnionArray, from_buffers
from shardpar.spec.communications import Reshard, Tensor, fuse
from shardpar.spec.layout import Layout
from tests.lowering.layouts import SHAPES, held_by, numpy_pieces, random_layout, whole


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
    draw = random.Random(seed)
    shape = draw.choice(SHAPES)
    src, dst = random_layout(draw, shape), random_layout(draw, shape)
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


def main() -> None:
    first, count = map(int, sys.argv[1:])
    use_virtual_devices(8)
    kinds: Counter[str] = Counter()
    for seed in range(first, first + count):
        kinds.update(c.kind for c in check_pair(seed).communications)
        if (seed - first) % 250 == 249:
            # Every pair has programs of its own; none is needed again.
            jax.clear_caches()
    print(f"{count} pairs equal NumPy: {dict(kinds.most_common())}")


if __name__ == "__main__":
    main()
