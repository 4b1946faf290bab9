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


_ON_GLIBC = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="mallinfo2 is glibc's, from 2.33 on"
)


def _glibc() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.libc_ver()[1].split(".")) or (0,)


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
@pytest.mark.skipif(
    _glibc() < (2, 35),
    reason="glibc before 2.35 maps blocks above 32 MiB by themselves",
)
def test_memory_that_was_freed_is_taken_again_without_faults():
    assert 4 * faults("keep") < faults("leave")


def test_without_mallopt_nothing_happens(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert allocator.keep_freed_memory({}) is False
    assert allocator.return_freed_memory() is False


@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}]
)
def test_what_a_user_has_chosen_stays(environment):
    assert allocator.keep_freed_memory(environment) is False
    assert allocator.return_freed_memory(0, environment) is False


def test_settings_that_have_nothing_to_do_with_memory_do_not_count(monkeypatch):
    taken = []

    class Libc:
        mallinfo2 = malloc_trim = None

        @staticmethod
        def mallopt(name, value):
            taken.append((name, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libc)
    assert allocator.keep_freed_memory({"GLIBC_TUNABLES": "glibc.rtld.nns=4"}) is True
    assert [name for name, _ in taken] == [-3, -1, -8]


def test_an_old_glibc_gets_the_threshold_that_it_takes_and_one_without_any_is_left_alone(
    monkeypatch,
):
    taken = []

    class Libc:
        mallinfo2 = malloc_trim = None
        most = 1 << 25

        @classmethod
        def mallopt(cls, name, value):
            taken.append((name, value))
            return int(name != -3 or value <= cls.most)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libc)
    assert allocator.keep_freed_memory({}) is True
    assert taken[:2] == [(-3, 1 << 30), (-3, 1 << 25)]
    taken.clear()
    Libc.most = 0
    assert allocator.keep_freed_memory({}) is False
    assert {name for name, _ in taken} == {-3}


def test_a_containers_limit_counts(tmp_path):
    limit, used = tmp_path / "limit", tmp_path / "used"
    limit.write_text("3000000\n")
    used.write_text("1000000\n")
    assert allocator.available_bytes([(str(limit), str(used))]) == 2e6
    limit.write_text("max\n")
    assert allocator.available_bytes([(str(limit), str(used))]) > 2e6
    assert allocator.available_bytes([("/nowhere", "/nowhere")]) > 2e6
