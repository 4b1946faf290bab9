"""Takes part in rounds as a party: train on own data, have the result on disk, send it.

What a round would make of the party's own state is written to disk beside the old one before
anything is sent, and takes its place when the aggregator says that the round was committed with
this party in it. A round that is repeated from the same model sends the same update again, so that
noise that the party added itself is paid for once.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from shardpar.errors import PartyError, RunError
from shardpar.fl.agreement import require_agreement
from shardpar.fl.attendance import Returning, heard
from shardpar.fl.channel import Channel
from shardpar.fl.examples import Examples, order_of
from shardpar.fl.job import Job
from shardpar.fl.ledger import Ledger
from shardpar.fl.messages import M, Message, Tensor, encode
from shardpar.fl.privacy import local_noise
from shardpar.fl.private_rounds import budget_of
from shardpar.fl.round_messages import (
    HELLO,
    STOPPED,
    Begin,
    Failed,
    FromParty,
    Hello,
    Orders,
    Sent,
    Stop,
    Terms,
    Train,
    Trained,
    Update,
    Wait,
    orders_topic,
    round_topic,
)
from shardpar.fl.rounds import client_update
from shardpar.fl.secagg import run_client
from shardpar.fl.secagg_session import Identity, Roster
from shardpar.fl.stored import read_record, tensors_of, tree_of, write_record
from shardpar.fl.streams import Randomness
from shardpar.fl.task import Params
from shardpar.run.lock import RunLock

Tree = Any

_SLICE_S = 0.2
_LOOK_S = 1e-3
# The aggregator may take as long as its own deadline, and its answer a little longer still.
_MARGIN_S = 10.0


class Kept(msgspec.Struct, frozen=True):
    """What a party keeps between rounds, on disk.

    Attributes:
      run: of the aggregator that it has taken part in; "" before the first.
      of: the (round, attempt) that it is the outcome of.
      kept: what the algorithm's client keeps.
    """

    run: str
    of: tuple[int, int] | None
    kept: dict[str, Tensor]


class Prepared(msgspec.Struct, frozen=True):
    """What a round will have made of it if it is committed, on disk.

    Attributes:
      run: of the aggregator.
      of: the (round, attempt).
      model: SHA-256 of what was broadcast.
      kept: what the algorithm's client keeps afterwards.
      sums: its update; own noise is in it.
    """

    run: str
    of: tuple[int, int]
    model: bytes
    kept: dict[str, Tensor]
    sums: dict[str, Tensor]


@dataclass(frozen=True)
class Ended:
    """How it ended for a party.

    Attributes:
      rounds: that were committed, with it or without.
      reason: why there will be no more.
      params: the model at the end; None if this party left before.
    """

    rounds: int
    reason: str
    params: Params | None = None


class SupersededError(Exception):
    """The aggregator wants something else by now."""

    def __init__(self, orders: Message) -> None:
        """Carries the newer orders."""
        super().__init__(type(orders).__name__)
        self.orders = orders


@dataclass
class Party:
    """One party of a job.

    Attributes:
      channel: to the aggregator.
      job: what it is about.
      rows: its examples, by field, each [examples, ...].
      folder: where it keeps its state and its ledger; another start goes on from there.
      identity: its long-term key; needed with secure aggregation.
      roster: long-term public keys of all parties; needed with secure aggregation.
      say: takes one line for people.
      hello_s: how often it says that it is there while it waits.
      patience_s: how long it waits for a sign of the aggregator.
    """

    channel: Channel
    job: Job
    rows: Mapping[str, np.ndarray]
    folder: Path
    identity: Identity | None = None
    roster: Roster = field(default_factory=dict)
    say: Callable[[str], None] = lambda *_: None
    hello_s: float = 2.0
    patience_s: float = 600.0

    def run(self) -> Ended:
        """Takes part until the aggregator says that it is over.

        Raises:
          ConfigError: the aggregator has other terms; names the keys.
          PartyError: the aggregator was silent for too long, or broke the protocol.
          RunError: this party's state is of another run, or its part of a round failed.
          CheckpointError: what is in the folder is damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(RunLock(self.folder / ".lock"))
            self._ledger = self._open_ledger(stack)
            self._restore()
            self._incarnation = secrets.token_hex(16)
            self._topic = orders_topic(self._incarnation)
            self._said_hello = self._heard = float("-inf")
            self._answered: tuple[int, int] | None = None
            self._reported_bytes = self.channel.sent_bytes
            self._heard = time.monotonic()
            orders: Message | None = None
            while True:
                try:
                    ended = self._follow(orders or self._await())
                    orders = None
                except SupersededError as newer:
                    orders, ended = newer.orders, None
                except PartyError:
                    if not self._server_restarted():
                        raise
                    orders = ended = None
                if ended is not None:
                    return ended

    def _follow(self, orders: Message) -> Ended | None:
        match orders:
            case Terms():
                server = self._server
                require_agreement(self.job.terms, orders.terms, party=server)
                raise PartyError(f"{server} refuses the very terms that it has", party=server)
            case Stop():
                self._require_run(orders.run)
                self._settle(orders.committed)
                shapes = self.job.state_shapes["params"]
                params = tree_of(orders.params, shapes, party=self._server)
                self._send(STOPPED, Sent(0))
                return Ended(orders.rounds, orders.reason, params)
            case Train():
                return self._train(orders)
        return None

    def _train(self, orders: Train) -> Ended | None:
        self._require_run(orders.run)
        self._settle(orders.committed)
        of = (orders.round_, orders.attempt)
        if self._answered == of:
            # It was sent twice, because the connection broke in between.
            return None
        self._answered = of
        topic = round_topic(*of, "update")
        try:
            update, clip = self._update(orders)
        except _BudgetSpentError as error:
            self._send(topic, FromParty(Failed(f"{error}"[:4096], spent=True)))
            return Ended(orders.round_, f"{error}")
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._send(topic, FromParty(Failed(reason[:4096])))
            raise
        if not self.job.secagg.enabled:
            self._send(topic, FromParty(Update(tensors_of(update))))
        else:
            self._send(topic, FromParty(Trained()))
            try:
                self._aggregate(of, update, clip)
            except PartyError as error:
                self.say(f"left the secure aggregation of round {of[0] + 1}: {error}")
                return None
        sent = self.channel.sent_bytes - self._reported_bytes
        self._send(round_topic(*of, "sent"), Sent(sent))
        self._reported_bytes += sent
        return None

    def _aggregate(self, of: tuple[int, int], update: Tree, clip: float) -> None:
        job, server = self.job, self._server
        if self.identity is None:
            raise RunError("secure aggregation needs this party's signing key")
        begin = self._await_begin(of)
        if begin is None:
            return
        strangers = sorted(set(begin.cohort) - set(job.parties))
        if strangers or len(begin.cohort) < job.required or self.identity.party not in begin.cohort:
            raise PartyError(
                f"{server} begins with {', '.join(begin.cohort)[:200]}; it takes {job.required} of "
                "the parties agreed on, this one among them",
                party=server,
            )
        session = job.session(*of, begin.cohort)
        vector = job.masked_words(update, clip)
        channel = _Attentive(self.channel, self._check)
        wait_s = job.secagg.deadline_s * 1.5 + _MARGIN_S
        run_client(channel, server, self.identity, session, self.roster, vector, wait_s)

    def _update(self, orders: Train) -> tuple[Tree, float]:
        """(what to send, the clip), with what the party will keep on disk already."""
        job, of = self.job, (orders.round_, orders.attempt)
        broadcast = tree_of(orders.model, job.broadcast_shapes, party=self._server)
        clip = float(broadcast["clip"]) if job.noise is not None else 0.0
        digest = hashlib.sha256(encode(orders_of_model(orders))).digest()
        prepared = self._prepared
        if prepared is not None and (prepared.run, prepared.of[0], prepared.model) == (
            orders.run,
            of[0],
            digest,
        ):
            prepared = msgspec.structs.replace(prepared, of=of)
        else:
            sums, kept = self._trained(broadcast, of[0])
            prepared = Prepared(orders.run, of, digest, tensors_of(kept), tensors_of(sums))
        write_record(self.folder / "prepared", prepared)
        self._prepared = prepared
        return tree_of(prepared.sums, job.update_shapes, party="this party"), clip

    def _trained(self, broadcast: Tree, round_: int) -> tuple[Tree, Tree]:
        job, work = self.job, self.job.work
        count = len(next(iter(self.rows.values())))
        release = job.release() if self._ledger is not None else None
        if self._ledger is not None and release is not None and not self._ledger.allows(release):
            raise _BudgetSpentError(
                f"the privacy budget of {self.channel.party} allows no round {round_ + 1}: "
                f"ε {self._ledger.spent():.4g} of {self._ledger.budget.epsilon:g} is spent"
            )
        order = order_of(
            count, batch=work.batch, epochs=work.epochs, seed=work.seed, round_=round_,
            client=job.parties.index(self.channel.party),
        )  # fmt: skip
        examples = Examples(dict(self.rows), order)
        sums, kept = client_update(job.task, job.algorithm, broadcast, self._kept, examples)
        if job.privacy.kind == "local":
            multiplier = job.algorithm.mechanism.noise_multiplier  # type: ignore[attr-defined]
            noisy, release = local_noise(sums["update"], job.privacy.clip, multiplier, Randomness())
            noisy = jax.tree.map(np.float32, noisy)
            sums = {"update": noisy, "within": 0.0, "weight": 1.0, "loss": 0.0}
            sums = jax.tree.map(np.float32, sums)
        if self._ledger is not None and release is not None:
            self._ledger.append(release, f"round {round_}")
        return sums, kept

    def _settle(self, committed: tuple[int, int] | None) -> None:
        """Takes over what was prepared if the aggregator has committed it."""
        prepared = self._prepared
        if prepared is not None and prepared.of == committed:
            record = Kept(prepared.run, committed, prepared.kept)
            write_record(self.folder / "kept", record)
            self._take(record)
        elif committed != self._record.of and jax.tree.leaves(self._kept):
            raise RunError(
                f"{self.folder} does not hold what {self.channel.party} kept after round "
                f"{committed[0] + 1 if committed else 0}, which the aggregator has committed; "
                "start this party with the run directory that it had"
            )

    def _require_run(self, run: str) -> None:
        known = self._record.run or run
        if known != run:
            raise RunError(
                f"{self.folder} is of another run of job {self.job.net.job!r} than the "
                "aggregator's; give this party another run directory, or the aggregator the one "
                "that it had"
            )
        if not self._record.run:
            record = Kept(run, None, self._record.kept)
            write_record(self.folder / "kept", record)
            self._take(record)

    def _restore(self) -> None:
        first = self.job.algorithm.client_init(self.job.first_params)
        fresh = Kept("", None, tensors_of(first))
        self._prepared = read_record(self.folder / "prepared", Prepared)
        self._take(read_record(self.folder / "kept", Kept) or fresh)

    def _take(self, record: Kept) -> None:
        like = jax.eval_shape(self.job.algorithm.client_init, self.job.first_params)
        where = f"{self.folder / 'kept'}, which is of another job"
        self._record = record
        self._kept = jax.tree.map(jnp.asarray, tree_of(record.kept, like, party=where))

    def _await(self) -> Message:
        """The next orders, saying hello until they come."""
        while True:
            orders = self._next(_SLICE_S)
            if isinstance(orders, Wait):
                self.say(f"{self._server}: {orders.reason}")
            elif orders is not None:
                return orders

    def _await_begin(self, of: tuple[int, int]) -> Begin | None:
        """The aggregator's word that all have trained; None if it does not come."""
        until = time.monotonic() + self.job.net.round_s * 1.5 + _MARGIN_S
        while time.monotonic() < until:
            orders = self._next(_SLICE_S)
            if isinstance(orders, Begin) and (orders.round_, orders.attempt) == of:
                return orders
            self._supersede(orders)
        return None

    def _check(self) -> None:
        self._supersede(self._next(_LOOK_S))

    def _supersede(self, orders: Message | None) -> None:
        if isinstance(orders, Train) and (orders.round_, orders.attempt) == self._answered:
            return
        if isinstance(orders, Train | Stop | Terms):
            raise SupersededError(orders)

    def _next(self, wait_s: float) -> Message | None:
        """The next orders that have come, if any; says hello when it is time to."""
        now = time.monotonic()
        if self._server_restarted():
            self.channel.accept_incarnation(self._server)
            self._said_hello = float("-inf")
        if now - self._said_hello >= self.hello_s:
            self._said_hello = now
            self._send(HELLO, Hello(self._incarnation, self.job.digest))
        orders = heard(self.channel, self._server, self._topic, Orders, wait_s)
        if orders is not None:
            self._heard = time.monotonic()
            return orders.body
        if time.monotonic() - self._heard > self.patience_s:
            raise PartyError(
                f"{self._server} has said nothing for {self.patience_s:g} s; see that it runs, and "
                "start this party again: it goes on where it was",
                party=self._server,
            )
        return None

    def _server_restarted(self) -> bool:
        channel = self.channel
        return isinstance(channel, Returning) and self._server in channel.restarted()

    def _send(self, topic: str, message: Message) -> None:
        self.channel.send(self._server, topic, message)

    @property
    def _server(self) -> str:
        return self.job.net.aggregator

    def _open_ledger(self, stack: ExitStack) -> Ledger | None:
        if self.job.privacy.kind not in ("local", "example"):
            return None
        path = self.folder / self.job.privacy.ledger
        return stack.enter_context(Ledger(path, budget_of(self.job.privacy)))


class _BudgetSpentError(Exception):
    """The party's ledger allows no more."""


@dataclass
class _Attentive:
    """A channel on which a wait ends when the aggregator wants something else."""

    channel: Channel
    check: Callable[[], None]

    @property
    def party(self) -> str:
        return self.channel.party

    @property
    def parties(self) -> tuple[str, ...]:
        return self.channel.parties

    @property
    def sent_bytes(self) -> int:
        return self.channel.sent_bytes

    def send(self, to: str, topic: str, message: Message) -> None:
        self.channel.send(to, topic, message)

    def receive(self, sender: str, topic: str, kind: type[M], timeout_s: float | None = None) -> M:
        assert timeout_s is not None
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0:
            message = heard(self.channel, sender, topic, kind, min(_SLICE_S, left))
            if message is not None:
                return message
            self.check()
        raise PartyError(f"{sender} sent nothing for {topic!r} in {timeout_s:g} s", party=sender)


def orders_of_model(orders: Train) -> Message:
    """The part of the orders that the update follows from, whichever attempt it is."""
    return Train(orders.run, orders.round_, 0, None, orders.model)
