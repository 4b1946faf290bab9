"""One of two processes that together reshard random pairs; each writes down the pieces it has.

python -m tests.lowering.two_processes PROCESS PORT FOLDER FIRST COUNT
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import jax
import numpy as np

from shardpar.lowering.devices import use_virtual_devices
from shardpar.lowering.transfer import Transfer
from shardpar.spec.layout import Layout
from shardpar.spec.reshard import Tensor, fuse
from tests.lowering.layouts import random_pair
from tests.lowering.random_pairs import put


def case(seed: int) -> tuple[Layout, Layout, list[np.ndarray]]:
    """A pair and the arrays that both processes, and their parent, make of the seed."""
    src, dst, shape = random_pair(random.Random(seed))
    rng = np.random.default_rng(seed)
    return src, dst, [rng.integers(-99, 99, shape).astype(t) for t in (np.int32, np.float32)]


def main() -> None:
    process, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    first, count = map(int, sys.argv[4:])
    use_virtual_devices(4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    devices = jax.devices()
    assert len(devices) == 8
    assert len(jax.local_devices()) == 4
    for seed in range(first, first + count):
        src, dst, values = case(seed)
        resolved = fuse([Tensor(src, dst, values[0].shape, 4)] * 2)
        arrays = [put(src, value, seed, devices) for value in values]
        moved = Transfer(resolved, [v.dtype for v in values])(arrays)
        pieces = {
            f"{i}/{device}": np.asarray(piece)
            for i, array in enumerate(moved)
            for device, piece in array.buffers(devices).items()
        }
        np.savez(folder / f"{seed}-{process}.npz", **pieces)
    print("done", flush=True)


if __name__ == "__main__":
    main()
