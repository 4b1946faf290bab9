"""Decides which process may write a run directory: the one that holds its lock file.

The lock is `flock`'s, so the operating system releases it however its holder ends.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from shardpar.errors import RunError


class RunLock:
    """The right to write one run directory, from construction until `release`.

    The file stays behind when the lock is released: removing it would let a process
    that has just opened it hold a lock that no one else can see.
    """

    def __init__(self, path: Path, *, shared: bool = False, busy: str | None = None) -> None:
        """Takes the lock.

        Args:
          path: the lock file; it and its directory are created if missing.
          shared: others that share may hold it too.
          busy: what to say where another holds it; None says that a trainer writes there.

        Raises:
          RunError: another process (or another part of this one) holds it, or the
            directory cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunError(
                f"{path.parent} cannot be written: {error.strerror}; choose another run directory"
            ) from error
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._handle, 200, 0).decode(errors="replace").strip()
            self._close()
            if not isinstance(error, BlockingIOError):
                raise RunError(
                    f"{path}: this file system cannot lock files ({error.strerror}); "
                    "put the run directory on a disk that can"
                ) from error
            raise RunError(
                busy
                or f"{path.parent} is already being written by {holder or 'another process'}; "
                "stop that trainer first, or train into another run directory"
            ) from None
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Gives the lock back; doing so twice is harmless."""
        self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
