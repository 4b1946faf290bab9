"""Runs rounds as the aggregator: broadcast, collect or aggregate securely, step, commit.

A round is committed by replacing one file, which names whose updates are in it; until then it has
not happened, and it is repeated as another attempt. Whatever is killed at whatever moment starts
again and goes on, and unless somebody was dropped from a round the final model is the same.

What the aggregator learns: who takes part and when, and every update, or with secure aggregation
the sum of at least `Job.fewest` of them (`secagg` says more). If it dies after it has unmasked a
sum and before it commits, and somebody drops out of the repetition, it has seen both sums.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np

from shardpar.errors import PartyError, RunError
from shardpar.fl.attendance import Attendance
from shardpar.fl.channel import Channel
from shardpar.fl.job import Job
from shardpar.fl.ledger import Ledger, epsilon_of
from shardpar.fl.messages import Message, Tensor
from shardpar.fl.private_rounds import begin_distributed, budget_of, released_sum
from shardpar.fl.round_messages import (
    STOPPED,
    Begin,
    Failed,
    FromParty,
    Sent,
    Stop,
    Train,
    Trained,
    Update,
    Wait,
    round_topic,
)
from shardpar.fl.rounds import gathered, server_update
from shardpar.fl.secagg import run_server
from shardpar.fl.secagg_session import Roster
from shardpar.fl.stored import read_record, tensors_of, tree_of, write_record
from shardpar.fl.streams import Randomness
from shardpar.run.lock import RunLock

Tree = Any
Row = dict[str, Any]

_LOOK_S = 0.05
_TOLD_S = 1.0
_REPORT_S = 2.0
_CLOSING_S = 10.0
_LINGER_S = 3.0


class Committed(msgspec.Struct, frozen=True):
    """What the aggregator has on disk.

    Attributes:
      run: a random name, so that parties notice a run begun anew.
      round_: how many rounds are committed.
      state: the server's.
      included: for each party the last (round, attempt) with it in the sum.
      survivors: of the last round; empty before the first.
      row: what the last round measured.
    """

    run: str
    round_: int
    state: dict[str, Tensor]
    included: dict[str, tuple[int, int]]
    survivors: tuple[str, ...] = ()
    row: dict[str, float | int | str | None] = {}


class Begun(msgspec.Struct, frozen=True):
    """The attempt that was begun last; its number is never used again."""

    round_: int
    attempt: int


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
      rounds: that were committed.
      state: the server's.
      stopped: why it ended before its time; "" if it did not.
    """

    rounds: int
    state: Tree
    stopped: str


@dataclass
class Coordinator:
    """The aggregator of one job.

    Attributes:
      channel: to all parties.
      job: what it is about.
      folder: where it keeps its state and its ledger; another start goes on from there.
      roster: long-term public keys of the parties; needed with secure aggregation.
      evaluate: measures a server's state, for a round's row.
      report: takes each round's row once the round is committed.
      say: takes one line for people.
    """

    channel: Channel
    job: Job
    folder: Path
    roster: Roster = field(default_factory=dict)
    evaluate: Callable[[Tree, int], Mapping[str, float]] = lambda *_: {}
    report: Callable[[int, Row], None] = lambda *_: None
    say: Callable[[str], None] = lambda *_: None

    def run(self) -> Outcome:
        """Runs the rounds that are left, or until the privacy budget is spent.

        Raises:
          RunError: too few parties for longer than the config allows.
          CheckpointError: what is in the folder is damaged, or of another job.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(RunLock(self.folder / ".lock"))
            self._ledger = self._open_ledger(stack)
            self._attendance = Attendance(self.channel, self.job, self.say)
            self._committed, self._state = self._restored()
            self._reported_bytes = self.channel.sent_bytes
            if self._committed.round_:
                self.report(self._committed.round_, dict(self._committed.row))
            stopped, joining = "", True
            while not stopped and self._committed.round_ < self.job.federated.rounds:
                stopped = self._cannot_afford() or self._round(joining)
                joining = False
            self._close(stopped)
        return Outcome(self._committed.round_, self._state, stopped)

    def _round(self, joining: bool) -> str:
        """Runs a round until it is committed; says why there can be none, if there cannot."""
        round_, began = self._committed.round_, time.monotonic()
        asked = self.job.clients_of(round_)
        while True:
            if not self._assemble(asked, joining):
                return "; ".join(self._attendance.spent.values())
            attempt = self._begin(round_)
            try:
                self._attempt(round_, attempt, asked, began)
                return ""
            except PartyError as error:
                failed: RunError = error
            except RunError as error:
                stopped = self._cannot_afford()
                if stopped:
                    return stopped
                failed = error
            self.say(f"round {round_ + 1} is begun again: {failed}")
            joining = False
            if time.monotonic() - began > self.job.net.wait_s:
                raise failed

    def _assemble(self, asked: tuple[str, ...], joining: bool) -> bool:
        """Waits until enough of the asked are there; False if budgets keep too many away."""
        net, attendance = self.job.net, self._attendance
        # After a restart those who were lost before it are not waited for.
        awaited = [p for p in asked if p in (self._committed.survivors or asked)]
        fewest = self.job.required_of(len(asked))
        until = time.monotonic() + (net.join_s if joining else net.wait_s)
        told = 0.0
        while True:
            attendance.look()
            missing = attendance.missing(asked)
            enough = len(asked) - len(missing) >= fewest
            patient = joining and bool(attendance.missing(awaited))
            if enough and (net.lost == "wait" or not patient):
                return True
            if len(asked) - len(set(missing) & set(attendance.spent)) < fewest:
                return False
            if time.monotonic() > until:
                if enough:
                    return True
                raise RunError(
                    f"{', '.join(missing)} of {len(asked)} parties are not there, and it takes "
                    f"{fewest}; start them with `shardpar fl join`, then this command again: it "
                    "goes on where it was"
                )
            if time.monotonic() - told > _TOLD_S:
                told = time.monotonic()
                there = [party for party in self.job.parties if party in attendance]
                wait = Wait(f"waiting for {', '.join(missing)}"[:4096])
                attendance.tell(there, dict.fromkeys(there, wait).__getitem__)
            time.sleep(_LOOK_S)

    def _attempt(self, round_: int, attempt: int, asked: tuple[str, ...], began: float) -> None:
        job, attendance = self.job, self._attendance
        broadcast = job.algorithm.broadcast(self._state)
        model = tensors_of(broadcast)
        included = self._committed.included

        def train(party: str) -> Message:
            return Train(self._committed.run, round_, attempt, included.get(party), model)

        dropped = dict.fromkeys(attendance.missing(asked), "it was not there")
        cohort = [party for party in asked if party not in dropped]
        dropped |= attendance.tell(cohort, train)
        answers, silent = self._collect(
            [p for p in cohort if p not in dropped], round_, attempt, train
        )
        dropped |= silent
        there = tuple(party for party in asked if party in answers)
        least = job.required_of(len(asked))
        if len(there) < least:
            raise RunError(f"{len(there)} parties trained, it takes {least}: {_words(dropped)}")
        if job.secagg.enabled:
            total, there, late = self._secure_sum(round_, attempt, there, broadcast)
            attendance.drop(late)
            dropped |= late
        else:
            total = self._plain_sum([answers[party] for party in there])
        total = self._with_central_noise(total, round_)
        state = server_update(job.algorithm, self._state, total, np.int32(len(there)))
        state = jax.tree.map(np.asarray, state)
        row = {
            "round": round_ + 1,
            **self._loss(total),
            **self.evaluate(state, round_ + 1),
            "sent_bytes": self._sent_bytes(there, round_, attempt),
            "epsilon": self._epsilon(round_ + 1),
            "survivors": len(there),
            "dropped": ",".join(sorted(dropped)),
            "attempts": attempt + 1,
            "round_s": time.monotonic() - began,
        }
        self._commit(round_, attempt, state, there, row)
        if dropped:
            self.say(f"round {round_ + 1} was without {_words(dropped)}")
        attendance.forget("round/", f"secagg/{job.net.job}/")

    def _collect(
        self, cohort: list[str], round_: int, attempt: int, train: Callable[[str], Message]
    ) -> tuple[dict[str, Tree], dict[str, str]]:
        """The answers of a cohort: (whose what; who did not answer, and why)."""
        topic = round_topic(round_, attempt, "update")
        until = time.monotonic() + self.job.net.round_s
        waiting, answers, lost = list(cohort), {}, {}
        while waiting and time.monotonic() < until:
            for party in tuple(waiting):
                try:
                    body = self._attendance.heard(party, topic, FromParty, _LOOK_S)
                    if body is None:
                        continue
                    answers[party] = self._answer(party, body.body)
                except PartyError as error:
                    lost[party] = f"{error}"
                waiting.remove(party)
            # A party that died and was started again is asked again, in the same attempt; if it was
            # about to take part in a secure aggregation, it no longer knows of it.
            again = [
                party
                for party in self._attendance.look()
                if party in waiting or (party in answers and self.job.secagg.enabled)
            ]
            waiting += [party for party in again if answers.pop(party, None) is not None]
            lost |= self._attendance.tell(again, train)
            waiting = [party for party in waiting if party not in lost]
        silent = f"it sent nothing within {self.job.net.round_s:g} s"
        lost |= dict.fromkeys(waiting, silent)
        self._attendance.drop(lost)
        return answers, lost

    def _answer(self, party: str, body: Trained | Update | Failed) -> Tree:
        """What a party answered: its update, or () if that comes under masks."""
        if isinstance(body, Failed):
            if body.spent:
                self._attendance.spent[party] = f"{party}: {body.reason}"
            raise PartyError(body.reason, party=party)
        if self.job.secagg.enabled != isinstance(body, Trained):
            raise PartyError(f"{party} sent {type(body).__name__}", party=party)
        if isinstance(body, Trained):
            return ()
        update = tree_of(body.sums, self.job.update_shapes, party=party)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(update)):
            raise PartyError(
                f"the update of {party} is not finite; lower federated.learning_rate", party=party
            )
        return update

    def _plain_sum(self, updates: list[Tree]) -> Tree:
        if updates:
            return gathered(self.job.algorithm, updates)[0]
        shapes = self.job.update_shapes
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def _secure_sum(
        self, round_: int, attempt: int, there: tuple[str, ...], broadcast: Tree
    ) -> tuple[Tree, tuple[str, ...], dict[str, str]]:
        job = self.job
        session = job.session(round_, attempt, there)
        lost = self._attendance.tell(there, lambda _: Begin(round_, attempt, session.cohort))

        def write_down() -> None:
            if job.noise is not None:
                assert self._ledger is not None
                begin_distributed(self._ledger, job.noise, f"round {round_}.{attempt}")

        try:
            aggregate = run_server(
                self.channel, session, self.roster, job.secagg.deadline_s, write_down
            )
        except RunError:
            self._attendance.drop(dict.fromkeys(lost, ""))
            raise
        total = job.unmasked(aggregate.total, job.clip_of(broadcast))
        survivors = tuple(party for party in there if party in aggregate.survivors)
        return total, survivors, {**lost, **aggregate.dropped}

    def _with_central_noise(self, total: Tree, round_: int) -> Tree:
        if self.job.privacy.kind != "central":
            return total
        assert self._ledger is not None
        return released_sum(
            self._ledger,
            self.job.algorithm.mechanism,  # type: ignore[attr-defined]
            total,
            clip=float(self._state["privacy"]["clip"]),
            sampling_rate=self.job.privacy.sampling_rate,
            random=Randomness(),
            what=f"round {round_}",
        )

    def _commit(
        self, round_: int, attempt: int, state: Tree, there: tuple[str, ...], row: Row
    ) -> None:
        included = {**self._committed.included, **dict.fromkeys(there, (round_, attempt))}
        committed = Committed(
            self._committed.run, round_ + 1, tensors_of(state), included, there, row
        )
        write_record(self.folder / "committed", committed)
        self._committed, self._state = committed, state
        self.report(round_ + 1, dict(row))

    def _begin(self, round_: int) -> int:
        """The number of the next attempt, which is on disk before anyone hears of it."""
        last = read_record(self.folder / "begun", Begun)
        attempt = last.attempt + 1 if last is not None and last.round_ == round_ else 0
        write_record(self.folder / "begun", Begun(round_, attempt))
        return attempt

    def _restored(self) -> tuple[Committed, Tree]:
        committed = read_record(self.folder / "committed", Committed)
        if committed is None:
            state = jax.tree.map(
                np.asarray, jax.jit(self.job.algorithm.server_init)(self.job.first_params)
            )
            committed = Committed(secrets.token_hex(16), 0, tensors_of(state), {})
            write_record(self.folder / "committed", committed)
            return committed, state
        where = f"{self.folder / 'committed'}, which holds another job"
        return committed, tree_of(committed.state, self.job.state_shapes, party=where)

    def _close(self, stopped: str) -> None:
        """Tells all parties that it is over, and waits a little for those that come back."""
        committed, attendance = self._committed, self._attendance
        reason = stopped or f"all {committed.round_} rounds are done"

        params = tensors_of(self._state["params"])

        def stop(party: str) -> Message:
            included = committed.included.get(party)
            return Stop(committed.run, included, committed.round_, reason[:4096], params)

        there = {party for party in self.job.parties if party in attendance}
        owed = (there | set(committed.survivors)) - set(attendance.spent)
        told: set[str] = set()
        began = time.monotonic()
        until = began + min(_CLOSING_S, self.job.net.join_s)
        # Whoever was dropped from the last round may be alive and about to say so.
        linger = began + (
            min(_LINGER_S, self.job.net.join_s) if committed.row.get("dropped") else 0
        )
        while (now := time.monotonic()) < until and (owed or now < linger):
            came = attendance.look()
            told -= set(came)
            owed |= set(came)
            asked = [p for p in self.job.parties if p in owed and p in attendance and p not in told]
            told |= set(asked) - set(attendance.tell(asked, stop))
            for party in sorted(owed):
                try:
                    if attendance.heard(party, STOPPED, Sent, _LOOK_S) is not None:
                        owed.discard(party)
                except PartyError:
                    continue

    def _open_ledger(self, stack: ExitStack) -> Ledger | None:
        if self.job.privacy.kind not in ("central", "distributed"):
            return None
        path = self.folder / self.job.privacy.ledger
        return stack.enter_context(Ledger(path, budget_of(self.job.privacy)))

    def _affordable(self) -> bool:
        release = self.job.release()
        return self._ledger is None or release is None or self._ledger.allows(release)

    def _cannot_afford(self) -> str:
        if self._affordable():
            return ""
        assert self._ledger is not None
        budget = self._ledger.budget
        return (
            f"the privacy budget allows no further round: ε {self._ledger.spent():.4g} of "
            f"{budget.epsilon:g} at δ {budget.delta:g} is spent after {self._committed.round_} "
            f"of {self.job.federated.rounds} rounds; the model is as the last of them left it"
        )

    def _epsilon(self, rounds: int) -> float | None:
        if self._ledger is not None:
            return self._ledger.spent()
        release = self.job.release()
        if release is None:
            return None
        # Parties keep their own ledgers; this is what those of all rounds hold.
        return epsilon_of([release] * rounds, self.job.privacy.delta)

    def _loss(self, total: Tree) -> dict[str, float]:
        if self.job.privacy.kind != "none":
            return {}
        loss, weight = (np.sum(np.asarray(total[key], np.float64)) for key in ("loss", "weight"))
        return {"loss": float(loss / weight)} if weight > 0 else {}

    def _sent_bytes(self, there: tuple[str, ...], round_: int, attempt: int) -> int:
        """What everyone has sent since the last round, as each says of itself."""
        topic, until = round_topic(round_, attempt, "sent"), time.monotonic() + _REPORT_S
        total = self.channel.sent_bytes - self._reported_bytes
        self._reported_bytes = self.channel.sent_bytes
        for party in there:
            wait_s = max(until - time.monotonic(), 1e-3)
            try:
                total += self.channel.receive(party, topic, Sent, wait_s).sent_bytes
            except PartyError:
                continue
        return total


def _words(dropped: Mapping[str, str]) -> str:
    return "; ".join(f"{party} ({why})"[:300] for party, why in sorted(dropped.items())[:5])
