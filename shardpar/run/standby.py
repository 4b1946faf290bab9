"""A process that has imported everything and waits: what takes over when a trainer dies."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence

from shardpar.run.supervised import STANDBY

_AFTER_S = 10.0
"""How long after a trainer one is started: the trainer's own start comes first."""


class Standby:
    """At most one process that waits for its turn."""

    def __init__(self, command: Sequence[str], wanted: bool) -> None:
        """None is started yet.

        Args:
          command: starts a trainer that goes on where another got to.
          wanted: whether there shall be one at all.
        """
        self._command, self._wanted = command, wanted
        self._waiting: subprocess.Popen[bytes] | None = None
        self._due_s: float | None = None

    def soon(self) -> None:
        """One shall wait from a while from now on."""
        if self._wanted and self._waiting is None:
            self._due_s = time.monotonic() + _AFTER_S

    def mind(self) -> None:
        """Starts one if it is time."""
        if self._waiting is not None and self._waiting.poll() is not None:
            self._waiting = None
            self.soon()
        if self._due_s is not None and time.monotonic() >= self._due_s:
            self._due_s = None
            self._waiting = subprocess.Popen(
                self._command,
                env={**os.environ, STANDBY: "1"},
                stdin=subprocess.PIPE,
                start_new_session=True,
            )

    def take(self, told: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
        """The waiting process as a trainer; None if none waits.

        Args:
          told: variables for its environment.
        """
        process, self._waiting, self._due_s = self._waiting, None, None
        if process is None or process.stdin is None:
            return None
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
