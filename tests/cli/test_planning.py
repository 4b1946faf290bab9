"""What a command does before jax starts: as many threads as its collectives need, and no faults."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

# Prints how many threads XLA was given, and the faults of a block that is taken again.
_START = """
import ctypes, os, resource, sys
from shardpar.cli.planning import use_devices
from shardpar.run.local_processes import free_port
from shardpar.run.rendezvous import Rendezvous
meets = sys.argv[1] == "meets"
use_devices(1, Rendezvous(f"localhost:{free_port()}", 1, 0) if meets else None)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    before, block = faults(), libc.malloc(ctypes.c_size_t(48 << 20))
    ctypes.memset(block, 1, 48 << 20)
    libc.free(ctypes.c_void_p(block))
print(os.environ.get("NPROC", 0), faults() - before)
"""


def started(how: str, **chosen: str) -> tuple[int, int]:
    plain = {n: v for n, v in os.environ.items() if n != "NPROC" and not n.startswith("MALLOC_")}
    ran = subprocess.run(
        [sys.executable, "-c", _START, how],
        check=True, capture_output=True, text=True, env=plain | chosen,
    )  # fmt: skip
    threads, faults = ran.stdout.split()[-2:]
    return int(threads), int(faults)


def test_one_device_alone_has_the_usual_threads_and_one_that_meets_others_has_room_for_them():
    assert started("alone")[0] == 0
    assert started("meets")[0] >= 64


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's, from 2.33 on")
def test_memory_stays_with_a_command_unless_the_user_has_chosen_otherwise():
    assert 4 * started("alone")[1] < started("alone", MALLOC_MMAP_THRESHOLD_="65536")[1]
