"""What parties without an aggregator say to each other: who is there, and parts of masked sums."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from shardpar.fl.messages import Message
from shardpar.fl.round_messages import Count, Digest, Name, Tensors, Value, Word
from shardpar.fl.round_messages import Key as TermKey
from shardpar.fl.secagg_messages import Key, Signature

HERE = "here"


class Here(Message):
    """To all: this party is there for an attempt, and how far it is.

    Attributes:
      incarnation: of this process.
      terms: digest of what it takes the federation to be; see `agreement`.
      epoch: numbers attempts over the whole job; everyone goes on to the largest that it hears of.
      rounds: that it has committed.
      of: the (round, epoch) of the last of them.
      model: digest of the server's state.
    """

    incarnation: Word
    terms: Digest
    epoch: Count
    rounds: Count
    of: tuple[Count, Count] | None
    model: Digest


class RingTerms(Message):
    """To a party whose terms differ: what they are here."""

    terms: dict[TermKey, Value]


class View(Message):
    """To all members: who is there for an epoch, as this party sees it."""

    members: tuple[Name, ...]


class Whole(Message):
    """To a member that is behind: what the others have committed.

    Attributes:
      rounds: that are committed.
      of: the (round, epoch) of the last of them.
      included: for each party the last (round, epoch) with it in the sum.
      state: of the server.
    """

    rounds: Count
    of: tuple[Count, Count] | None
    included: dict[Name, tuple[Count, Count]]
    state: Tensors


class RingKey(Message):
    """Around the ring: a member's key of this attempt alone, signed by its long-term key.

    Attributes:
      party: whose.
      mask_key: X25519.
      signature: of both, and of the session.
    """

    party: Name
    mask_key: Key
    signature: Signature


class RingPart(Message):
    """To the next in the ring: a part of a sum.

    Attributes:
      part: which.
      words: little-endian uint32.
    """

    part: Annotated[int, Meta(ge=0, le=4096)]
    words: bytes
