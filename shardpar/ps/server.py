"""A server: a shard that outlives its process, updated exactly once by each push.

An update is written to a log before it is taken, and acknowledged after. A worker's pushes
are numbered, so one that is sent again is known. A server that starts anew reads its last
snapshot and plays the log: same numbers, in the same order, through the same programs.
Angel's servers lose what came after their last snapshot; these lose nothing acknowledged.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shardpar.errors import CheckpointError, ConfigError, RunError
from shardpar.ps.log import Fsync, RecordLog, read_records, read_snapshot, write_snapshot
from shardpar.ps.messages import (
    Position,
    Pulled,
    PullRequest,
    Push,
    decoded,
    encoded,
    push_bytes,
    push_from_bytes,
)
from shardpar.ps.shard import Shard, ShardSpec


@dataclass(frozen=True)
class Durability:
    """How a server keeps its updates.

    Attributes:
      directory: of this server alone.
      snapshot_every: pushes after which a snapshot is written and a new log begun; it
        bounds how long a restart takes.
      fsync: see `ps.log.RecordLog`.
    """

    directory: Path
    snapshot_every: int = 10_000
    fsync: Fsync = "never"

    def __post_init__(self) -> None:
        if self.snapshot_every < 1:
            raise ConfigError(f"snapshot_every is {self.snapshot_every}; write 1 or more pushes")


class Server:
    """One shard of all tables, kept in a directory.

    Args:
      spec: what it holds.
      durability: where it keeps its updates, or None to keep nothing. A directory that has
        updates already is read, and the server goes on where it was.

    Attributes:
      shard: what it holds, in memory.
      replayed: updates that were read from the log when it started.
      snapshots: how many it has written.

    Raises:
      CheckpointError: the directory is damaged, or is another server's.
      RunError: another process has the directory.

    Example:
      >>> import jax, numpy as np
      >>> from shardpar.ps.initializers import Zeros
      >>> from shardpar.ps.messages import RowsRequest, RowsUpdate
      >>> from shardpar.ps.optimizers import SGD
      >>> from shardpar.ps.table import Table
      >>> key = jax.random.key_data(jax.random.key(0))
      >>> server = Server(ShardSpec({"t": Table(9, 2, SGD(1.0), Zeros())}, {"t": key}))
      >>> three = np.array([3])
      >>> update = RowsUpdate(three, (np.ones((1, 2), np.float32),), np.array([1]))
      >>> for _ in range(2):
      ...     server.push(Push(0, 0, step=0, weight=1.0, loss=0.0, rows={"t": update}))
      >>> server.pull(PullRequest({"t": RowsRequest(three)})).rows["t"].pieces[0].tolist()
      [[-1.0, -1.0]]
    """

    def __init__(self, spec: ShardSpec, durability: Durability | None = None) -> None:
        self.shard, self.durability = Shard(spec), durability
        self.replayed = self.snapshots = 0
        self._log: RecordLog | None = None
        self._logged = self._generation = 0
        if durability is not None:
            self._lock = locked(durability.directory)
            self._open(durability.directory)

    def position(self, worker: int) -> Position:
        """What of a worker is in, for good; `spec.workers` stands for who calls functions."""
        return self.shard.position(worker)

    def pull(self, request: PullRequest) -> Pulled:
        """Rows whose copies are too old for the request's bound, and all that have no copy.

        Raises:
          DataError: an id is not of this shard.
        """
        return self.shard.pull(request)

    def push(self, push: Push) -> None:
        """Takes an update; once this returns, no kill can lose it or make it count twice.

        Raises:
          DataError: ids or shapes do not fit.
          RunError: a push before this one is missing, or, in lockstep, the worker has not
            waited for the others.
        """
        if self.shard.seen_before(push.worker, push.sequence):
            self.shard.duplicates += 1
            return
        self.shard.check(push)
        if self._log is not None:
            self._log.add(push_bytes(push))
            self._logged += 1
        self.shard.take(push)
        if self.durability is not None and self._logged >= self.durability.snapshot_every:
            self.snapshot()

    def get(self, table: str, run: Callable[[Any, Any], Any]) -> Any:
        """psFunc: what `run(rows [n, dim], ids int[n])` makes of all rows of this shard.

        As in `ps.functions.get`; the caller merges what the shards return.
        """
        return self.shard.get(table, run)

    def update(
        self, table: str, run: Callable[[Any, Any], Any], worker: int, sequence: int
    ) -> None:
        """psFunc: all rows of this shard become what `run(rows, ids)` makes of them.

        A function is not written to the log: a snapshot is, before this returns. It takes a
        number of the worker's pushes, so that it is done once when it is asked for again.
        """
        if self.shard.seen_before(worker, sequence):
            self.shard.duplicates += 1
        else:
            self.shard.update(table, run, worker, sequence)
            if self._log is not None:
                self.snapshot()
        # The log before this snapshot lacks the function, so it must not stand in for it.
        self._forget_before(self._generation)

    def snapshot(self) -> None:
        """Writes all updated rows to a file and begins a new log; the one before is kept too."""
        if self._log is None:
            raise RunError("this server has no directory to write a snapshot to; give it one")
        state = encoded(self.shard.arrays() | {"spec": self.shard.spec.text()})
        tables = (encoded(stored.arrays()) for stored in self.shard.tables.values())
        write_snapshot(self._file("snapshot", self._generation + 1), [state, *tables])
        self._log.close()
        self._start_log(self._generation + 1, 0)
        self.snapshots += 1
        self._forget_before(self._generation - 1)

    def close(self) -> None:
        """Closes the log, and leaves the directory to another process."""
        if self._log is not None:
            self._log.close()
            self._lock.close()

    def _file(self, kind: str, generation: int) -> Path:
        assert self.durability is not None
        return self.durability.directory / f"{kind}-{generation:08d}"

    def _forget_before(self, generation: int) -> None:
        if self.durability is None:
            return
        for path in self.durability.directory.glob("*-" + 8 * "[0-9]"):
            if int(path.name[-8:]) < generation:
                path.unlink()

    def _start_log(self, generation: int, records: int) -> None:
        assert self.durability is not None
        self._generation = generation
        path = self._file("log", generation)
        self._log = RecordLog(path, fsync=self.durability.fsync, number=records)
        if not records:
            self._log.add(encoded(self.shard.spec.text()))
        self._logged = max(0, records - 1)

    def _open(self, directory: Path) -> None:
        newest = max((int(p.name[-8:]) for p in directory.glob("snapshot-*[0-9]")), default=0)
        first, records = self._restored(newest), 0
        for generation in range(first, newest + 1):
            records = self._played(generation, closed=generation < newest)
        self._start_log(newest, records)

    def _restored(self, newest: int) -> int:
        """Reads the newest snapshot that is whole; which one it was, or 0 for the beginning."""
        problem: Exception | None = None
        for generation in (newest, newest - 1):
            if generation <= 0:
                return 0
            try:
                parts = read_snapshot(self._file("snapshot", generation))
            except (CheckpointError, FileNotFoundError) as error:
                problem = problem or error
                continue
            state = decoded(parts[0])
            self._require_own(state["spec"])
            self.shard.restore(state)
            for stored, data in zip(self.shard.tables.values(), parts[1:], strict=True):
                stored.restore(decoded(data))
            return generation
        assert problem is not None
        raise problem

    def _played(self, generation: int, *, closed: bool) -> int:
        """Takes the updates of a log; how many records it has."""
        path = self._file("log", generation)
        if closed and not path.exists():
            raise CheckpointError(
                f"{path} is missing, and the snapshot after it is damaged: updates that were "
                "acknowledged would be lost. Start from an earlier copy of the directory"
            )
        records = 0
        for payload in read_records(path, closed=closed):
            if records == 0:
                self._require_own(decoded(payload))
            else:
                push = push_from_bytes(payload)
                if not self.shard.seen_before(push.worker, push.sequence):
                    self.shard.take(push)
                    self.replayed += 1
            records += 1
        return records

    def _require_own(self, text: str) -> None:
        if text != self.shard.spec.text():
            assert self.durability is not None
            raise CheckpointError(
                f"{self.durability.directory} was written by another server.\n  there: {text}\n"
                f"  here:  {self.shard.spec.text()}\n"
                "Give this server an empty directory, or start it as it was"
            )


def locked(directory: Path) -> BinaryIO:
    """The directory, made where it is not there, for this process alone until it ends.

    Raises:
      RunError: another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = open(directory / "lock", "wb")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise RunError(
            f"another process serves {directory}; stop it, or give this server a directory of "
            "its own"
        ) from None
    return lock
