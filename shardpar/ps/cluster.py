"""Training with servers and workers in processes of their own, on Ray.

Actors hold the shards, run the model and keep the clock; any of them may be killed. A server
comes back from its snapshot and log, a worker from what the servers know of it, the clock
from what workers tell it. Needs the extra `ray`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from shardpar.capture.model import Init, Loss
from shardpar.errors import ConfigError, PlanError, RunError
from shardpar.ps.actors import (
    ClockActor,
    RemoteServers,
    ServerActor,
    WorkerActor,
    WorkerSpec,
    insisted,
)
from shardpar.ps.asked import Batch
from shardpar.ps.cache import CacheOptions
from shardpar.ps.consistency import BSP, Consistency
from shardpar.ps.functions import Merge
from shardpar.ps.log import Fsync
from shardpar.ps.messages import PullRequest, RowsRequest
from shardpar.ps.placement import Placement
from shardpar.ps.ray_start import ray_module, start_ray
from shardpar.ps.server import Durability
from shardpar.ps.shard import Dense, ShardSpec
from shardpar.ps.worker import Data, WorkerProgram

_INLINE_BYTES = 50_000

_MERGED: dict[str, Callable[[Any, Any], Any]] = {
    "sum": np.add,
    "max": np.maximum,
    "min": np.minimum,
}


@dataclass(frozen=True)
class ClusterOptions:
    """How many processes there are, and what holds them together.

    Attributes:
      directory: where servers keep their snapshots and logs; each its own folder in it. Going
        on with a directory goes on with its training.
      servers, workers: how many.
      consistency: how far workers may be apart.
      deal: how rows are dealt to servers.
      cache: of each worker, or None.
      delay_scaled: divide updates by how many rounds old their rows were (SIGMOD 2017); for
        SSP and ASP.
      snapshot_every, fsync: see `ps.server.Durability`.
      patience_s: how long a process may be away before training fails.
      restarts: how often each worker may be killed in a call of `train`.
      address: of a Ray cluster that is running, "auto" for the one that this machine is in; None
        starts Ray here. `directory` must be a place that all of its machines share.
    """

    directory: Path
    servers: int = 2
    workers: int = 2
    consistency: Consistency = BSP
    deal: str = "turns"
    cache: CacheOptions | None = None
    delay_scaled: bool = False
    snapshot_every: int = 10_000
    fsync: Fsync = "never"
    patience_s: float = 120.0
    restarts: int = 10
    address: str | None = None

    def __post_init__(self) -> None:
        if self.servers < 1 or self.workers < 1:
            raise ConfigError(
                f"there is at least 1 server and 1 worker, not {self.servers} and {self.workers}"
            )
        if self.delay_scaled and self.consistency.lockstep:
            raise ConfigError("in lockstep no update is late; leave delay_scaled out, or use SSP")
        if self.consistency.lockstep and self.cache is not None and self.cache.push_bound:
            raise ConfigError(
                "in lockstep all updates of a step are applied together, so none can wait; use "
                "push_bound=0, or SSP"
            )
        if self.delay_scaled and self.cache is not None and self.cache.push_bound:
            raise ConfigError(
                "updates that wait in a cache are in the worker's copies in full, so servers "
                "cannot divide them; use push_bound=0, or leave delay_scaled out"
            )


@dataclass(frozen=True)
class Trained:
    """What a call of `train` came to.

    Attributes:
      losses: of each step, over all workers' samples; None where a killed clock forgot.
      steps: that every worker has finished; less than asked for if `watch` stopped them.
      slow: workers whose time per sample is above the mean divided by 0.7.
      seconds_per_sample: by worker, waiting for others not counted.
      most_ahead: steps that a worker was ahead of the slowest when it started one.
      asked, pulled, pushed: rows that steps needed, and that went over the wire.
      worker_restarts: how often workers had to start anew.
      wall_s: of the call.
    """

    losses: tuple[float | None, ...]
    steps: int
    slow: tuple[int, ...]
    seconds_per_sample: Mapping[int, float]
    most_ahead: int
    asked: int
    pulled: int
    pushed: int
    worker_restarts: int
    wall_s: float


@dataclass
class Cluster:
    """Servers, workers and a clock, running; a context manager that ends them.

    Args:
      loss, init, optimizer: as for `SparseProgram`.
      batch: arrays or shapes of one worker's batch.
      data: `data(worker, step)` gives the batch of a worker's step, the same each time.
      options: how many processes, and what holds them together.
      seed: of the first state.
      rate: scales the tables' learning rates by step.

    Raises:
      PlanError: Ray is not installed, or the model is not one that workers can run.
      RunError: Ray does not start, or is not at the address.
      CheckpointError: the directory is damaged, or another cluster's.
    """

    loss: Loss
    init: Init
    optimizer: optax.GradientTransformation
    batch: Batch
    data: Data
    options: ClusterOptions
    seed: int = 0
    rate: optax.Schedule | None = None
    _actors: list[Any] = field(default_factory=list, init=False, repr=False)
    _id: str = field(default_factory=lambda: secrets.token_hex(8), init=False, repr=False)
    _held: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        start_ray(self.options.address)
        options = self.options
        shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in self.batch.items()}
        program = WorkerProgram(self.loss, self.init, batch=shapes)
        beginning = program.begin(self.seed)
        self.program, self.rest = program, beginning.rest
        self.tables = program.tables
        self.placement = Placement(rows=options.servers, deal=options.deal)  # type: ignore[arg-type]
        servers = []
        for index in range(options.servers):
            dense = Dense(beginning.dense, self.optimizer) if index == 0 else None
            spec = ShardSpec(
                program.tables, beginning.keys, self.placement, index, options.workers,
                options.consistency, dense, self.rate, options.delay_scaled,
            )  # fmt: skip
            folder = Path(options.directory).absolute() / f"server-{index}"
            kept = Durability(folder, options.snapshot_every, options.fsync)
            servers.append(self._actor(f"server-{index}", ServerActor, spec, kept))
        self.servers = RemoteServers(servers, options.patience_s)
        positions = [self.servers.positions(worker) for worker in range(options.workers)]
        steps = tuple(min(p.steps for p in there) for there in positions)
        self._clock = self._actor("clock", ClockActor, steps, options.consistency)
        worker = WorkerSpec(
            self.loss, self.init, shapes, self.data, beginning.rest, self.placement,
            options.cache, self.rate, options.patience_s,
        )  # fmt: skip
        names = [self._name(f"server-{index}") for index in range(options.servers)]
        self._workers = [
            self._actor(f"worker-{number}", WorkerActor, number, worker, names, self._name("clock"))
            for number in range(options.workers)
        ]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def steps(self) -> int:
        """The steps that every worker has finished."""
        return min(self._ask_clock("steps", {}))

    def losses(self, since: int) -> dict[int, float]:
        """The losses of steps, counted from 0, that every worker has finished, from `since` on.

        Without those that a clock forgot when it was killed.
        """
        noted = self._ask_clock("losses", since)
        means = ((step, self._mean_loss(parts)) for step, parts in sorted(noted.items()))
        return {step: loss for step, loss in means if loss is not None}

    def train(
        self, steps: int, watch: Callable[[tuple[int, ...]], bool | None] | None = None
    ) -> Trained:
        """Runs until every worker has finished so many steps in all, or `watch` wants no more.

        Args:
          steps: counted from the beginning of the directory's training.
          watch: told all clocks several times a second. Once it returns True, workers start no
            further step, and what waits in their caches is pushed.

        Raises:
          RunError: a process stays away, or is killed too often.
          ShardparError: what a worker raised.
        """
        ray = ray_module()
        began_s = time.perf_counter()
        self._ask_clock("go")
        stopping = False
        running = {w.train.remote(steps): number for number, w in enumerate(self._workers)}
        results: dict[int, dict[str, int]] = {}
        restarts = [0] * len(self._workers)
        while running:
            ready, _ = ray.wait(list(running), num_returns=1, timeout=0.1)
            for reference in ready:
                number = running.pop(reference)
                try:
                    results[number] = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayActorError as error:
                    restarts[number] += 1
                    if restarts[number] > self.options.restarts:
                        raise RunError(
                            f"worker {number} died {restarts[number]} times: {error}; look into "
                            "Ray's logs of it"
                        ) from None
                    self._await(number)
                    running[self._workers[number].train.remote(steps)] = number
            clocks = self._ask_clock("steps", {w: done["steps"] for w, done in results.items()})
            stopping = bool(watch is not None and watch(clocks)) or stopping
            if stopping:
                self._ask_clock("stop")
        return self._trained(min(clocks), results, sum(restarts), time.perf_counter() - began_s)

    def rows(self, table: str, ids: np.ndarray) -> np.ndarray:
        """Rows of a table as they are on the servers, float32[n, dim]; ids are distinct."""
        ids = np.asarray(ids, np.int64)
        homes = np.asarray(self.placement.home(ids, self.tables[table].rows)[0])
        requests = [
            (PullRequest({table: RowsRequest(ids[homes == server])}),)
            for server in range(self.options.servers)
        ]
        out = np.empty((ids.size, self.tables[table].dim), np.float32)
        for server, answer in enumerate(self.servers.all("pull", requests)):
            out[homes == server] = answer.rows[table].pieces[0]
        return out

    def dense(self) -> dict[str, np.ndarray]:
        """The parameters that are not rows."""
        request = PullRequest({}, dense=True)
        return dict(self.servers.pull([request] * self.options.servers)[0].dense)

    def apply(self, batch: Mapping[str, np.ndarray], run: Callable[[Any, Batch], Any]) -> Any:
        """What `run(model, batch)` gives with the rows and parameters as they are on the servers.

        Args:
          batch: of a worker's shapes.
          run: a function with a name that lasts: programs are kept by it. It looks up what the
            loss does, in the same order.

        Raises:
          DataError: an id is outside its table.
        """
        wanted = self.program.wanted(batch)
        rows = {name: self.rows(name, ids) for name, ids in self.program.ids(wanted).items()}
        return self.program.apply(self.dense(), self.rest, rows, batch, wanted, run)

    def get(self, table: str, run: Callable[[Any, Any], Any], merge: Merge) -> Any:
        """psFunc: what a function of the rows comes to over all servers; see `ps.functions.get`.

        Example: `cluster.get("embed", lambda rows, ids: (rows * rows).sum(), "sum")`.
        """
        if merge not in _MERGED:
            raise PlanError(f"results are merged by 'sum', 'max' or 'min', not {merge!r}")
        parts = self.servers.all("get", [(table, run)] * self.options.servers)
        return reduce(lambda a, b: jax.tree.map(_MERGED[merge], a, b), parts)

    def update(self, table: str, run: Callable[[Any, Any], Any]) -> None:
        """psFunc: all rows of a table become what `run(rows [n, dim], ids [n])` makes of them.

        Once on every server, whatever is killed meanwhile. Not while workers train: their
        caches would not know.
        """
        caller = self.options.workers
        positions = self.servers.positions(caller)
        if any(position != positions[0] for position in positions):
            raise RunError(
                "an update before this one reached some servers only, since its caller died; "
                "its function is not kept: go back to an earlier copy of the directory"
            )
        given = ((table, run, caller, positions[0].pushes),)
        self.servers.all("update", [given] * self.options.servers)

    def states(self) -> list[dict[str, int]]:
        """Of each server: its process "pid", and counts since that began."""
        return self.servers.all("state", [()] * self.options.servers)

    def worker_pids(self) -> list[int]:
        """The processes of the workers, while they are not training."""
        return [self._await(number) for number in range(self.options.workers)]

    def close(self) -> None:
        """Ends all actors; what servers acknowledged stays in the directory."""
        ray = ray_module()
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors.clear()
        self._held.clear()

    def _name(self, of: str) -> str:
        """What workers ask Ray for: handles among an actor's arguments bind it to their owner."""
        return f"{self._id}-{of}"

    def _actor(self, name: str, kind: type, *given: Any) -> Any:
        # Ray keeps large arguments in its store only while someone refers to them, and an actor
        # that starts anew needs them again.
        ray = ray_module()
        large = [len(ray.cloudpickle.dumps(argument)) > _INLINE_BYTES for argument in given]
        held = [ray.put(x) if put else x for x, put in zip(given, large, strict=True)]
        lasting = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(kind)
        made = lasting.options(name=self._name(name)).remote(*held)
        self._actors.append(made)
        self._held.extend(held)
        return made

    def _await(self, number: int) -> int:
        call = self._workers[number].pid.remote
        return insisted(call, call(), self.options.patience_s, f"worker {number}")[0]

    def _ask_clock(self, method: str, *given: Any) -> Any:
        call = lambda: getattr(self._clock, method).remote(*given)  # noqa: E731
        return insisted(call, call(), self.options.patience_s, "the clock")[0]

    def _trained(
        self, steps: int, results: Mapping[int, Mapping[str, int]], restarts: int, wall_s: float
    ) -> Trained:
        noted = self._ask_clock("report")
        losses = []
        for step in range(steps):
            losses.append(self._mean_loss(noted["losses"].get(step, {})))
        counts = {
            name: sum(result[name] for result in results.values())
            for name in ("asked", "pulled", "pushed")
        }
        return Trained(
            tuple(losses), steps, noted["slow"], noted["seconds_per_sample"],
            noted["most_ahead"], counts["asked"], counts["pulled"], counts["pushed"],
            restarts, wall_s,
        )  # fmt: skip

    def _mean_loss(self, parts: Mapping[int, tuple[float, float]]) -> float | None:
        """Over all workers' samples; None if one of them is missing."""
        if len(parts) < self.options.workers:
            return None
        weight = sum(weight for _, weight in parts.values())
        return sum(loss for loss, _ in parts.values()) / weight if weight else None
