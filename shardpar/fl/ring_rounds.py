"""Runs rounds without an aggregator: parties agree on who is there, sum in a ring, and step alike.

Whoever has the sum of a round has committed it: others who lack it take the state over from one who
has, at the next roll call, and so nobody adds up fewer vectors again while one who has the full sum
is there. If all who have it are gone, the rest repeat the round without them; they are taken along
when they come back, whatever they had committed by themselves.

Revealed to every party: who takes part and when, and the sum of each round (`ring` says what that
hides); with distributed noise, the noisy sum. If everyone who has a sum dies before it is passed
on, and comes back, they have seen two sums that differ by those who were gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import msgspec
import numpy as np

from shardpar.errors import PartyError
from shardpar.fl.attentive import Attentive, Returning
from shardpar.fl.channel import Channel
from shardpar.fl.job import Job
from shardpar.fl.messages import Tensor
from shardpar.fl.private_rounds import begin_distributed
from shardpar.fl.ring import ring_sum
from shardpar.fl.ring_messages import View, Whole
from shardpar.fl.roll_call import NewerError, RollCall
from shardpar.fl.rounds import server_update
from shardpar.fl.secagg_session import Identity, Roster
from shardpar.fl.stored import read_record, tensors_of, tree_of, write_record
from shardpar.fl.trainer import BudgetSpentError, Trainer, model_digest

Tree = Any
Row = dict[str, Any]
At = tuple[int, int]

_CLOSING_S = 10.0


class Agreed(msgspec.Struct, frozen=True):
    """What a party of a ring has on disk.

    Attributes:
      rounds: that are committed.
      of: the (round, epoch) of the last of them.
      included: for each party the last (round, epoch) with it in the sum.
      state: of the server.
    """

    rounds: int
    of: At | None
    included: dict[str, At]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class RingOutcome:
    """How a job ended for a party.

    Attributes:
      rounds: that were committed.
      state: the server's, the same at all.
      stopped: why it ended before its time; "" if it did not.
    """

    rounds: int
    state: Tree
    stopped: str


@dataclass
class RingParty:
    """One party of a job without an aggregator.

    Attributes:
      channel: to all other parties.
      job: what it is about.
      rows: its examples, by field, each [examples, ...].
      folder: where it keeps its state and its ledger; another start goes on from there.
      identity: its long-term key.
      roster: long-term public keys of all parties.
      evaluate: measures a server's state, for a round's row.
      report: takes each round's row once the round is committed.
      say: takes one line for people.
    """

    channel: Channel
    job: Job
    rows: Mapping[str, np.ndarray]
    folder: Path
    identity: Identity
    roster: Roster
    evaluate: Callable[[Tree, int], Mapping[str, float]] = lambda *_: {}
    report: Callable[[int, Row], None] = lambda *_: None
    say: Callable[[str], None] = lambda *_: None

    def run(self) -> RingOutcome:
        """Takes part until all rounds are done or the privacy budget is spent.

        Raises:
          ConfigError: another party has other terms; names the keys.
          RunError: too few parties for longer than the config allows, or a round failed here.
          CheckpointError: what is in the folder is damaged.
        """
        net = self.job.net
        with Trainer(self.job, self.channel.party, self.rows, self.folder) as self._trainer:
            self._restore()
            self._calls = RollCall(self.channel, self.job, self.folder, self._stand, self.say)
            self._calls.expected = self._members_before()
            self._reported_bytes = self.channel.sent_bytes
            wait_s, stopped = net.join_s, ""
            until = time.monotonic() + max(net.join_s, net.wait_s)
            while not stopped:
                over = self._agreed.rounds >= self.job.federated.rounds
                try:
                    wait_s = min(wait_s, _CLOSING_S) if over else wait_s
                    members = self._calls.members(wait_s, until=until, alone=over)
                    wait_s = net.round_s
                    self._catch_up(members)
                    if self._agreed.rounds < self.job.federated.rounds:
                        stopped = self._round(members)
                        until = time.monotonic() + net.wait_s
                        self._calls.begin(self._calls.epoch + 1)
                    elif self._part(members):
                        break
                except NewerError:
                    self._calls.begin(self._calls.epoch)
                except PartyError as error:
                    self.say(f"attempt {self._calls.epoch} is given up: {error}")
                    self._calls.begin(self._calls.epoch + 1)
        return RingOutcome(self._agreed.rounds, self._state, stopped)

    def _stand(self) -> tuple[int, At | None, bytes]:
        return self._agreed.rounds, self._agreed.of, self._digest

    def _members_before(self) -> set[str]:
        """Who was in the last round, or everyone before the first."""
        included, last = self._agreed.included, self._agreed.of
        return {
            party
            for party in self.job.parties
            if party != self.channel.party and (last is None or included.get(party) == last)
        }

    def _part(self, members: tuple[str, ...]) -> bool:
        """Waits a little until all members have all rounds; False if others go on meanwhile."""
        topic = f"done/{self._calls.epoch}"
        others = [other for other in members if other != self.channel.party]
        for other in others:
            self._calls.send(other, topic, View(members))
        try:
            for other in others:
                self._calls.receive(other, topic, View, _CLOSING_S)
        except PartyError as error:
            self.say(f"{error}")
        return True

    def _catch_up(self, members: tuple[str, ...]) -> None:
        """Brings all members to the state of the one that is furthest."""
        me, calls, agreed, mine = self.channel.party, self._calls, self._agreed, self._stand()
        known = {**calls.stands, me: mine}
        # Of equals the first leads; a fork ends with the later epoch.
        leader = max(members, key=lambda p: (known[p][0], known[p][1] or (-1, -1)))
        topic = f"whole/{calls.epoch}"
        if me == leader:
            whole = Whole(agreed.rounds, agreed.of, agreed.included, agreed.state)
            for other in members:
                if known[other] != mine:
                    calls.send(other, topic, whole)
        elif known[leader] != mine:
            whole = calls.receive(leader, topic, Whole, self.job.net.round_s)
            state = tree_of(whole.state, self.job.state_shapes, party=leader)
            self._commit(Agreed(whole.rounds, whole.of, whole.included, whole.state), state)
            self.say(f"took over {whole.rounds} rounds from {leader}")

    def _round(self, members: tuple[str, ...]) -> str:
        """Runs one attempt at the next round; says why there can be none, if there cannot."""
        job, began = self.job, time.monotonic()
        round_, of = self._agreed.rounds, (self._agreed.rounds, self._calls.epoch)
        ledger = self._trainer.ledger
        if job.noise is not None and ledger is not None and not ledger.allows(job.noise.release()):
            return (
                f"the privacy budget allows no further round: ε {ledger.spent():.4g} of "
                f"{ledger.budget.epsilon:g} is spent after {round_} rounds"
            )
        broadcast = job.algorithm.broadcast(self._state)
        try:
            update = self._trainer.update("", of, tensors_of(broadcast), broadcast)
        except BudgetSpentError as error:
            return f"{error}"
        self._calls.check()
        session = job.session(round_, self._calls.epoch, tuple(sorted(members)))
        clip = job.clip_of(broadcast)
        vector = job.masked_words(update, clip)
        if job.noise is not None:
            assert ledger is not None
            begin_distributed(ledger, job.noise, f"round {round_}.{self._calls.epoch}")
        attentive = cast(Channel, Attentive(self.channel, self._calls.check))
        words = ring_sum(attentive, self.identity, session, self.roster, vector, job.net.round_s)
        total = job.unmasked(words, clip)
        state = server_update(job.algorithm, self._state, total, np.int32(len(members)))
        state = jax.tree.map(np.asarray, state)
        included = {**self._agreed.included, **dict.fromkeys(members, of)}
        self._commit(Agreed(round_ + 1, of, included, tensors_of(state)), state)
        sent = self.channel.sent_bytes - self._reported_bytes
        self._reported_bytes += sent
        row: Row = {"round": round_ + 1}
        if job.privacy.kind == "none" and total["weight"] > 0:
            row["loss"] = float(total["loss"] / total["weight"])
        row |= {
            **self.evaluate(state, round_ + 1),
            "sent_bytes": sent,
            "epsilon": None if ledger is None else ledger.spent(),
            "survivors": len(members),
            "dropped": ",".join(p for p in job.parties if p not in members),
            "epoch": self._calls.epoch,
            "round_s": time.monotonic() - began,
        }
        self.report(round_ + 1, row)
        if isinstance(self.channel, Returning):
            for other in self._calls.others:
                self.channel.discard(other, f"ring/{job.net.job}/")
        return ""

    def _commit(self, agreed: Agreed, state: Tree) -> None:
        write_record(self.folder / "agreed", agreed)
        self._agreed, self._state = agreed, state
        self._digest = model_digest(agreed.state)
        self._trainer.settle(agreed.included.get(self.channel.party))

    def _restore(self) -> None:
        agreed = read_record(self.folder / "agreed", Agreed)
        if agreed is None:
            first = jax.jit(self.job.algorithm.server_init)(self.job.first_params)
            state = jax.tree.map(np.asarray, first)
            agreed = Agreed(0, None, {}, tensors_of(state))
        else:
            where = f"{self.folder / 'agreed'}, which holds another job"
            state = tree_of(agreed.state, self.job.state_shapes, party=where)
        self._commit(agreed, state)
