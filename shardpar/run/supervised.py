"""What a trainer owes its supervisor: a sign of life, and its own end when nobody watches it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

STOPPED = 86
"""The exit code of a supervised trainer that saved and stopped because it was asked to."""
HEARTBEAT, EVERY_S = "SHARDPAR_HEARTBEAT", "SHARDPAR_HEARTBEAT_S"
STANDBY = "SHARDPAR_STANDBY"
"""Tells a process to wait for its turn, and how far to prepare itself first."""
_ORPHANED = 87


def wait_for_turn(environment: MutableMapping[str, str], words: TextIO) -> bool:
    r"""Makes a process that stands by wait until it is to train, with what it is told then.

    Args:
      environment: such as `os.environ`; what the supervisor tells is put into it.
      words: such as `sys.stdin`.

    Returns:
      Whether to go on; False if the supervisor is gone.

    >>> import io
    >>> told = {"SHARDPAR_STANDBY": "imports"}
    >>> wait_for_turn(told, io.StringIO('{"JAX_PROCESS_ID": "0"}\n')), told
    (True, {'JAX_PROCESS_ID': '0'})
    """
    del environment[STANDBY]
    line = words.readline()
    if not line:
        return False
    environment.update(json.loads(line))
    return True


@dataclass(frozen=True)
class Supervised:
    """That a supervisor started this process.

    Attributes:
      heartbeat: the file whose time of change says that this process lives.
      every_s: how often.
    """

    heartbeat: Path
    every_s: float

    @classmethod
    def find(cls, environment: Mapping[str, str]) -> Supervised | None:
        """From the environment; None where nobody supervises."""
        if HEARTBEAT not in environment:
            return None
        return cls(Path(environment[HEARTBEAT]), float(environment.get(EVERY_S, "2")))

    def says(self, platform: str) -> None:
        """Tells the supervisor on what devices this process makes steps."""
        with suppress(OSError):
            self.heartbeat.write_text(platform)

    def begin(self) -> None:
        """Starts to give signs of life, in a thread."""
        parent = os.getppid()

        def beat() -> None:
            pause = threading.Event()
            while True:
                if os.getppid() != parent:
                    # Another supervisor may begin anew here; two trainers must not write one run.
                    os._exit(_ORPHANED)
                try:
                    self.heartbeat.touch()
                except OSError:
                    os._exit(_ORPHANED)
                pause.wait(self.every_s)

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()
