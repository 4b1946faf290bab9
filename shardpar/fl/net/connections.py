"""One connection of a link while it lasts, and the watch that ends those that have gone silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shardpar.fl.net.frames import Refusal

_LOOKS_PER_SILENCE = 8
_FAREWELL_S = 2.0
_CLOSED = "this party closed its channel"


@dataclass(eq=False)
class Connection:
    """A stream of frames each way; its link outlives it.

    Attributes:
      cancel: ends the stream at once.
      heard_s: when something last came, by the monotonic clock.
      ended: whether nothing is to be sent or taken any more.
      why: what ended it, for people; empty if the other end did.
      farewell: the last thing to say, when this end will not go on.
      expires_s: when it is cancelled whatever comes, if set.
    """

    cancel: Callable[[], object]
    heard_s: float = field(default_factory=time.monotonic)
    ended: bool = False
    why: str = ""
    farewell: Refusal | None = None
    expires_s: float | None = None

    def end(self, why: str) -> None:
        """Ends it now."""
        self.why = self.why or why
        self.ended = True
        self.cancel()

    def refuse(self, refusal: Refusal) -> None:
        """Has the refusal sent as the last frame; ends soon, even if the other end goes on."""
        self.farewell = refusal
        self.why = self.why or refusal.reason
        self.expires_s = time.monotonic() + _FAREWELL_S


class Watch:
    """A thread that ends connections on which nothing has come for `silence_s` seconds.

    Once it is stopped, it ends those that are left, and those that are added still.
    """

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._thread = threading.Thread(target=self._look, name="shardpar-watch", daemon=True)
        self._thread.start()

    def add(self, connection: Connection) -> None:
        """Watches a connection."""
        with self._lock:
            self._connections.add(connection)
        if self._stopped.is_set():
            connection.end(_CLOSED)

    def remove(self, connection: Connection) -> None:
        """Watches it no longer."""
        with self._lock:
            self._connections.discard(connection)

    def stop(self) -> None:
        """Ends the thread and all connections."""
        self._stopped.set()
        self._thread.join()
        with self._lock:
            left = list(self._connections)
        for connection in left:
            connection.end(_CLOSED)

    def _look(self) -> None:
        while not self._stopped.wait(min(0.5, self._silence_s / _LOOKS_PER_SILENCE)):
            now = time.monotonic()
            with self._lock:
                watched = list(self._connections)
            for connection in watched:
                if connection.expires_s is not None and now > connection.expires_s:
                    connection.end("")
                elif now - connection.heard_s > self._silence_s:
                    connection.end(f"nothing came for {self._silence_s:g} s")
