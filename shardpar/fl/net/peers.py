"""One peer as a party's threads see it: its inbox, its link, and the connection it has now.

Threads of the party put and get messages, threads of gRPC carry frames; all meet here under one
lock for each peer. What is sent and taken is decided by `links`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator

from shardpar.errors import PartyError
from shardpar.fl.messages import Message, decode, encode, printable
from shardpar.fl.net.connections import Connection
from shardpar.fl.net.envelopes import Envelope, envelopes_of
from shardpar.fl.net.frames import Ack, Beat, Bye, Frame, Hello, Refusal
from shardpar.fl.net.limits import Limits
from shardpar.fl.net.links import Link, cost_bytes

_LOG = logging.getLogger(__name__)


class Peer:
    """What one party has to do with another.

    Attributes:
      name: the other.
      link: the state of what was sent and received; read and changed under `condition` only.
    """

    def __init__(self, link: Link, limits: Limits, *, where: str, dials: bool) -> None:
        self.name = link.peer
        self.link = link
        self.condition = threading.Condition()
        self._limits = limits
        self._where = where
        self._dials = dials
        self._inbox: dict[str, deque[bytearray]] = {}
        self._connection: Connection | None = None
        self._met = False
        self._lost_s = time.monotonic()
        self._why = "it has not been heard of"
        self._broken: str | None = None
        self._closing = self._closed = False

    def put(self, topic: str, data: bytes, wait_s: float) -> None:
        """Takes a message to send; waits while more than a window is kept for this peer.

        Raises:
          PartyError: there is no sense in sending, or no room within `wait_s` seconds.
        """
        deadline_s = time.monotonic() + wait_s
        cost = cost_bytes(len(data))
        with self.condition:
            while True:
                self._require_sense(inbox_too=False)
                kept = self.link.outbound.kept_bytes
                if kept + cost <= self._limits.window_bytes:
                    self.link.outbound.put(topic, data)
                    self.condition.notify_all()
                    return
                if not self._wait(deadline_s):
                    raise self._error(
                        f"{self.name} has not taken {kept} bytes that were sent to it within "
                        f"{wait_s:g} s; receive there what is sent, or raise net.window_bytes"
                    )

    def get(self, topic: str, wait_s: float) -> bytearray:
        """The next message of a topic.

        Raises:
          PartyError: none came within `wait_s` seconds, or none can come.
        """
        deadline_s = time.monotonic() + wait_s
        with self.condition:
            while True:
                waiting = self._inbox.get(topic)
                if waiting:
                    data = waiting.popleft()
                    if not waiting:
                        del self._inbox[topic]
                    self.link.inbound.take(len(data))
                    self.condition.notify_all()
                    return data
                self._require_sense()
                if not self._wait(deadline_s):
                    raise self._error(
                        f"{self.name} sent nothing for {topic!r} within {wait_s:g} s"
                        + ("" if self._connection else f"; it is not connected: {self._why}")
                    )

    def discard(self, prefix: str) -> int:
        """Drops messages that wait under topics that begin so; how many there were."""
        with self.condition:
            dropped = 0
            for topic in [topic for topic in self._inbox if topic.startswith(prefix)]:
                for data in self._inbox.pop(topic):
                    self.link.inbound.take(len(data))
                    dropped += 1
            self.condition.notify_all()
            return dropped

    def accept(self) -> bool:
        """Begins afresh with a peer that started anew; whether it had."""
        with self.condition:
            if not self.link.restarted:
                return False
            self.link.accept()
            self._inbox.clear()
            self._broken = None
            self._lost_s, self._why = time.monotonic(), "it has not come back yet"
            self.condition.notify_all()
            return True

    def await_met(self, deadline_s: float) -> None:
        """Waits for a connection.

        Raises:
          PartyError: there is none in time, or there cannot be one.
        """
        with self.condition:
            while self._connection is None:
                self._require_sense(away=False)
                if not self._wait(deadline_s):
                    raise self._error(f"{self.name} is not connected{self._where}: {self._why}")

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        with self.condition:
            return self._connection is not None

    @property
    def restarted(self) -> bool:
        """Whether it started anew and awaits `accept`."""
        with self.condition:
            return self.link.restarted

    def hello(self) -> Hello:
        """What to begin a connection with."""
        with self.condition:
            return self.link.hello()

    def welcome(self, connection: Connection, hello: Hello) -> Refusal | None:
        """Makes this the peer's connection, or tells why not."""
        with self.condition:
            refusal = self._meet(hello)
            if refusal is None:
                if self._connection is not None:
                    self._connection.end("a newer connection took its place")
                self._connection = connection
                self._met, self._broken = True, None
            else:
                self._why = refusal.reason
                if refusal.lasting and self._dials:
                    self._broken = self._broken or refusal.reason
            self.condition.notify_all()
        if refusal is not None and self._dials:
            _LOG.warning("%s is refused: %s", self.name, refusal.reason)
        return refusal

    def lose(self, connection: Connection, why: str) -> None:
        """Notes that a connection has ended."""
        with self.condition:
            connection.ended = True
            if self._connection is connection:
                self._connection = None
                self._lost_s = time.monotonic()
                self._why = connection.why or why
                _LOG.info("the connection with %s ended: %s", self.name, self._why)
            self.condition.notify_all()

    def fail(self, why: str, *, lasting: bool) -> None:
        """Notes that no connection came about; a lasting reason counts until they have met."""
        with self.condition:
            self._why = why
            if lasting and not self._met:
                self._broken = why
            self.condition.notify_all()

    def finish(self) -> None:
        """Has what is kept sent, and then nothing more."""
        with self.condition:
            self._closing = True
            self.condition.notify_all()

    def await_finished(self, deadline_s: float) -> int:
        """Waits until the peer has all and knows that it is over; messages that it lacks."""
        with self.condition:
            while self._pending() and self._wait(deadline_s):
                pass
            return 0 if self.link.left else self.link.outbound.kept

    def close(self) -> None:
        """Ends the connection; whoever waits gets an error."""
        with self.condition:
            self._closing = self._closed = True
            if self._connection is not None:
                self._connection.end("this party closed its channel")
            self.condition.notify_all()

    def rest(self, seconds: float) -> bool:
        """Waits before dialling again; whether there is any sense in dialling."""
        until_s = time.monotonic() + seconds
        with self.condition:
            while not (self._closed or self._broken):
                if self.link.restarted:
                    # Until the party on this side decides, another connection says nothing new.
                    self.condition.wait()
                elif time.monotonic() >= until_s:
                    return True
                else:
                    self.condition.wait(until_s - time.monotonic())
            return False

    def frames(self, connection: Connection) -> Iterator[bytes]:
        """What to send over a connection, as it falls due, until it ends."""
        parts: Iterator[Envelope] = iter(())
        begun = False
        sent_s = time.monotonic()
        while True:
            # A long message is hashed and cut outside the lock.
            body: Message | None = next(parts, None) if begun else None
            begun = body is not None
            with self.condition:
                urgent = self._urgent(connection, sent_s, idle=not begun)
                while body is None and urgent is None:
                    if connection.ended:
                        return
                    kept = self.link.outbound.next() if self._connection is connection else None
                    if kept is not None:
                        parts = envelopes_of(
                            kept.data, job=self.link.job, sender=self.link.party,
                            receiver=self.name, topic=kept.topic, sequence=kept.sequence,
                        )  # fmt: skip
                        begun = True
                        break
                    self.condition.wait(self._until_beat_s(sent_s))
                    urgent = self._urgent(connection, sent_s, idle=True)
                if connection.ended:
                    return
            for said in (urgent, body):
                if said is not None:
                    sent_s = time.monotonic()
                    yield encode(Frame(said))
                if isinstance(said, Bye | Refusal):
                    return

    def take(self, connection: Connection, raw: bytes) -> bool:
        """Takes a frame that came; whether the connection goes on."""
        with self.condition:
            if connection.ended or connection.farewell or self._connection is not connection:
                return False
            connection.heard_s = time.monotonic()
            try:
                return self._take(decode(raw, Frame, party=self.name).body)
            except PartyError as error:
                self._broken = str(error)
                connection.refuse(Refusal(str(error)[:2000], lasting=True))
                _LOG.warning("the connection with %s is given up: %s", self.name, error)
                return False
            finally:
                self.condition.notify_all()

    def refused(self, refusal: Refusal) -> None:
        """Notes that the peer will not have this party."""
        with self.condition:
            self._why = f"{self.name} refuses {self.link.party}: {printable(refusal.reason)}"
            if refusal.lasting:
                self._broken = self._broken or self._why
            self.condition.notify_all()
        _LOG.warning("%s", self._why)

    def _take(self, body: Message) -> bool:
        match body:
            case Envelope():
                whole = self.link.inbound.add(body)
                if whole is not None:
                    self._inbox.setdefault(whole[0], deque()).append(whole[1])
            case Ack():
                self.link.outbound.acknowledged(body.received, body.taken)
            case Beat():
                pass
            case Bye():
                self.link.left = True
                return False
            case Refusal():
                self.refused(body)
                return False
            case _:
                raise self._error(f"{self.name} greets twice")
        return True

    def _meet(self, hello: Hello) -> Refusal | None:
        if self._closed:
            return Refusal(f"{self.link.party} has closed its channel", lasting=False)
        if self._broken and not self.link.is_new(hello.incarnation):
            return Refusal(self._broken[:2000], lasting=True)
        if self._connection is not None and self.link.is_new(hello.incarnation):
            return Refusal(
                f"{self.link.party} is connected with another process of {self.name}; if that "
                f"one died, this is noticed within {self._limits.silence_s:g} s",
                lasting=False,
            )
        try:
            return self.link.meet(hello)
        except PartyError as error:
            self._broken = str(error)
            return Refusal(str(error)[:2000], lasting=True)

    def _urgent(self, connection: Connection, sent_s: float, *, idle: bool) -> Message | None:
        """What goes before parts of messages, or instead of them."""
        if connection.farewell is not None:
            return connection.farewell
        if self._connection is not connection:
            return None
        ack = self.link.ack()
        if ack is not None or not idle:
            return ack
        if self._closing and not self.link.outbound.kept:
            return Bye()
        return Beat() if time.monotonic() - sent_s >= self._limits.beat_s else None

    def _until_beat_s(self, sent_s: float) -> float:
        left_s = sent_s + self._limits.beat_s - time.monotonic()
        return left_s if left_s > 0 else self._limits.beat_s

    def _pending(self) -> bool:
        if self.link.left or self.link.restarted or self._broken:
            return False
        return self._connection is not None or self.link.outbound.kept > 0

    def _require_sense(self, *, inbox_too: bool = True, away: bool = True) -> None:
        """Raises PartyError when nothing can come from this peer, or go to it."""
        if self._closed or (self._closing and not inbox_too):
            raise self._error(f"the channel of {self.link.party} is closed")
        if self._broken is not None:
            raise self._error(self._broken)
        if self.link.restarted:
            raise self._error(
                f"{self.name} has started anew, and what was under way is lost: drop it from the "
                f"round, or let it rejoin with accept_incarnation({self.name!r})"
            )
        if self.link.left:
            raise self._error(f"{self.name} has closed its channel")
        if away and self._connection is None:
            patience_s = self._limits.patience_s if self._met else self._limits.join_s
            away_s = time.monotonic() - self._lost_s
            if away_s >= patience_s:
                option = "patience_s" if self._met else "join_s"
                raise self._error(
                    f"{self.name} has been unreachable{self._where} for {away_s:.0f} s "
                    f"({self._why}); see that it runs and that its address and the firewall are "
                    f"right, or raise net.{option}"
                )

    def _wait(self, deadline_s: float) -> bool:
        """Waits for news until a deadline, or until patience runs out; whether time is left."""
        now_s = time.monotonic()
        if now_s >= deadline_s:
            return False
        until_s = deadline_s
        if self._connection is None:
            patience_s = self._limits.patience_s if self._met else self._limits.join_s
            if self._lost_s + patience_s > now_s:
                until_s = min(until_s, self._lost_s + patience_s)
        self.condition.wait(until_s - now_s)
        return True

    def _error(self, words: str) -> PartyError:
        return PartyError(words, party=self.name)
