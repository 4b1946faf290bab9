"""Reshards over two processes with four virtual devices each, against NumPy."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shardpar.spec.reshard import Reshard, reshard
from tests.lowering.layouts import whole
from tests.lowering.two_processes import case

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def run_both(folder: Path, first: int, count: int) -> None:
    port = free_port()
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.lowering.two_processes", str(process), str(port),
             str(folder), str(first), str(count)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=400)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(s[-3000:] for s in said)


def spans_both(resolved: Reshard) -> bool:
    """Whether some communication has devices of both processes."""
    return any(
        {d // 4 for d in group} == {0, 1} and c.num_bytes
        for c in resolved.communications
        for group in c.groups
    )


@pytest.mark.slow
def test_random_pairs_over_two_processes_equal_numpy_bit_for_bit(tmp_path):
    first, count = 5000, 40
    run_both(tmp_path, first, count)
    crossed = 0
    for seed in range(first, first + count):
        src, dst, values = case(seed)
        crossed += spans_both(reshard(src, dst, values[0].shape, 4))
        held: list[dict[int, np.ndarray]] = [{}, {}]
        for process in (0, 1):
            for name, piece in np.load(tmp_path / f"{seed}-{process}.npz").items():
                array, device = map(int, name.split("/"))
                assert device // 4 == process
                held[array][device] = piece
        for pieces, value in zip(held, values, strict=True):
            got = whole(dst, value.shape, pieces)
            assert got.dtype == value.dtype
            assert np.array_equal(got, value), (seed, str(src), str(dst))
    assert crossed > count // 3, "too few pairs need both processes"
