"""A wire between two parties that tests can cut, stop, or read along: TCP, relayed."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self


class Relay:
    """Forwards TCP connections to an address.

    Attributes:
      address: where to dial instead.
      dropped: connections that were cut.
      open: whether new connections are let through.
      held: while set, nothing is forwarded either way, as if the network were gone.
    """

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.dropped, self.open = 0, True
        self._flows = threading.Event()
        self._flows.set()
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def hold(self) -> None:
        """Forwards nothing until `release`; connections stay."""
        self._flows.clear()

    def release(self) -> None:
        """Forwards again."""
        self._flows.set()

    def drop(self) -> None:
        """Cuts all connections."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            self.dropped += 1
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._flows.set()
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.drop()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            try:
                if not self.open:
                    raise ConnectionRefusedError
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            with self._lock:
                self._pairs.append((near, far))
            for one, other in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pump, args=(one, other), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(1 << 16):
                self._flows.wait()
                other.sendall(data)
        except OSError:
            pass
        finally:
            for end in (one, other):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            one.close()
