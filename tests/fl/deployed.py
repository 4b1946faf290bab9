"""A deployed job between threads, whose parties can be killed anywhere, for tests."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flax import nnx

from shardpar.fl import coordinator as coordinator_module
from shardpar.fl import ring_rounds as ring_module
from shardpar.fl import roll_call as roll_call_module
from shardpar.fl import trainer as trainer_module
from shardpar.fl.channel import LocalChannel, local_channels
from shardpar.fl.coordinator import Coordinator
from shardpar.fl.job import Job, job_of
from shardpar.fl.options import FederatedOptions, NetOptions
from shardpar.fl.party import Party
from shardpar.fl.privacy_options import PrivacyOptions
from shardpar.fl.ring_rounds import RingParty
from shardpar.fl.round_messages import HELLO
from shardpar.fl.secagg_options import SecAggOptions
from shardpar.fl.secagg_session import Identity
from shardpar.fl.task import Task

DIMS, ROWS = 5, 30
SERVER = "aggregator"
# Everyone waits for everyone; a test that is too slow for these fails, it does not pass wrongly.
NET = NetOptions(
    parties=("a", "b", "c"), job="test", lost="wait", join_s=20.0, wait_s=20.0, round_s=20.0
)
SECAGG = SecAggOptions(
    enabled=True, clip=10.0, most_weight=200.0, most_loss=1000.0, deadline_s=20.0
)
SCAFFOLD = FederatedOptions(
    algorithm="scaffold", rounds=2, batch=8, epochs=1, learning_rate=0.05, seed=3
)


class Line(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(0.1 * jax.random.normal(rngs.params(), (DIMS,)))

    def __call__(self, x):
        return x @ self.w[...]


def loss(model, batch):
    miss = model(batch["x"]) - batch["y"]
    return jnp.sum(batch["weights"] * miss**2) / 2, jnp.sum(batch["weights"])


@functools.cache
def line() -> Task:
    return Task.of(Line, loss)


@functools.cache
def make_job(
    federated: FederatedOptions = SCAFFOLD,
    secagg: SecAggOptions | None = None,
    privacy: PrivacyOptions | None = None,
    net: NetOptions = NET,
    records: int | None = None,
) -> Job:
    """Cached, so that programs are compiled once."""
    return job_of(
        line(),
        federated,
        privacy or PrivacyOptions(),
        secagg or SecAggOptions(),
        net,
        {"federated.rounds": str(federated.rounds)},
        records=records,
    )


def rows_of(party: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(ord(party[0]))
    count = ROWS + 7 * (ord(party[0]) - ord("a"))
    x = random.normal(0, 1, (count, DIMS)).astype(np.float32)
    y = (x * np.arange(DIMS, dtype=np.float32)).sum(axis=1) + random.normal(0, 0.1, count)
    return {"x": x, "y": y.astype(np.float32)}


class Killed(BaseException):
    """As kill -9: nothing that the victim has of handlers may run on it."""


@dataclass
class Lives:
    """Counts what a process does to the outside and ends it, once: at the n-th time, or by name."""

    dies_at: int | None = None
    dies_on: str | None = None
    events: list[str] = field(default_factory=list)

    def tick(self, event: str) -> None:
        self.events.append(event)
        if self.dies_at is not None and len(self.events) > self.dies_at:
            self.dies_at = None
            raise Killed(event)
        if self.dies_on is not None and event.endswith(self.dies_on):
            self.dies_on = None
            raise Killed(event)


class Mortal(LocalChannel):
    """An end whose process dies before it sends, or once it has received, for the n-th time."""

    lives: Lives

    @classmethod
    def of(cls, end: LocalChannel, lives: Lives) -> Mortal:
        channel = cls(end.party, end.parties, end.boxes)
        channel.lives = lives
        return channel

    def send(self, to, topic, message):
        self.lives.tick(f"send {topic}")
        super().send(to, topic, message)

    def receive(self, sender, topic, kind, timeout_s=None):
        message = super().receive(sender, topic, kind, timeout_s)
        self.lives.tick(f"received {topic}")
        return message


_LIVES = threading.local()


@pytest.fixture
def mortal_writes(monkeypatch):
    """Processes die before and after they write to disk, too."""

    def patch(module) -> None:
        write = module.write_record

        def mortal(path, record):
            lives = getattr(_LIVES, "lives", None)
            if lives:
                lives.tick(f"write {path.name}")
            write(path, record)
            if lives:
                lives.tick(f"wrote {path.name}")

        monkeypatch.setattr(module, "write_record", mortal)

    patch(coordinator_module)
    patch(trainer_module)
    patch(ring_module)
    patch(roll_call_module)


@dataclass
class Federation:
    """The processes of a job, as threads.

    Attributes:
      lives: of a process, by name, if it is to die.
      down: names of parties that are not started again once they have died.
      loses_mail: whether what was sent to a process that died dies with it.
      patience_s: of parties.
    """

    job: Job
    folder: Path
    lives: dict[str, Lives] = field(default_factory=dict)
    down: frozenset[str] = frozenset()
    loses_mail: bool = True
    patience_s: float = 30.0
    jobs: dict[str, Job] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    outcomes: dict[str, object] = field(default_factory=dict)
    evaluate: Callable = lambda *_: {}

    def __post_init__(self) -> None:
        names = self.names
        self.ends = local_channels(names)
        self.keys = {name: Ed25519PrivateKey.generate() for name in names}
        self.roster = {name: key.public_key() for name, key in self.keys.items()}

    @property
    def names(self) -> tuple[str, ...]:
        return self.job.parties if self.job.is_ring else (SERVER, *self.job.parties)

    def run(self, timeout_s: float = 60.0):
        """The aggregator's outcome, or a ring's first party's; all are in `outcomes`."""
        names = self.names
        threads = {n: threading.Thread(target=self._live, args=(n,), daemon=True) for n in names}
        for thread in threads.values():
            thread.start()
        for name, thread in threads.items():
            if name not in self.down:
                thread.join(timeout_s)
                assert not thread.is_alive(), (name, self.said)
        outcome = self.outcomes[names[0]]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def waits_for(self, name: str, timeout_s: float = 20.0) -> Callable:
        """An `evaluate` that lets each round wait until a party has said that it is there.

        Whoever is started again says hello in its own time; without this, the rounds of a busy
        machine may be over by then. Of two hellos the first has surely been sent.
        """

        def hellos() -> int:
            return sum(event == f"send {HELLO}" for event in self.lives[name].events)

        def wait(*_) -> dict:
            said, until = hellos(), time.monotonic() + timeout_s
            while hellos() < said + 2:
                assert time.monotonic() < until, (name, self.outcomes.get(name))
                time.sleep(0.01)
            return {}

        return wait

    def _live(self, name: str) -> None:
        """A process, started again when it is killed."""
        lives = self.lives.setdefault(name, Lives())
        _LIVES.lives = lives
        while True:
            try:
                self.outcomes[name] = self._process(name, lives).run()
                return
            except Killed as killed:
                self.outcomes[name] = killed
                if name in self.down:
                    return
                if self.loses_mail:
                    self._lose_mail(name)
            except Exception as error:
                self.outcomes[name] = error
                return

    def _process(self, name: str, lives: Lives):
        channel = Mortal.of(self.ends[name], lives)
        if name == SERVER:
            return Coordinator(
                channel, self.jobs.get(name, self.job), self.folder / name, self.roster,
                evaluate=self.evaluate,
                report=lambda round_, row: self.rows.append({"round": round_, **row}),
                say=self.said.append,
            )  # fmt: skip
        if self.job.is_ring:
            return RingParty(
                channel, self.jobs.get(name, self.job), rows_of(name), self.folder / name,
                Identity(name, self.keys[name]), self.roster, evaluate=self.evaluate,
                report=lambda round_, row: self.rows.append({"party": name, **row}),
                say=self.said.append,
            )  # fmt: skip
        return Party(
            channel, self.jobs.get(name, self.job), rows_of(name), self.folder / name,
            Identity(name, self.keys[name]), self.roster, say=self.said.append,
            hello_s=0.1, patience_s=self.patience_s,
        )  # fmt: skip

    def _lose_mail(self, name: str) -> None:
        boxes = self.ends[name].boxes
        for key in list(boxes):
            if key[1] == name:
                while not boxes[key].empty():
                    boxes[key].get_nowait()


def params_of(outcome) -> np.ndarray:
    return np.asarray(outcome.state["params"]["w"])


def with_net(**changes) -> NetOptions:
    return replace(NET, **changes)


def compile_first(job: Job, folder: Path) -> None:
    """Runs a job's programs once, with patience, so that short deadlines later measure no compiler.

    Programs are kept by task, algorithm and shapes, whatever the deadlines are.
    """
    net = replace(job.net, round_s=60.0, lost="wait", wait_s=60.0, join_s=60.0)
    secagg = replace(job.secagg, deadline_s=60.0)
    patient = make_job(job.federated, secagg, job.privacy, net)
    Federation(patient, folder).run(120.0)
