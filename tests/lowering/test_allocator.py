"""Freed memory stays with the process on glibc, and nothing breaks elsewhere."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from shardpar.lowering import allocator

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
        [sys.executable, "-c", _FAULTS, mode], check=True, capture_output=True, text=True
    )
    return float(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_was_freed_is_taken_again_without_faults():
    assert faults("keep") < 100 < faults("leave")


def test_without_mallopt_nothing_happens(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert allocator.keep_freed_memory() is False
