"""Notices that training has stopped because another process has, and says which and where.

A process whose peer hangs waits forever inside a collective, where nothing can be raised. A
thread watches the steps go by; when none has for too long it reports and ends the process.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from shardpar.run.peers import Peers

STUCK = 75
"""The exit code of a process that waited too long: sysexits' "try again later"."""
_EVERY_S = 2.0
_FIRST = 10
"""How much longer the first step may take, in which connections are made and some is compiled."""


class Watchdog:
    """Watches the steps of a run that several processes make, or one under a supervisor.

    Within `with`, `saw` is called when a step has ended.
    """

    def __init__(
        self,
        peers: Peers,
        after_s: float,
        waiting_for: Callable[[], str],
        say: Callable[[str], None],
        leave: Callable[[int], None] = os._exit,
        *,
        alone: bool = False,
    ) -> None:
        """Nothing is watched before `with`.

        Args:
          peers: the processes of the run.
          after_s: how long a step may take; 0 waits forever.
          waiting_for: the first task that has not ended, asked from the watching thread.
          say: prints a line for people.
          leave: ends this process, with an exit code.
          alone: watch one process too: somebody will start it again.
        """
        self._peers, self._after_s, self._waiting_for = peers, after_s, waiting_for
        self._say, self._leave, self._alone = say, leave, alone
        self._step, self._beat = 0, 0
        self._seen_s = time.monotonic()
        self._paused = 0
        self._patience_s = _FIRST * after_s
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._heard: dict[int, tuple[int, float]] = {}

    def saw(self, step: int) -> None:
        """A step has ended."""
        self._step, self._seen_s = step, time.monotonic()
        self._patience_s = self._after_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what takes its time and waits for nobody, such as compiling."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._patience_s = _FIRST * self._after_s
            self._seen_s = time.monotonic()

    def __enter__(self) -> Watchdog:
        if (self._peers.count > 1 or self._alone) and self._after_s > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(_EVERY_S, self._after_s / 4)):
            self._beat += 1
            task = self._waiting_for()
            word = {"beat": self._beat, "step": self._step, "task": task, "on": _host()}
            self._peers.tell(f"progress/{self._peers.index}", json.dumps(word))
            self._listen()
            if self._paused or time.monotonic() - self._seen_s < self._patience_s:
                continue
            self._say(self._report(task))
            self._leave(STUCK)
            return

    def _listen(self) -> None:
        for other in range(self._peers.count):
            word = self._peers.told(f"progress/{other}")
            beat = json.loads(word)["beat"] if word else 0
            if other not in self._heard or self._heard[other][0] != beat:
                self._heard[other] = beat, time.monotonic()

    def _report(self, task: str) -> str:
        waits = f" waits for {task}, which" if task else ""
        lines = [
            f"process {self._peers.index}: step {self._step + 1}{waits} has not ended for "
            f"{self._patience_s:.0f} s (train.stuck_after_s)"
        ]
        for other in range(self._peers.count):
            if other == self._peers.index:
                continue
            lines[0] = lines[0].removesuffix("; the others:") + "; the others:"
            word = self._peers.told(f"progress/{other}")
            silent_s = time.monotonic() - self._heard[other][1]
            if word is None:
                lines.append(f"  process {other} has not begun")
                continue
            said = json.loads(word)
            state = f"waits for {said['task']}" if said["task"] else "waits for no task"
            if silent_s > 5 * _EVERY_S:
                state = f"hangs: silent for {silent_s:.0f} s; {state}"
            lines.append(f"  process {other} on {said['on']}: step {said['step'] + 1}, {state}")
        return "\n".join(lines)


def _host() -> str:
    return socket.gethostname()
