"""Decides who of a federation is there, by what each has said of itself and how it has answered.

A party is there from its first hello until it fails to answer; then it must say hello again, as it
does when it starts anew. Nobody whose terms differ is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from shardpar.errors import PartyError
from shardpar.fl.attentive import LOOK_S, Returning, heard
from shardpar.fl.channel import Channel
from shardpar.fl.job import Job
from shardpar.fl.messages import M, Message
from shardpar.fl.round_messages import HELLO, Hello, Orders, Terms, orders_topic


@dataclass
class Attendance:
    """Who is there, and how to tell each of them something.

    Attributes:
      channel: the aggregator's.
      job: of the federation.
      say: takes one line for people.
    """

    channel: Channel
    job: Job
    say: Callable[[str], None]
    _there: dict[str, str] = field(default_factory=dict)
    _differ: set[tuple[str, str]] = field(default_factory=set)
    spent: dict[str, str] = field(default_factory=dict)

    def __contains__(self, party: object) -> bool:
        """Whether a party is there."""
        return party in self._there

    def missing(self, parties: Iterable[str]) -> tuple[str, ...]:
        """Those of some parties who are not there."""
        return tuple(party for party in parties if party not in self._there)

    def look(self, wait_s: float = LOOK_S) -> tuple[str, ...]:
        """Takes the hellos that have come.

        Args:
          wait_s: how long to wait for each party's.

        Returns:
          The parties of which another process than before is there now.
        """
        self._accept()
        came = []
        for party in self.job.parties:
            hello = self._newest(party, wait_s)
            if hello is None or self._there.get(party) == hello.incarnation:
                continue
            if hello.terms != self.job.digest:
                self._refuse(party, hello.incarnation)
                continue
            self._there[party] = hello.incarnation
            self.spent.pop(party, None)
            came.append(party)
        return tuple(came)

    def tell(self, parties: Iterable[str], body: Callable[[str], Message]) -> dict[str, str]:
        """Sends orders; those who cannot be reached are no longer there.

        Returns:
          For each of those, why.
        """
        lost = {}
        for party in parties:
            try:
                self._send(party, self._there[party], body(party))
            except PartyError as error:
                lost[party] = f"{error}"
        self.drop(lost)
        return lost

    def drop(self, lost: Mapping[str, str]) -> None:
        """Counts parties as gone until they say hello again."""
        for party in lost:
            # What a dead process has said before it died is no sign of life.
            self._newest(party, LOOK_S)
            self._there.pop(party, None)

    def heard(self, party: str, topic: str, kind: type[M], wait_s: float) -> M | None:
        """See `heard`."""
        return heard(self.channel, party, topic, kind, wait_s)

    def forget(self, *prefixes: str) -> None:
        """Drops what has come too late, under topics that begin so."""
        if isinstance(self.channel, Returning):
            for party in self.job.parties:
                for prefix in prefixes:
                    self.channel.discard(party, prefix)

    def _accept(self) -> None:
        if not isinstance(self.channel, Returning):
            return
        for party in self.channel.restarted():
            self.channel.accept_incarnation(party)
            self._there.pop(party, None)
        connected = self.channel.connected()
        for party in tuple(self._there):
            if party not in connected:
                self._there.pop(party)

    def _newest(self, party: str, wait_s: float) -> Hello | None:
        newest = None
        try:
            while True:
                newest = self.channel.receive(party, HELLO, Hello, wait_s)
                wait_s = LOOK_S
        except PartyError:
            return newest

    def _refuse(self, party: str, incarnation: str) -> None:
        if (party, incarnation) in self._differ:
            return
        self._differ.add((party, incarnation))
        self.say(f"{party} has other terms and is told which; it takes no part")
        self._there.pop(party, None)
        try:
            self._send(party, incarnation, Terms(dict(self.job.terms)))
        except PartyError as error:
            self.say(f"{party} could not be told: {error}")

    def _send(self, party: str, incarnation: str, body: Message) -> None:
        self.channel.send(party, orders_topic(incarnation), Orders(body))  # type: ignore[arg-type]
