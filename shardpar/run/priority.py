"""Lets a process that only prepares itself run when the machine has nothing better to do.

Linux's scheduler may share the processor between sessions before it looks at processes
("autogroup"), so both are told. What cannot be taken back later is not done at all.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

_LOW = 5
"""A quarter to a third of the share of a process of usual priority that works all the time.

With less, what prepares itself beside a trainer on all cores would not be ready in a minute.
"""
_ATTEMPTS = 3
_PAUSE_S = 0.15
"""Linux takes ten changes of a session's priority a second."""


def lower(process: int) -> None:
    """Gives a process that has just been started, and its session, a low priority.

    Args:
      process: its id; it leads a session of its own.
    """
    _session(process, _LOW)
    if _may_be_raised():
        _threads(process, _LOW)


def restore(process: int) -> None:
    """Gives it the priority of this process, in all its threads.

    Args:
      process: its id.
    """
    _session(process, 0)
    _threads(process, os.getpriority(os.PRIO_PROCESS, 0))


def _session(process: int, niceness: int) -> None:
    for _ in range(_ATTEMPTS):
        try:
            Path(f"/proc/{process}/autogroup").write_text(str(niceness))
        except BlockingIOError:
            time.sleep(_PAUSE_S)
        except OSError:
            # Another system than Linux, or one that does not group by session.
            return
        else:
            return


def _threads(process: int, niceness: int) -> None:
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            # Threads come and go, and a process that is gone needs no priority.
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, int(thread), niceness)


def _may_be_raised() -> bool:
    """Whether a priority that was lowered can be raised again, tried on a thread of no account."""

    def attempt() -> bool:
        thread = threading.get_native_id()
        before = os.getpriority(os.PRIO_PROCESS, thread)
        try:
            os.setpriority(os.PRIO_PROCESS, thread, before + 1)
            os.setpriority(os.PRIO_PROCESS, thread, before)
        except OSError:
            return False
        return True

    if not Path("/proc/self/task").is_dir():
        # Priorities are of whole processes there: the attempt could not be taken back.
        return False
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(attempt).result()
