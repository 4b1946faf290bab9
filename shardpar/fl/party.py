"""Takes part in coordinated rounds as a party: does what the aggregator asks, until it is over.

The aggregator may die and come back, and so may this party; orders are numbered by round and
attempt, and newer ones end whatever the older had begun. `trainer` keeps the party's own state.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from shardpar.errors import PartyError, RunError, ShardparError
from shardpar.fl.agreement import require_agreement
from shardpar.fl.attentive import LOOK_S, SLICE_S, Attentive, Returning, has_restarted, heard
from shardpar.fl.channel import Channel
from shardpar.fl.job import Job
from shardpar.fl.messages import Message
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
from shardpar.fl.secagg import run_client
from shardpar.fl.secagg_session import Identity, Roster
from shardpar.fl.stored import tensors_of, tree_of
from shardpar.fl.task import Params
from shardpar.fl.trainer import BudgetSpentError, Trainer

Tree = Any

# The aggregator may take as long as its own deadline, and its answer a little longer still.
_MARGIN_S = 10.0


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
        with Trainer(self.job, self.channel.party, self.rows, self.folder) as self._trainer:
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
                self._trainer.require_run(orders.run)
                self._trainer.settle(orders.committed)
                shapes = self.job.state_shapes["params"]
                params = tree_of(orders.params, shapes, party=self._server)
                self._send(STOPPED, Sent(0))
                return Ended(orders.rounds, orders.reason, params)
            case Train():
                return self._train(orders)
        return None

    def _train(self, orders: Train) -> Ended | None:
        of = (orders.round_, orders.attempt)
        if self._answered == of:
            # It was sent twice, because the connection broke in between.
            return None
        self._answered = of
        topic = round_topic(*of, "update")
        try:
            update, vector = self._update(orders)
        except BudgetSpentError as error:
            self._send(topic, FromParty(Failed(f"{error}"[:4096], spent=True)))
            return Ended(orders.round_, f"{error}")
        except Exception as error:
            # What else an error says may be about this party's data.
            words = f"{error}" if isinstance(error, ShardparError) else "its log says more"
            self._send(topic, FromParty(Failed(f"{type(error).__name__}: {words}"[:4096])))
            raise
        if vector is None:
            self._send(topic, FromParty(Update(tensors_of(update))))
        else:
            self._send(topic, FromParty(Trained()))
            try:
                self._aggregate(of, vector)
            except PartyError as error:
                self.say(f"left the secure aggregation of round {of[0] + 1}: {error}")
                return None
        sent = self.channel.sent_bytes - self._reported_bytes
        self._send(round_topic(*of, "sent"), Sent(sent))
        self._reported_bytes += sent
        return None

    def _update(self, orders: Train) -> tuple[Tree, np.ndarray | None]:
        """(the update, the vector to be masked or None)."""
        job, of = self.job, (orders.round_, orders.attempt)
        self._trainer.require_run(orders.run)
        self._trainer.settle(orders.committed)
        broadcast = tree_of(orders.model, job.broadcast_shapes, party=self._server)
        update = self._trainer.update(orders.run, of, orders.model, broadcast)
        if not job.secagg.enabled:
            return update, None
        return update, job.masked_words(update, job.clip_of(broadcast))

    def _aggregate(self, of: tuple[int, int], vector: np.ndarray) -> None:
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
        channel = cast(Channel, Attentive(self.channel, self._check))
        wait_s = job.secagg.deadline_s * 1.5 + _MARGIN_S
        run_client(channel, server, self.identity, session, self.roster, vector, wait_s)

    def _await(self) -> Message:
        """The next orders, saying hello until they come."""
        while True:
            orders = self._next(SLICE_S)
            if isinstance(orders, Wait):
                self.say(f"{self._server}: {orders.reason}")
            elif orders is not None:
                return orders

    def _await_begin(self, of: tuple[int, int]) -> Begin | None:
        """The aggregator's word that all have trained; None if it does not come."""
        until = time.monotonic() + self.job.net.round_s * 1.5 + _MARGIN_S
        while time.monotonic() < until:
            orders = self._next(SLICE_S)
            if isinstance(orders, Begin) and (orders.round_, orders.attempt) == of:
                return orders
            self._supersede(orders)
        return None

    def _check(self) -> None:
        self._supersede(self._next(LOOK_S))

    def _supersede(self, orders: Message | None) -> None:
        if isinstance(orders, Train) and (orders.round_, orders.attempt) == self._answered:
            return
        if isinstance(orders, Train | Stop | Terms):
            raise SupersededError(orders)

    def _next(self, wait_s: float) -> Message | None:
        """The next orders that have come, if any; says hello when it is time to."""
        now = time.monotonic()
        if isinstance(self.channel, Returning) and self._server_restarted():
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
        return has_restarted(self.channel, self._server)

    def _send(self, topic: str, message: Message) -> None:
        self.channel.send(self._server, topic, message)

    @property
    def _server(self) -> str:
        return self.job.net.aggregator
