"""What a trainer owes its supervisor: a sign of life, and its own end when nobody watches it."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

STOPPED = 86
"""The exit code of a supervised trainer that saved and stopped because it was asked to."""
HEARTBEAT, EVERY_S = "SHARDPAR_HEARTBEAT", "SHARDPAR_HEARTBEAT_S"
_ORPHANED = 87


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
