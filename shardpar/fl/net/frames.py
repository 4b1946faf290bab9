"""What the two ends of a link say to each other: who they are, what has come, that they live."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from shardpar.fl.messages import Message
from shardpar.fl.net.envelopes import PART_BYTES, Envelope

VERSION = 1
FRAME_BYTES = PART_BYTES + (1 << 16)
"""The longest frame: a part, and room for what is said about it."""

INCARNATION_BYTES = 16
Name = Annotated[str, Meta(max_length=63)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Hello(Message):
    """The first frame of a connection, each way.

    Attributes:
      version: of this protocol.
      job: the federation.
      sender: who says so; it must be whom the certificate names.
      receiver: whom it takes the other for.
      parties: SHA-256 of all parties in their order, on which all must agree.
      incarnation: random bytes, new each time that the sender's process starts.
      knows: the incarnation of the receiver that the counts below are of; empty if none.
      received: number of the receiver's last message that came here whole.
      taken: bytes of the receiver's messages that were taken out of the inbox here, overhead too.
      window: bytes that may be under way or wait here beyond these.
    """

    version: int
    job: Annotated[str, Meta(max_length=256)]
    sender: Name
    receiver: Name
    parties: Annotated[bytes, Meta(min_length=32, max_length=32)]
    incarnation: Annotated[bytes, Meta(min_length=INCARNATION_BYTES, max_length=INCARNATION_BYTES)]
    knows: Annotated[bytes, Meta(max_length=INCARNATION_BYTES)]
    received: Count
    taken: Count
    window: Count


class Ack(Message):
    """What has come and was taken since; see `Hello`."""

    received: Count
    taken: Count


class Beat(Message):
    """A sign of life."""


class Bye(Message):
    """The sender has closed its channel; it took all and has sent all."""


class Refusal(Message):
    """The last frame of a connection that the sender will not have.

    Attributes:
      reason: for people.
      lasting: whether the same will be refused again, so that dialling again is no use.
    """

    reason: Annotated[str, Meta(max_length=2000)]
    lasting: bool


class Frame(Message):
    """Whatever comes over a connection."""

    body: Hello | Envelope | Ack | Beat | Bye | Refusal
