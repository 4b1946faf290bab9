"""Two parties of a vertical protocol as threads of one process, with short keys."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from shardpar.fl.channel import LocalChannel, local_channels
from shardpar.fl.vertical.options import KeyOptions

SHORT = KeyOptions(bits=512, processes=1, unsafe_small_keys_for_tests=True)
"""512 bits: broken in minutes, and quick."""


def together(
    guest: Callable[[LocalChannel], Any], host: Callable[[LocalChannel], Any]
) -> tuple[Any, Any]:
    """What both return; an error of either is raised, the guest's first."""
    ends = local_channels(["guest", "host"])
    results: dict[str, Any] = {}

    def run(name: str, work: Callable[[LocalChannel], Any]) -> None:
        ends[name].patience_s = 60.0
        try:
            results[name] = work(ends[name])
        except BaseException as error:
            results[name] = error

    threads = [
        threading.Thread(target=run, args=(name, work), daemon=True)
        for name, work in (("guest", guest), ("host", host))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for name in ("guest", "host"):
        if isinstance(results[name], BaseException):
            raise results[name]
    return results["guest"], results["host"]
