"""Decides which envelopes of a peer make up a message, and which are refused: pure, no sockets.

A message travels as numbered parts of at most 1 MiB. Numbers of messages rise by one, so each is
taken once and in order; nothing is set aside for what a peer merely declares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from shardpar.errors import PartyError
from shardpar.fl.messages import Message

PART_BYTES = 1 << 20
MOST_TOPIC = 200


class Envelope(Message):
    """One part of a message on its way.

    Attributes:
      job: the federation; others' envelopes are refused.
      sender: who says so; it must be whom the certificate names.
      receiver: for whom.
      topic: of which conversation.
      sequence: number of the message on this link, from 1.
      part: number of this part, from 0.
      parts: how many the message has.
      size_bytes: of the whole message.
      payload: the bytes of this part.
      sha256: of the whole message.
    """

    job: str
    sender: str
    receiver: str
    topic: str
    sequence: int
    part: int
    parts: int
    size_bytes: int
    payload: bytes
    sha256: bytes


def envelopes_of(
    data: bytes, *, job: str, sender: str, receiver: str, topic: str, sequence: int
) -> Iterator[Envelope]:
    """The parts of a message, made one at a time.

    >>> parts = envelopes_of(bytes(3 << 20), job="j", sender="a", receiver="b", topic="t",
    ...                      sequence=1)
    >>> [len(envelope.payload) for envelope in parts]
    [1048576, 1048576, 1048576]
    """
    parts = max(1, -(-len(data) // PART_BYTES))
    digest = hashlib.sha256(data).digest()
    for part in range(parts):
        payload = data[part * PART_BYTES : (part + 1) * PART_BYTES]
        yield Envelope(
            job, sender, receiver, topic, sequence, part, parts, len(data), payload, digest
        )


class Assembly:
    """Puts one peer's messages together; holds at most one unfinished message.

    Attributes:
      received: the number of the last whole message.
    """

    def __init__(
        self, *, job: str, sender: str, receiver: str, max_message_bytes: int, received: int = 0
    ) -> None:
        self.received = received
        self._job, self._sender, self._receiver = job, sender, receiver
        self._max_message_bytes = max_message_bytes
        self._first: Envelope | None = None
        self._parts = 0
        self._data, self._hash = bytearray(), hashlib.sha256()

    def add(self, envelope: Envelope) -> tuple[str, bytearray] | None:
        """Takes the next part.

        Returns:
          (topic, the message) when this was its last part, else None.

        Raises:
          PartyError: the envelope is another job's, misaddressed, replayed, out of order, larger
            than allowed, or the whole is not what its hash says.
        """
        self._check(envelope)
        first = self._first or envelope
        self._first = first
        self._parts += 1
        # Grown in place: a list of parts to join would hold a large message twice.
        self._data += envelope.payload
        self._hash.update(envelope.payload)
        if self._parts < first.parts:
            return None
        data, digest = self._data, self._hash.digest()
        self._first, self._parts = None, 0
        self._data, self._hash = bytearray(), hashlib.sha256()
        if digest != first.sha256:
            raise self._refusal(f"sent message {first.sequence}, which is not what its hash says")
        self.received = first.sequence
        return first.topic, data

    def _check(self, envelope: Envelope) -> None:
        whole = (envelope.topic, envelope.parts, envelope.size_bytes, envelope.sha256)
        if envelope.job != self._job:
            raise self._refusal(f"speaks of job {envelope.job[:80]!r}, not {self._job!r}")
        if (envelope.sender, envelope.receiver) != (self._sender, self._receiver):
            raise self._refusal(
                f"sent an envelope from {envelope.sender[:80]!r} to {envelope.receiver[:80]!r}, "
                f"not to {self._receiver!r}"
            )
        if envelope.sequence <= self.received:
            raise self._refusal(
                f"replayed message {envelope.sequence}; {self.received} were taken already"
            )
        if envelope.sequence != self.received + 1 or envelope.part != self._parts:
            raise self._refusal(
                f"sent part {envelope.part} of message {envelope.sequence} instead of part "
                f"{self._parts} of message {self.received + 1}"
            )
        if not 0 <= envelope.size_bytes <= self._max_message_bytes:
            raise self._refusal(
                f"declares a message of {envelope.size_bytes} bytes; at most "
                f"{self._max_message_bytes} are taken: raise net.max_message_bytes if it is right"
            )
        if envelope.parts != max(1, -(-envelope.size_bytes // PART_BYTES)):
            raise self._refusal(f"declares {envelope.parts} parts of {envelope.size_bytes} bytes")
        left = envelope.size_bytes - envelope.part * PART_BYTES
        if len(envelope.payload) != min(PART_BYTES, left):
            raise self._refusal(f"sent {len(envelope.payload)} bytes where {left} are left")
        if len(envelope.topic) > MOST_TOPIC or len(envelope.sha256) != 32:
            raise self._refusal("sent a topic that is too long, or a hash that is not SHA-256's")
        first = self._first
        if first and whole != (first.topic, first.parts, first.size_bytes, first.sha256):
            raise self._refusal(f"changed what message {envelope.sequence} is while sending it")

    def _refusal(self, words: str) -> PartyError:
        return PartyError(f"{self._sender} {words}", party=self._sender)
