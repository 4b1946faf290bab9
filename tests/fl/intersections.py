"""Parties of a private set intersection in threads of one process, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from shardpar.errors import PartyError
from shardpar.fl.channel import LocalChannel, local_channels

_LOOK_S = 0.02


def in_threads(
    parties: Mapping[str, Callable[[LocalChannel], Any]], patience_s: float = 30.0
) -> dict[str, Any]:
    """What each party's function returns, or the exception it raises.

    When one party fails, the others wait no longer for it.
    """
    ends, outcomes = local_channels(parties), {}
    failed = threading.Event()

    def watchful(end: LocalChannel) -> LocalChannel:
        receive = end.receive

        def until_failure(sender, topic, kind, timeout_s=None):
            until = time.monotonic() + (patience_s if timeout_s is None else timeout_s)
            while True:
                over = failed.is_set() or time.monotonic() > until
                if end.boxes[sender, end.party, topic].qsize() or over:
                    return receive(sender, topic, kind, _LOOK_S)
                time.sleep(_LOOK_S / 10)

        end.receive = until_failure
        return end

    def run(name: str) -> None:
        try:
            outcomes[name] = parties[name](watchful(ends[name]))
        except Exception as error:
            outcomes[name] = error
            failed.set()

    threads = [
        threading.Thread(target=run, args=(name,), name=name, daemon=True) for name in parties
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * patience_s)
    return outcomes


def blames(outcome: Any) -> str:
    """What a party says of another, or that it is content."""
    return str(outcome) if isinstance(outcome, PartyError) else "accepted"
