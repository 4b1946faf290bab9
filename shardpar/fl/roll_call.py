"""Decides, without anyone in charge, who takes part in an attempt: all who take part must agree.

Attempts are numbered by an epoch over the whole job. Everyone goes on to the largest epoch that it
hears of, so whoever gives up takes the others along. Members of an epoch are those who have said
that they are there; each tells all others whom it sees, and unless all see the same they try again
in the next epoch. Members must be more than half of all parties, so that no two groups go on by
themselves.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shardpar.errors import PartyError, RunError
from shardpar.fl.agreement import require_agreement
from shardpar.fl.attentive import (
    LOOK_S,
    SLICE_S,
    Attentive,
    Returning,
    has_restarted,
    heard,
    is_connected,
)
from shardpar.fl.channel import Channel
from shardpar.fl.job import Job
from shardpar.fl.messages import M, Message
from shardpar.fl.ring_messages import HERE, Here, RingTerms, View
from shardpar.fl.stored import read_record, write_record

Stand = tuple[int, tuple[int, int] | None, bytes]

_HERE_S = 1.0
_TERMS = "terms"
_TERMS_S = 5.0
# How long the others may have a sum while this party still waits for its last part.
_BEHIND_S = 2.0


class Epoch(msgspec.Struct, frozen=True):
    """The epoch that was begun last; its number is never used again."""

    number: int


class NewerError(Exception):
    """Others have gone on to a later epoch."""


@dataclass
class RollCall:
    """Who is there, as one party sees it.

    Attributes:
      channel: to all other parties.
      job: what it is about.
      folder: where the epoch is kept.
      stand: (rounds committed, the last of them, digest of the state) of this party, now.
      say: takes one line for people.
      expected: the others who are waited for.
      epoch: of the attempt that this party is at.
      heard: what each of the others said last.
      stands: how far each member of the epoch is, of those that `members` found.
    """

    channel: Channel
    job: Job
    folder: Path
    stand: Callable[[], Stand]
    say: Callable[[str], None]
    expected: set[str] = field(default_factory=set)
    epoch: int = 0
    heard: dict[str, Here] = field(default_factory=dict)
    stands: dict[str, Stand] = field(default_factory=dict)
    _behind_since: float | None = None
    _least: int = 0
    _told: dict[str, float] = field(default_factory=dict)
    _incarnation: str = field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self) -> None:
        """Begins an epoch that no process of this party has begun before."""
        last = read_record(self.folder / "epoch", Epoch)
        self.begin(0 if last is None else last.number + 1)

    @property
    def others(self) -> tuple[str, ...]:
        """All parties but this one."""
        return tuple(p for p in self.job.parties if p != self.channel.party)

    def begin(self, epoch: int) -> None:
        """Goes on to an epoch, or a later one that others are at; it is on disk first."""
        self.epoch = max(epoch, self._newest)
        self._behind_since = None
        write_record(self.folder / "epoch", Epoch(self.epoch))

    def members(self, wait_s: float, *, until: float, alone: bool = False) -> tuple[str, ...]:
        """Agrees with the others on the members of an epoch, this or a later one.

        Args:
          wait_s: how long to wait for those expected.
          until: the time on the monotonic clock at which too few are an error.
          alone: too few are no error, but what this returns.

        Raises:
          NewerError: others have gone on meanwhile.
          PartyError: another sees other members, or does not say; begin the next epoch.
          RunError: too few for too long.
          ConfigError: another party has other terms.
        """
        net, party = self.job.net, self.channel.party
        began = told = time.monotonic()
        self._tell()
        while True:
            self.listen()
            if self._newest > self.epoch:
                self.begin(self.epoch)
                self._tell()
            now = time.monotonic()
            if now - told > _HERE_S:
                told = now
                self._tell()
            there = {p for p, here in self.heard.items() if here.epoch == self.epoch}
            late = now - began > wait_s
            if net.lost == "drop" or alone:
                away = {p for p in self.expected if not is_connected(self.channel, p)}
                self.expected &= (
                    there
                    if late
                    else there
                    | (self.expected - away)
                    | _unless(away, now - began <= net.patience_s)
                )
            enough = len(there) + 1 >= self.job.required
            if self.expected <= there and (enough or (alone and late)):
                break
            if now > until and not alone:
                missing = ", ".join(sorted(set(self.others) - there))
                raise RunError(
                    f"{missing} of {len(self.job.parties)} parties are not there, and it takes "
                    f"{self.job.required}; start them with `shardpar fl join`, then this command "
                    "again: it goes on where it was"
                )
            time.sleep(SLICE_S / 10)
        members = tuple(p for p in self.job.parties if p in there or p == party)
        self.stands = {p: (h.rounds, h.of, h.model) for p, h in self.heard.items() if p in there}
        self._compare(members)
        self.expected = set(members) - {party}
        return members

    def listen(self) -> None:
        """Takes what others say of themselves."""
        for other in self.others:
            if isinstance(self.channel, Returning) and has_restarted(self.channel, other):
                self.channel.accept_incarnation(other)
                self._forget(other)
                self._tell(other)
            try:
                while (here := heard(self.channel, other, HERE, Here, LOOK_S)) is not None:
                    self._take(other, here)
            except PartyError:
                self.heard.pop(other, None)

    def check(self) -> None:
        """Ends a wait of this epoch when the others have gone on without having its outcome.

        Those who have committed what this party still waits for go on, too; it need not give up for
        that, unless what it waits for does not come.

        Raises:
          NewerError: they have.
        """
        self.listen()
        newer = [here for here in self.heard.values() if here.epoch > self.epoch]
        if self._least > self.epoch:
            raise NewerError
        if not newer:
            return
        rounds = self.stand()[0]
        now = time.monotonic()
        self._behind_since = self._behind_since or now
        if any(here.rounds <= rounds for here in newer) or now - self._behind_since > _BEHIND_S:
            raise NewerError

    def send(self, to: str, topic: str, message: Message) -> None:
        """Sends to another; one that cannot be reached will be missed later."""
        try:
            self.channel.send(to, topic, message)
        except PartyError:
            self.heard.pop(to, None)

    def receive(self, sender: str, topic: str, kind: type[M], wait_s: float) -> M:
        """The next message of a topic.

        Raises:
          NewerError: others have gone on meanwhile.
          PartyError: nothing came in time, or nothing can come any more.
        """
        return Attentive(self.channel, self.check).receive(sender, topic, kind, wait_s)

    def _compare(self, members: tuple[str, ...]) -> None:
        topic = f"view/{self.epoch}"
        others = [other for other in members if other != self.channel.party]
        for other in others:
            self.send(other, topic, View(members))
        for other in others:
            theirs = self.receive(other, topic, View, self.job.net.round_s).members
            if theirs != members:
                self.expected = set(self.others) & {*members, *theirs}
                raise PartyError(
                    f"{other} sees {', '.join(theirs)} where {self.channel.party} sees "
                    f"{', '.join(members)}",
                    party=other,
                )

    def _take(self, other: str, here: Here) -> None:
        if here.terms != self.job.digest:
            terms = RingTerms(dict(self.job.terms))
            if self.stand()[0]:
                # Whoever has begun goes on with those who began with it.
                self.send(other, _TERMS, terms)
                self.say(f"{other} has other terms than the parties that have begun")
                return
            # This party is about to end; the others should know why.
            for each in self.others:
                self.send(each, _TERMS, terms)
            theirs = self.channel.receive(other, _TERMS, RingTerms, _TERMS_S)
            require_agreement(self.job.terms, theirs.terms, party=other)
        before = self.heard.get(other)
        if before is not None and before.incarnation != here.incarnation:
            self._forget(other)
        elif before == here and time.monotonic() - self._told.get(other, 0.0) > _HERE_S / 2:
            # It would not say so again if it had heard from this party.
            self._tell(other)
        self.heard[other] = here
        self.expected.add(other)

    def _forget(self, other: str) -> None:
        """Another process of a party knows nothing of what was said in this epoch."""
        if self.heard.pop(other, None) is not None:
            self._least = self.epoch + 1

    @property
    def _newest(self) -> int:
        return max([self._least, *(here.epoch for here in self.heard.values())])

    def _tell(self, only: str | None = None) -> None:
        here = Here(self._incarnation, self.job.digest, self.epoch, *self.stand())
        for other in self.others if only is None else (only,):
            self._told[other] = time.monotonic()
            self.send(other, HERE, here)


def _unless(parties: set[str], kept: bool) -> set[str]:
    return parties if kept else set()
