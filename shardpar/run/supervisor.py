"""Keeps a run alive: starts the trainer of this node, and again when it or another node dies.

One supervisor runs on each node. They agree through files in the run directory, which all of
them see: each says how it is, and the one that holds a lock decides (`membership`).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from shardpar.errors import RunError, UserError
from shardpar.run.durable import write_atomically
from shardpar.run.local_processes import free_port
from shardpar.run.lock import RunLock
from shardpar.run.membership import Epoch, Memory, Node, State, decide
from shardpar.run.options import SuperviseOptions
from shardpar.run.rendezvous import COORDINATOR, COUNT, INDEX
from shardpar.run.standby import Standby
from shardpar.run.steps import StepDirectories
from shardpar.run.supervised import EVERY_S, HEARTBEAT, STOPPED

_TICK_S = 0.2
_REFUSED = 2
_LEAVE_S = 120.0
"""How long a trainer that was asked to save and stop may take before it is killed."""


@dataclass(frozen=True)
class Job:
    """A run to keep alive.

    Attributes:
      directory: of the run; all nodes see it.
      command: starts the first trainer.
      resume: starts one that goes on where another got to.
      node: the name of this node.
      nodes: how many are meant to train; 1 shares with nobody.
      address: where other nodes reach this one.
      options: how patient to be.
    """

    directory: Path
    command: Sequence[str]
    resume: Sequence[str]
    node: str
    nodes: int
    address: str
    options: SuperviseOptions


class Supervisor:
    """Does one node's part in keeping a run alive."""

    def __init__(self, job: Job, say: Callable[[str], None]) -> None:
        """Takes this node's place.

        Raises:
          RunError: another supervisor has it, or the directory cannot be written.
        """
        self.job, self.say, self.options = job, say, job.options
        self._folder = job.directory / "supervisors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{self._folder} cannot be made: {error.strerror}; choose another run directory"
            ) from error
        busy = (
            f"{job.directory} has a supervisor already (this is node {job.node}); stop that one "
            "first. Nodes that train together are started with --nodes N, each with its own "
            "--node NAME"
        )
        self._locks = [RunLock(self._folder / ".run.lock", shared=job.nodes > 1, busy=busy)]
        try:
            self._locks.append(RunLock(self._folder / f".{job.node}.lock", busy=busy))
        except RunError:
            self.close()
            raise
        self._trainer: subprocess.Popen[bytes] | None = None
        self._standby = Standby(job.resume, job.options.standby, job.nodes)
        self._started_s = 0.0
        self._state: State = "waiting"
        self._epoch, self._code = 0, 0
        self._port = free_port()
        self._born = uuid.uuid4().hex
        self._asked_to_stop = 0
        self._told_to_stop_s: float | None = None
        self._is_leader = False
        self._memory = Memory()
        self._beats: dict[str, tuple[int, float]] = {}
        self._beat, self._last_beat_s = 0, float("-inf")
        self._said: Node | None = None
        self._config_before = self._config_changed()

    def run(self) -> int:
        """Supervises until the run is done or given up.

        Returns:
          The exit code: 0 when done, 1 when given up, 2 where the trainer refuses its input;
          128 + N after signal N.
        """
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        before = {number: signal.signal(number, self._signalled) for number in numbers}
        self._log("supervisor started", f"process {os.getpid()}")
        try:
            while True:
                trainer = self._trainer
                epoch = self._look()
                self._mind_trainer(epoch)
                self._standby.mind(self._platform())
                ended = self._ended(epoch)
                if ended is not None:
                    return ended
                if self._trainer is trainer:
                    self._rest()
        finally:
            self._kill()
            self._standby.close()
            self._path_of(self.job.node).unlink(missing_ok=True)
            for number, handler in before.items():
                signal.signal(number, handler)
            self.close()

    def close(self) -> None:
        """Gives this node's place back."""
        for lock in self._locks:
            lock.release()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _signalled(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._send(number)
            return
        self._asked_to_stop = number
        self._send(signal.SIGTERM)

    def _rest(self) -> None:
        """Waits for the next look; a trainer that ends is looked at sooner."""
        if self._trainer is None or not hasattr(os, "pidfd_open"):
            time.sleep(_TICK_S)
            return
        try:
            handle = os.pidfd_open(self._trainer.pid)
        except OSError:
            time.sleep(_TICK_S)
            return
        try:
            select.select([handle], [], [], _TICK_S)
        finally:
            os.close(handle)

    def _look(self) -> Epoch:
        """Says how this node is, and decides if it leads."""
        now_s = time.monotonic()
        job = self.job
        me = Node(
            job.node, self._born, job.address, self._port, self._state, self._epoch, self._code
        )
        if me != self._said or now_s - self._last_beat_s >= self.options.heartbeat_s:
            self._beat += 1
            self._write(self._path_of(me.name), {"beat": self._beat, **asdict(me)})
            self._said, self._last_beat_s = me, now_s
        epoch = self._read_epoch()
        if not self._leads():
            return epoch
        saved = StepDirectories(self.job.directory / "checkpoints").committed()
        decision = decide(
            self._alive(now_s),
            epoch,
            self._memory,
            self.options,
            now_s=now_s,
            wanted=self.job.nodes,
            progress=max(saved, default=-1),
        )
        self._memory = decision.memory
        for kind, words in decision.events:
            self._log(kind, words)
        if decision.epoch != epoch:
            self._write(self._folder / "epoch.json", asdict(decision.epoch))
        return decision.epoch

    def _mind_trainer(self, epoch: Epoch) -> None:
        """Starts, stops or buries this node's trainer."""
        if self._trainer is not None:
            self._bury()
        current = epoch.number == self._epoch
        mine = self._born in epoch.born and epoch.over is None
        if self._trainer is not None and not current:
            # Another node is gone: what this trainer waits for will never come.
            self._kill()
        if self._trainer is not None and epoch.over is not None and epoch.code:
            self._kill()
        if self._trainer is not None and epoch.stop and self._told_to_stop_s is None:
            self._send(signal.SIGTERM)
            self._told_to_stop_s = time.monotonic()
        if not self._asked_to_stop and mine and not current:
            self._start(epoch)

    def _start(self, epoch: Epoch) -> None:
        index, count = epoch.members.index(self.job.node), len(epoch.members)
        heartbeat = self._folder / f".{self.job.node}.trainer"
        heartbeat.unlink(missing_ok=True)
        given = {HEARTBEAT: str(heartbeat), EVERY_S: str(self.options.heartbeat_s)}
        # Also to one left alone: a launcher's variables still count the nodes that are lost.
        given |= {COORDINATOR: epoch.coordinator, COUNT: str(count), INDEX: str(index)}
        resumes = self._config_changed() not in (None, self._config_before)
        waiting = self._standby.take(given) if resumes else None
        self._trainer = waiting or subprocess.Popen(
            self.job.resume if resumes else self.job.command,
            env={**os.environ, **given},
            start_new_session=True,
        )
        self._epoch, self._state, self._code = epoch.number, "running", 0
        self._told_to_stop_s, self._started_s = None, time.monotonic()
        self._port = free_port()
        self._log("trainer started", f"process {self._trainer.pid}, {index} of {count}")

    def _platform(self) -> str | None:
        """Of the trainer's devices, as it says when it makes steps."""
        if self._trainer is None:
            return None
        try:
            return (self._folder / f".{self.job.node}.trainer").read_text() or None
        except (OSError, UnicodeDecodeError):
            return None

    def _config_changed(self) -> int | None:
        """When the run's config was written: a trainer does so when it has got as far as steps."""
        try:
            return (self.job.directory / "config.yaml").stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _bury(self) -> None:
        """Finds out whether the trainer has ended, or hangs."""
        assert self._trainer is not None
        code = self._trainer.poll()
        if code is None:
            silent_s = self._silent_s()
            asked_s = self._told_to_stop_s
            if silent_s is not None:
                self._log("trainer hangs", f"no sign of life for {silent_s:.0f} s")
            elif (
                asked_s is None or time.monotonic() - asked_s < _LEAVE_S + self.options.lost_after_s
            ):
                return
            self._kill()
            code = self._code
        self._trainer = None
        self._code = 128 - code if code < 0 else code
        ends: dict[int, State] = {0: "done", STOPPED: "stopped", _REFUSED: "refused"}
        self._state = ends.get(code, "failed")
        self._log("trainer ended", f"{self._state}, exit code {self._code}")

    def _silent_s(self) -> float | None:
        """For how long the trainer has given no sign of life, if that is too long."""
        heartbeat = self._folder / f".{self.job.node}.trainer"
        try:
            age_s = time.time() - heartbeat.stat().st_mtime
        except FileNotFoundError:
            age_s = time.monotonic() - self._started_s
            return age_s if age_s > self.options.start_s else None
        return age_s if age_s > self.options.lost_after_s else None

    def _ended(self, epoch: Epoch) -> int | None:
        if self._asked_to_stop and self._trainer is None:
            self._log("supervisor stopped", f"signal {self._asked_to_stop}")
            return 128 + self._asked_to_stop if self._state != "stopped" else 0
        if epoch.over is None or self._trainer is not None:
            return None
        self._log("supervisor ended", epoch.over)
        return epoch.code

    def _kill(self) -> None:
        if self._trainer is None:
            return
        self._send(signal.SIGKILL)
        self._code = self._trainer.wait()
        self._trainer = None

    def _send(self, number: int) -> None:
        if self._trainer is not None and self._trainer.poll() is None:
            os.killpg(self._trainer.pid, number)

    def _leads(self) -> bool:
        if not self._is_leader:
            try:
                self._locks.append(RunLock(self._folder / ".leader.lock"))
            except RunError:
                return False
            self._is_leader = True
            self._take_over()
            self._log("leads", "")
        return True

    def _take_over(self) -> None:
        """An epoch that this node has no part in is not gone on with."""
        epoch = self._read_epoch()
        if self._epoch != epoch.number:
            self._write(self._folder / "epoch.json", asdict(Epoch(epoch.number)))

    def _alive(self, now_s: float) -> dict[str, Node]:
        alive = {}
        for path in self._folder.glob("*.json"):
            if path.name == "epoch.json":
                continue
            try:
                said = json.loads(path.read_text())
                written_s = path.stat().st_mtime
            except (OSError, ValueError):
                continue
            beat = said.pop("beat")
            name = said["name"]
            if self._beats.get(name, (None,))[0] != beat:
                # A file from long ago that nobody has touched since is not a sign of life.
                stale = (
                    name not in self._beats and time.time() - written_s > self.options.lost_after_s
                )
                self._beats[name] = beat, float("-inf") if stale else now_s
            if now_s - self._beats[name][1] <= self.options.lost_after_s:
                alive[name] = Node(**said)
        return alive

    def _read_epoch(self) -> Epoch:
        try:
            said = json.loads((self._folder / "epoch.json").read_text())
        except FileNotFoundError:
            return Epoch()
        return Epoch(**{k: tuple(v) if isinstance(v, list) else v for k, v in said.items()})

    def _path_of(self, node: str) -> Path:
        return self._folder / f"{node}.json"

    def _write(self, path: Path, value: Any) -> None:
        try:
            write_atomically(path, json.dumps(value).encode())
        except OSError as error:
            # A node that cannot write is silent, which the others notice.
            self.say(f"supervisor: {path} cannot be written: {error.strerror}")

    def _log(self, event: str, words: str) -> None:
        row = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "node": self.job.node,
            "event": event,
            "what": words,
        }
        self.say(f"supervisor: {event}" + (f": {words}" if words else ""))
        path = self.job.directory / "supervisors" / f"{self.job.node}.events.jsonl"
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def node_name(given: str | None) -> str:
    """The name of this node: as given, or the host's.

    Raises:
      UserError: it is not a plain file name.
    """
    name = given if given is not None else socket.gethostname()
    if not name or Path(name).name != name or name.startswith(".") or name == "epoch":
        raise UserError(f"a node cannot be called {name!r}; use a plain name, such as node1")
    return name
