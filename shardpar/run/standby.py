"""A process that has prepared itself and waits: what takes over when a trainer dies."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence

from shardpar.run import priority
from shardpar.run.options import Preparation
from shardpar.run.supervised import STANDBY

_AFTER_S = 3.0
"""How long after a trainer's first step one is started."""


def preparation(wanted: Preparation, nodes: int, platform: str) -> Preparation:
    """How far a process that stands by may go before it is its turn.

    Programs are made on devices. An accelerator has room for one process, the trainer; and
    processes of several nodes see their devices only when they have met.

    Args:
      wanted: from the options.
      nodes: that are meant to train.
      platform: of the trainer's devices, as jax calls it.

    >>> preparation("programs", 1, "cpu"), preparation("programs", 1, "gpu")
    ('programs', 'imports')
    >>> preparation("programs", 2, "cpu"), preparation("none", 1, "cpu")
    ('imports', 'none')
    """
    if wanted == "programs" and (nodes > 1 or platform != "cpu"):
        return "imports"
    return wanted


class Standby:
    """At most one process that waits for its turn, and takes no time from the trainer."""

    def __init__(self, command: Sequence[str], wanted: Preparation, nodes: int) -> None:
        """None is started yet.

        Args:
          command: starts a trainer that goes on where another got to.
          wanted: how far it shall prepare itself, where it may.
          nodes: that are meant to train.
        """
        self._command, self._wanted, self._nodes = command, wanted, nodes
        self._waiting: subprocess.Popen[bytes] | None = None
        self._due_s: float | None = None

    def mind(self, platform: str | None) -> None:
        """Starts one if it is time: the trainer's own start comes first.

        Args:
          platform: of the trainer's devices, once it makes steps.
        """
        # One that has ended by itself would do so again: the next trainer gets another.
        if self._waiting is not None or platform is None:
            return
        may = preparation(self._wanted, self._nodes, platform)
        if may == "none":
            return
        now_s = time.monotonic()
        if self._due_s is None:
            self._due_s = now_s + _AFTER_S
        if now_s < self._due_s:
            return
        self._waiting = subprocess.Popen(
            self._command,
            env={**os.environ, STANDBY: may},
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        priority.lower(self._waiting.pid)

    def take(self, told: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
        """The waiting process as a trainer; None if none waits.

        Args:
          told: variables for its environment.
        """
        process, self._waiting, self._due_s = self._waiting, None, None
        if process is None or process.stdin is None:
            return None
        priority.restore(process.pid)
        try:
            process.stdin.write(json.dumps(dict(told)).encode() + b"\n")
            process.stdin.close()
        except OSError:
            process.wait()
            return None
        return process

    def close(self) -> None:
        """Ends the one that waits."""
        if self._waiting is not None:
            self._waiting.kill()
            self._waiting.wait()
        self._waiting, self._due_s = None, None
