"""How much of the memory that XLA:CPU gives back stays with the process for the next step."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

import psutil

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEPT_BYTES = (1 << 31) - 1
_MAPPED_BYTES = 1 << 30
_CHOSEN_BY_USER = ("MALLOC_", "GLIBC_TUNABLES")
_KEPT_SHARE = 1 / 3


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
    of DeepFM that needs 40 MB took a third less time without, and switching a state of 1.2 GB
    between layouts a third of the time. All threads share one arena, since others give their
    memory back whatever is set here. Call it before jax starts its threads.

    Args:
      environment: where a user has chosen otherwise by glibc's own variables, such as
        MALLOC_TRIM_THRESHOLD_, nothing is changed.

    Returns:
      Whether it was set; elsewhere than on Linux with glibc nothing happens.

    Example:
      >>> keep_freed_memory({"MALLOC_ARENA_MAX": "2"})
      False
    """
    if any(name.startswith(_CHOSEN_BY_USER) for name in environment):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = {_ARENA_MAX: 1, _MMAP_THRESHOLD: _MAPPED_BYTES, _TRIM_THRESHOLD: _KEPT_BYTES}
    taken = [mallopt(name, value) for name, value in settings.items()]
    return all(taken)


def return_freed_memory(kept_bytes: float | None = None) -> bool:
    """Gives freed memory back to the system where the process holds too much of it.

    Pieces of one plan seldom fit where those of another were, so each switch leaves holes.

    Args:
      kept_bytes: up to so much may stay; None is a third of the machine's memory.

    Returns:
      Whether something was given back.

    Example:
      >>> return_freed_memory(kept_bytes=float("inf"))
      False
    """
    try:
        libc = ctypes.CDLL(None)
        usage, trim = libc.mallinfo2, libc.malloc_trim
    except (AttributeError, OSError, TypeError):
        return False
    if kept_bytes is None:
        kept_bytes = _KEPT_SHARE * psutil.virtual_memory().total
    usage.restype = _Usage
    now = usage()
    # Freed memory of which pages were given back counts as free still, so that is no measure.
    if psutil.Process().memory_info().rss - now.uordblks - now.hblkhd <= kept_bytes:
        return False
    return bool(trim(ctypes.c_size_t(0)))
