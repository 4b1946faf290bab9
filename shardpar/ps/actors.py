"""What runs in the processes of a cluster: servers, workers and the clock, as plain classes.

`ps.cluster` makes Ray actors of them. A worker that meets a dead server calls again until
the server has started anew; the push it sends is the same, with the same number.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax
from typing_extensions import override

from shardpar.capture.model import Init, Loss
from shardpar.errors import RunError, ShardparError
from shardpar.ps.asked import Batch
from shardpar.ps.cache import CachedRows, CacheOptions
from shardpar.ps.client import Client, Rows, Servers
from shardpar.ps.consistency import Clocks, Consistency, slow_workers
from shardpar.ps.messages import Position, Pulled, PullRequest, Push
from shardpar.ps.placement import Placement
from shardpar.ps.server import Durability, Server
from shardpar.ps.shard import ShardSpec
from shardpar.ps.worker import Data, Worker, WorkerProgram

_LOCK_WAIT_S = 20.0
_RETRY_EVERY_S = 0.05
_LOOK_EVERY_S = 5.0


class ServerActor:
    """A server in a process of its own; see `ps.server.Server` for what it does."""

    def __init__(self, spec: ShardSpec, durability: Durability) -> None:
        jax.config.update("jax_platforms", "cpu")
        self._opened: Server | ShardparError
        try:
            self._opened = _opened(spec, durability)
        except ShardparError as error:
            # Raised here, Ray would only say that the actor died.
            self._opened = error

    @property
    def _server(self) -> Server:
        if isinstance(self._opened, ShardparError):
            raise self._opened
        return self._opened

    def pull(self, request: PullRequest) -> Pulled:
        """See `Server.pull`."""
        return self._server.pull(request)

    def push(self, push: Push) -> None:
        """See `Server.push`."""
        self._server.push(push)

    def position(self, worker: int) -> Position:
        """See `Server.position`."""
        return self._server.position(worker)

    def get(self, table: str, run: Callable[[Any, Any], Any]) -> Any:
        """See `Server.get`."""
        return self._server.get(table, run)

    def update(self, given: tuple[str, Callable[[Any, Any], Any], int, int]) -> None:
        """See `Server.update`."""
        self._server.update(*given)

    def state(self) -> dict[str, int]:
        """Its process, and what it has counted since that began."""
        shard = self._server.shard
        return {
            "pid": os.getpid(),
            "taken": shard.taken,
            "duplicates": shard.duplicates,
            "skipped": shard.skipped,
            "replayed": self._server.replayed,
            "snapshots": self._server.snapshots,
        }


def _opened(spec: ShardSpec, durability: Durability) -> Server:
    """The server; its predecessor may still be dying and hold the directory."""
    until_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            return Server(spec, durability)
        except RunError as error:
            if "another process" not in str(error) or time.monotonic() > until_s:
                raise
            time.sleep(_RETRY_EVERY_S)


@dataclass
class RemoteServers(Servers):
    """Servers in other processes, which may die and start anew.

    Attributes:
      handles: Ray's, in the order of servers.
      patience_s: how long a server may be away before a call to it fails.
      retried: calls that had to be made again.
    """

    handles: Sequence[Any]
    patience_s: float = 120.0
    retried: int = 0

    @override
    def pull(self, requests: Sequence[PullRequest]) -> list[Pulled]:
        return self.all("pull", [(request,) for request in requests])

    @override
    def push(self, pushes: Sequence[Push]) -> None:
        self.all("push", [(push,) for push in pushes])

    @override
    def positions(self, worker: int) -> list[Position]:
        return self.all("position", [(worker,)] * len(self.handles))

    def all(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Calls a method of every server at once, and again those that died over it.

        Raises:
          RunError: a server stays away.
          ShardparError: what the method raised.
        """
        calls = [
            (lambda h=handle, a=given: getattr(h, method).remote(*a))
            for handle, given in zip(self.handles, arguments, strict=True)
        ]
        begun = [call() for call in calls]
        out = []
        for index, (call, reference) in enumerate(zip(calls, begun, strict=True)):
            answer, again = insisted(call, reference, self.patience_s, f"server {index}")
            self.retried += again
            out.append(answer)
        return out


def insisted(call: Callable[[], Any], begun: Any, patience_s: float, who: str) -> tuple[Any, int]:
    """The answer of an actor that may have to start anew first, and how often it was asked again.

    Only for calls that may be made twice.

    Raises:
      RunError: it stays away for longer than `patience_s`.
      ShardparError: what the method raised.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

    until_s, again, reference = time.monotonic() + patience_s, 0, begun
    while True:
        try:
            return ray.get(reference, timeout=_LOOK_EVERY_S), again
        except RayTaskError as error:
            raise error.cause from None
        except (RayActorError, GetTimeoutError) as error:
            if time.monotonic() > until_s:
                raise RunError(
                    f"{who} has not answered for {patience_s:.0f} s: {error}; look into Ray's "
                    "logs of it. What servers acknowledged is in their directories"
                ) from None
            if isinstance(error, RayActorError):
                again += 1
                time.sleep(_RETRY_EVERY_S)
                reference = call()


class ClockActor:
    """Lets workers start their steps, and notes what they say about them."""

    def __init__(self, steps: tuple[int, ...], bound: Consistency) -> None:
        self._clocks, self._bound = Clocks(steps), bound
        self._begun = list(steps)
        self._until: int | None = None
        self._moved = asyncio.Condition()
        self._losses: dict[int, dict[int, tuple[float, float]]] = {}
        self._times_s: dict[int, float] = {}
        self._samples: dict[int, int] = {}
        self._most_ahead = 0

    async def start(self, worker: int, steps: int) -> bool:
        """Returns when a worker that has finished so many steps may start the next: True.

        False if it is to stop instead.
        """
        await self._at(worker, steps)

        def stops() -> bool:
            return self._until is not None and steps >= self._until

        async with self._moved:
            await self._moved.wait_for(
                lambda: stops() or self._clocks.may_start(worker, self._bound)
            )
            if stops():
                return False
            ahead = self._clocks.steps[worker] - self._clocks.slowest
            self._most_ahead = max(self._most_ahead, ahead)
            self._begun[worker] = steps + 1
            return True

    async def go(self) -> None:
        """Workers start steps again after `stop`."""
        self._until = None

    async def stop(self) -> None:
        """Workers start no further step; in lockstep, all finish what one has begun."""
        async with self._moved:
            if self._until is None:
                self._until = max(self._begun) if self._bound.lockstep else 0
            self._moved.notify_all()

    async def finished(
        self, worker: int, steps: int, loss: float, weight: float, time_s: float, samples: int
    ) -> None:
        """A worker's step is with all servers."""
        self._losses.setdefault(steps - 1, {})[worker] = (loss, weight)
        self._times_s[worker] = self._times_s.get(worker, 0.0) + time_s
        self._samples[worker] = self._samples.get(worker, 0) + samples
        await self._at(worker, steps)

    async def steps(self, done: Mapping[int, int]) -> tuple[int, ...]:
        """All clocks, after noting those of workers that are done."""
        for worker, steps in done.items():
            await self._at(worker, steps)
        return self._clocks.steps

    async def losses(self, since: int) -> dict[int, dict[int, tuple[float, float]]]:
        """What was noted of steps from `since` on: by step and worker, (sum, weight)."""
        return {step: self._losses[step] for step in range(since, self._clocks.slowest)
                if step in self._losses}  # fmt: skip

    async def report(self) -> dict[str, Any]:
        """What was noted since this process began."""
        per_sample = {w: t / self._samples[w] for w, t in self._times_s.items()}
        return {
            "losses": self._losses,
            "seconds_per_sample": per_sample,
            "slow": slow_workers(per_sample),
            "most_ahead": self._most_ahead,
        }

    async def _at(self, worker: int, steps: int) -> None:
        async with self._moved:
            self._clocks = self._clocks.finished(worker, steps)
            self._moved.notify_all()


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker runs.

    Attributes:
      loss: of the model, as everywhere.
      init: makes the model.
      batch: shapes of one worker's batch.
      data: gives the batch of a worker's step.
      rest: the model's other variables.
      placement: of rows over servers.
      cache: None for none.
      rate: scales the tables' learning rates.
      patience_s: how long a server may be away.
    """

    loss: Loss
    init: Init
    batch: Batch
    data: Data
    rest: Mapping[str, Any]
    placement: Placement
    cache: CacheOptions | None = None
    rate: optax.Schedule | None = None
    patience_s: float = 120.0


class WorkerActor:
    """A worker in a process of its own; it begins where the servers know it to be.

    Servers and clock are given by the names that Ray knows them by.
    """

    def __init__(self, number: int, spec: WorkerSpec, servers: Sequence[str], clock: str) -> None:
        self._failed: ShardparError | None = None
        try:
            self._make(number, spec, servers, clock)
        except ShardparError as error:
            # Raised here, Ray would start it anew, to fail again.
            self._failed = error

    def _make(self, number: int, spec: WorkerSpec, servers: Sequence[str], clock: str) -> None:
        import ray

        self._number, self._clock, self._spec = number, ray.get_actor(clock), spec
        self._servers = RemoteServers(list(map(ray.get_actor, servers)), spec.patience_s)
        program = WorkerProgram(spec.loss, spec.init, batch=spec.batch)
        self._client = Client(number, self._servers, program.tables, spec.placement)
        rows: Rows = self._client
        if spec.cache is not None:
            rows = CachedRows(self._client, spec.cache, spec.rate)
        self._worker = Worker(number, program, spec.rest, rows, spec.data)

    def train(self, steps: int) -> dict[str, int]:
        """Runs until it has finished so many steps in all, or is to stop.

        Returns:
          The steps that it has finished, and what went over the wire since it was made.

        Raises:
          ShardparError: what kept it from being made, or what a step met.
        """
        if self._failed is not None:
            raise self._failed
        for step in range(self._client.position.steps, steps):
            if not self._tell("start", step):
                break
            began_s = time.perf_counter()
            found = self._worker.run(step)
            time_s = time.perf_counter() - began_s
            samples = next(iter(self._spec.batch.values())).shape[0]
            self._tell("finished", step + 1, found.loss, found.weight, time_s, samples)
        self._worker.rows.flush()
        traffic = self._client.traffic
        return {
            "steps": self._client.position.steps,
            "asked": traffic.asked,
            "pulled": traffic.pulled,
            "pushed": traffic.pushed,
            "retried": self._servers.retried,
        }

    def pid(self) -> int:
        """Its process."""
        return os.getpid()

    def _tell(self, method: str, *given: Any) -> Any:
        call = lambda: getattr(self._clock, method).remote(self._number, *given)  # noqa: E731
        patience_s = float("inf") if method == "start" else 120.0
        return insisted(call, call(), patience_s, "the clock")[0]
