"""Freed memory stays with the process on glibc, and nothing breaks elsewhere."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from shardpar.lowering import allocator

_PLAIN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))
}

# A block that is freed and taken again is the same memory, without new faults.
_FAULTS = """
import ctypes, resource, sys
from shardpar.lowering.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 64 << 20
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touch():
    block = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    libc.free(ctypes.c_void_p(block))
touch()
before = faults()
for _ in range(8):
    touch()
print((faults() - before) / 8)
"""


def faults(mode: str) -> float:
    ran = subprocess.run(
        [sys.executable, "-c", _FAULTS, mode],
        check=True, capture_output=True, text=True, env=_PLAIN,
    )  # fmt: skip
    return float(ran.stdout)


_ON_GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are glibc's")

# Of many freed blocks between ones in use, all pages stay, until they are asked for.
_HOLES = """
import ctypes, psutil
from shardpar.lowering.allocator import keep_freed_memory, return_freed_memory
assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
held = lambda: psutil.Process().memory_info().rss / 1e6
blocks = []
for _ in range(64):
    blocks.append(libc.malloc(ctypes.c_size_t(4 << 20)))
    ctypes.memset(blocks[-1], 1, 4 << 20)
full = held()
for block in blocks[::2]:
    libc.free(ctypes.c_void_p(block))
assert held() > full - 10, "the memory stayed with the process"
assert not return_freed_memory(kept_bytes=4e9)
assert held() > full - 10
assert return_freed_memory(kept_bytes=0)
print(full - held())
"""


@_ON_GLIBC
def test_what_is_kept_is_given_back_above_a_bound():
    ran = subprocess.run(
        [sys.executable, "-c", _HOLES], check=True, capture_output=True, text=True, env=_PLAIN
    )
    assert float(ran.stdout) == pytest.approx(32 * 4.19, rel=0.1)


@_ON_GLIBC
def test_memory_that_was_freed_is_taken_again_without_faults():
    assert faults("keep") < 100 < faults("leave")


def test_without_mallopt_nothing_happens(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert allocator.keep_freed_memory({}) is False
    assert allocator.return_freed_memory() is False
