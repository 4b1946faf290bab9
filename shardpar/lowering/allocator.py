"""How much of the memory that XLA:CPU gives back stays with the process for the next step."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEPT_BYTES = (1 << 31) - 1
_MAPPED_BYTES = (1 << 30, 1 << 25)
"""Above it a block is mapped by itself; glibc before 2.35 takes no more than the second."""
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


class _Usage(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Lets glibc keep freed memory, instead of giving it back to the system.

    XLA:CPU takes the memory for what lies between a step's inputs and outputs anew for every
    step. glibc asks the system for each piece above 32 MiB, and hands it back after the step:
    the next step finds fresh pages, each of which is a fault and is filled with zeros. A step
    of DeepFM that needs 40 MB took a third less time without. All threads share one arena,
    since others give their memory back whatever is set here. Call it before jax starts its
    threads, where devices are CPUs; `return_freed_memory` bounds what is kept.

    Args:
      environment: where a user has chosen otherwise by one of glibc's own variables, such as
        MALLOC_ARENA_MAX, nothing is changed.

    Returns:
      Whether it was set; elsewhere than on Linux with glibc nothing happens.

    Example:
      >>> keep_freed_memory({"MALLOC_ARENA_MAX": "8"})
      False
    """
    if _is_chosen_by_user(environment):
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt, _, _ = libc.mallopt, libc.mallinfo2, libc.malloc_trim
    except (AttributeError, OSError, TypeError):
        return False
    # First what may be refused: the others alone would make it slower.
    if not any(mallopt(_MMAP_THRESHOLD, size) for size in _MAPPED_BYTES):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)) and bool(mallopt(_ARENA_MAX, 1))


def return_freed_memory(
    kept_bytes: float | None = None, environment: Mapping[str, str] = os.environ
) -> bool:
    """Gives freed memory back to the system where the process holds too much of it.

    Pieces of one plan seldom fit where those of another were, so each switch leaves holes.

    Args:
      kept_bytes: up to so much may stay; None is what the machine, or the container, has left
        for others, so that several processes on one machine keep less each.
      environment: as for `keep_freed_memory`.

    Returns:
      Whether something was given back.

    Example:
      >>> return_freed_memory(kept_bytes=float("inf"))
      False
    """
    if _is_chosen_by_user(environment):
        return False
    try:
        libc = ctypes.CDLL(None)
        usage, trim = libc.mallinfo2, libc.malloc_trim
    except (AttributeError, OSError, TypeError):
        return False
    usage.restype = _Usage
    now, held = usage(), psutil.Process().memory_info()
    # Freed memory of which pages were given back counts as free still, so that is no measure.
    kept = held.rss - held.shared - now.uordblks - now.hblkhd
    if kept <= (available_bytes() if kept_bytes is None else kept_bytes):
        return False
    return bool(trim(ctypes.c_size_t(0)))


def available_bytes(limits: Sequence[tuple[str, str]] = _LIMITS) -> float:
    """Memory that can still be had: of the machine, or of the container if that has less.

    Args:
      limits: files of control groups with a limit and what is used of it; those that are not
        there, or say "max", do not count.

    Example:
      >>> 0 < available_bytes() <= psutil.virtual_memory().total
      True
    """
    left = [float(psutil.virtual_memory().available)]
    for limit, used in limits:
        with suppress(OSError, ValueError):
            left.append(float(Path(limit).read_text()) - float(Path(used).read_text()))
    return max(0.0, min(left))


def _is_chosen_by_user(environment: Mapping[str, str]) -> bool:
    return "glibc.malloc." in environment.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in environment
    )
