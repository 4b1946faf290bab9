"""Starts the processes of a run on this machine, and ends all of them when one fails.

For trying what runs on a cluster; there, the cluster's own launcher starts the processes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from shardpar.run.rendezvous import COORDINATOR, COUNT, INDEX

GRACE_S = 30.0
"""How long a process that was asked to end may take."""
_NOISE = b"peer ranks. Expected number of connected peer ranks"
"""What the CPU backend's collectives print when they connect."""


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def environment_of(index: int, count: int, port: int) -> dict[str, str]:
    """What a process must find in its environment to meet the others on this machine.

    >>> environment_of(1, 2, 4000)["JAX_COORDINATOR_ADDRESS"]
    'localhost:4000'
    """
    return {COORDINATOR: f"localhost:{port}", COUNT: str(count), INDEX: str(index)}


def run_processes(
    command: Sequence[str],
    count: int,
    *,
    grace_s: float = GRACE_S,
) -> int:
    """Runs a command in several processes and shows what they print, each line with its number.

    SIGINT and SIGTERM are passed on to all. When one fails, the others are asked to end, and
    killed when they do not.

    Args:
      command: the program and its arguments.
      count: how many processes.
      grace_s: how long the others may take to end.

    Returns:
      0 if all ended well, else the exit code of the first that did not; 128 + N for signal N.
    """
    port = free_port()
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **environment_of(n, count, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for n in range(count)
    ]
    readers = [
        _follow(stream, out, f"[{n}] ")
        for n, process in enumerate(running)
        for stream, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    with _passing_on(running):
        code = _wait(running, grace_s)
    for reader in readers:
        reader.join(timeout=5)
    return code


def _wait(running: Sequence[subprocess.Popen[bytes]], grace_s: float) -> int:
    failed = 0
    deadline: float | None = None
    while any(process.poll() is None for process in running):
        codes = [process.returncode for process in running]
        if deadline is None and any(codes):
            failed = next(code for code in codes if code)
            deadline = time.monotonic() + grace_s
            send(running, signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            send(running, signal.SIGKILL)
        time.sleep(0.05)
    failed = failed or next((p.returncode for p in running if p.returncode), 0)
    return 128 - failed if failed < 0 else failed


def send(running: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Sends a signal to those that still run, with all they have started."""
    for process in running:
        if process.poll() is None:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                continue


@contextmanager
def _passing_on(running: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, _: Any) -> None:
        send(running, number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(stream: IO[bytes] | None, out: IO[str], mark: str) -> threading.Thread:
    def copy() -> None:
        assert stream is not None
        for line in stream:
            if _NOISE in line:
                continue
            out.write(mark + line.decode(errors="replace"))
            out.flush()

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    return reader
