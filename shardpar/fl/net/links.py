"""Decides what is sent again, what is acknowledged, who is spoken to: pure, no sockets, no clock.

A link outlives its connections. Messages are numbered; each end keeps what the other has not
acknowledged, and a new connection begins where the other says it stands, so every message comes
once and in order however often the connection breaks. A message is sent only when it fits into
the window that the other grants (as streams do in HTTP/2, RFC 9113, section 5.2), so that a slow
receiver is neither flooded nor taken for dead. A process that started anew has another
incarnation: its links begin afresh, and only when the party on this side accepts it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from shardpar.errors import PartyError
from shardpar.fl.net.envelopes import Assembly, Envelope
from shardpar.fl.net.frames import VERSION, Ack, Hello, Refusal
from shardpar.fl.streams import joined

OVERHEAD_BYTES = 2048
"""What a message costs beside its bytes, so that empty ones are not free."""


def cost_bytes(size: int) -> int:
    """How much of a window a message of `size` bytes takes.

    >>> cost_bytes(0)
    2048
    """
    return size + OVERHEAD_BYTES


def digest_of(parties: Sequence[str]) -> bytes:
    """SHA-256 of the parties in their order."""
    return hashlib.sha256(joined(*parties)).digest()


@dataclass(frozen=True, eq=False)
class Kept:
    """A message that the other end has not acknowledged.

    Attributes:
      sequence: its number.
      topic: of which conversation.
      data: its bytes.
      end: what all messages to this one cost together, in bytes.
    """

    sequence: int
    topic: str
    data: bytes
    end: int


class Outbound:
    """Messages to one peer: those not acknowledged are kept and, on a new connection, sent again.

    Attributes:
      begun: number of the last message that was handed out to be sent.

    >>> out = Outbound("b")
    >>> out.put("t", b"one"); out.put("t", b"two")
    >>> out.resume(received=0, taken=0, window=1 << 20)
    >>> out.next().data, out.next().data, out.next()
    (b'one', b'two', None)
    >>> out.resume(received=1, taken=0, window=1 << 20)
    >>> out.next().data
    b'two'
    """

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._kept: deque[Kept] = deque()
        self.begun = self._last = self._received = 0
        self._end = self._received_end = self._taken = self._window = 0
        self._at = 0

    @property
    def kept_bytes(self) -> int:
        """What the messages that are not acknowledged cost."""
        return self._end - self._received_end

    @property
    def kept(self) -> int:
        """How many messages are not acknowledged."""
        return len(self._kept)

    def put(self, topic: str, data: bytes) -> None:
        """Takes a message to send."""
        self._last += 1
        self._end += cost_bytes(len(data))
        self._kept.append(Kept(self._last, topic, data, self._end))

    def resume(self, *, received: int, taken: int, window: int) -> None:
        """Begins a new connection where the other end says that it stands.

        Raises:
          PartyError: it cannot stand there.
        """
        self._window = window
        self.acknowledged(received, taken)
        self._at = 0

    def acknowledged(self, received: int, taken: int) -> None:
        """Forgets what has come.

        Raises:
          PartyError: the other end takes back what it said, or says more than it can know.
        """
        if received < self._received or taken < self._taken:
            raise self._refusal(
                f"has {received} messages and took {taken} bytes, after {self._received} and "
                f"{self._taken}"
            )
        if received > self.begun:
            raise self._refusal(f"acknowledges message {received}; {self.begun} were sent")
        while self._kept and self._kept[0].sequence <= received:
            self._received_end = self._kept.popleft().end
            self._at = max(0, self._at - 1)
        if taken > self._received_end:
            raise self._refusal(f"took {taken} bytes; only {self._received_end} had come")
        self._received, self._taken = received, taken

    def next(self) -> Kept | None:
        """The next message to send over this connection; None until one fits into the window."""
        if self._at == len(self._kept):
            return None
        kept = self._kept[self._at]
        if kept.end - self._taken > self._window:
            return None
        self._at += 1
        self.begun = max(self.begun, kept.sequence)
        return kept

    def _refusal(self, words: str) -> PartyError:
        return PartyError(f"{self._peer} {words}", party=self._peer)


class Inbound:
    """Messages from one peer.

    Attributes:
      taken: what the messages that were taken out of the inbox cost, in bytes.
    """

    def __init__(
        self, *, job: str, sender: str, receiver: str, max_message_bytes: int, window_bytes: int
    ) -> None:
        self.taken = 0
        self._came = 0
        self._window_bytes = window_bytes
        self._whose = {"job": job, "sender": sender, "receiver": receiver}
        self._max_message_bytes = max_message_bytes
        self._assembly = self._anew(0)

    @property
    def received(self) -> int:
        """Number of the last whole message."""
        return self._assembly.received

    def resume(self) -> None:
        """Begins a new connection: an unfinished message will be sent again from its start."""
        self._assembly = self._anew(self.received)

    def add(self, envelope: Envelope) -> tuple[str, bytearray] | None:
        """Takes the next part; (topic, message) if it was the last.

        Raises:
          PartyError: it is refused, see `Assembly.add`, or does not fit into the window.
        """
        cost = cost_bytes(envelope.size_bytes)
        if self._came + cost - self.taken > self._window_bytes:
            sender = self._whose["sender"]
            raise PartyError(
                f"{sender} sends {envelope.size_bytes} bytes though only "
                f"{self._window_bytes - self._came + self.taken} may wait here",
                party=sender,
            )
        whole = self._assembly.add(envelope)
        if whole is not None:
            self._came += cost
        return whole

    def take(self, size: int) -> None:
        """Notes that a message of `size` bytes left the inbox."""
        self.taken += cost_bytes(size)

    def _anew(self, received: int) -> Assembly:
        limit = self._max_message_bytes
        return Assembly(**self._whose, max_message_bytes=limit, received=received)


class Link:
    """One end of a pair of parties.

    Attributes:
      outbound: messages to the peer.
      inbound: messages from it.
      restarted: whether the peer's process started anew, which `accept` has not accepted yet.
      left: whether the peer has closed its channel.
    """

    def __init__(
        self,
        *,
        job: str,
        party: str,
        peer: str,
        parties: Sequence[str],
        incarnation: bytes,
        max_message_bytes: int,
        window_bytes: int,
    ) -> None:
        self.job, self.party, self.peer = job, party, peer
        self._digest = digest_of(parties)
        self._incarnation = incarnation
        self._max_message_bytes, self._window_bytes = max_message_bytes, window_bytes
        self._begin()

    def accept(self) -> None:
        """Begins afresh with a peer that started anew; what was under way is lost."""
        if self.restarted:
            self._begin()

    def knows(self, incarnation: bytes) -> bool:
        """Whether nothing is lost if the peer is this incarnation."""
        untouched = not self.inbound.received and not self.outbound.begun
        return self._knows == incarnation or untouched

    def is_new(self, incarnation: bytes) -> bool:
        """Whether this is another incarnation of the peer than the one last met."""
        return self._knows != incarnation

    def hello(self) -> Hello:
        """What this end begins a connection with."""
        return Hello(
            VERSION, self.job, self.party, self.peer, self._digest, self._incarnation,
            self._knows, self.inbound.received, self.inbound.taken, self._window_bytes,
        )  # fmt: skip

    def meet(self, hello: Hello) -> Refusal | None:
        """Begins a connection with what the other end says of itself, or tells why not.

        Raises:
          PartyError: its counts are impossible.
        """
        wrong = self._wrong(hello)
        if wrong:
            return Refusal(wrong, lasting=True)
        if not self.knows(hello.incarnation):
            self.restarted = True
            return Refusal(
                f"{self.party} awaits a decision: {self.peer} has started anew since they "
                "last spoke, and what was under way is lost",
                lasting=False,
            )
        if hello.knows not in (b"", self._incarnation):
            return Refusal(
                f"{self.party} has started anew since {self.peer} last spoke to it",
                lasting=False,
            )
        if not hello.knows and (hello.received or hello.taken):
            return Refusal(f"{self.peer} counts messages of nobody", lasting=True)
        self.outbound.resume(received=hello.received, taken=hello.taken, window=hello.window)
        self.inbound.resume()
        self._knows, self.left = hello.incarnation, False
        return None

    def ack(self) -> Ack | None:
        """What to acknowledge, if anything has changed since this was last asked."""
        now = (self.inbound.received, self.inbound.taken)
        if now == self._told:
            return None
        self._told = now
        return Ack(*now)

    def _begin(self) -> None:
        self.outbound = Outbound(self.peer)
        self.inbound = Inbound(
            job=self.job, sender=self.peer, receiver=self.party,
            max_message_bytes=self._max_message_bytes, window_bytes=self._window_bytes,
        )  # fmt: skip
        self.restarted = self.left = False
        self._knows = b""
        self._told = (0, 0)

    def _wrong(self, hello: Hello) -> str | None:
        """Why this end will never speak with one who says this."""
        if hello.version != VERSION:
            return f"{self.party} speaks version {VERSION} of the protocol, not {hello.version}"
        if hello.job != self.job:
            return f"{self.party} is in job {self.job!r}, not in {hello.job!r}"
        if (hello.sender, hello.receiver) != (self.peer, self.party):
            return (
                f"{self.party} speaks with {self.peer} here; the greeting was from "
                f"{hello.sender!r} to {hello.receiver!r}"
            )
        if hello.parties != self._digest:
            return f"{self.party} has other parties in its config, or the same in another order"
        return None
