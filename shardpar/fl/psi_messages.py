"""What parties say to each other when they intersect their sets of ids."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from shardpar.fl.hash_to_curve import POINT_BYTES
from shardpar.fl.messages import Message

WINDOW_IDS = 1 << 15
"""How many ids a message speaks of, at most; neither end holds more of them in flight."""
TAG_BYTES = 16
PLACE_BYTES = 4

Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Opening(Message):
    """The first message each way.

    Attributes:
      session: the digest of what the parties must agree on.
      count: how many ids the sender has.
    """

    session: Digest
    count: Annotated[int, Meta(ge=0)]


class BlindedIds(Message):
    """Points behind secret scalars, in an order that says nothing: 32 bytes each."""

    points: Annotated[bytes, Meta(max_length=WINDOW_IDS * POINT_BYTES)]


class TwiceBlindedIds(Message):
    """The receiver's points behind the sender's scalar too, in the receiver's order.

    Attributes:
      tags: the first 16 bytes of each, which are enough to compare.
    """

    tags: Annotated[bytes, Meta(max_length=WINDOW_IDS * TAG_BYTES)]


class CommonIds(Message):
    """Which of the points that the receiver sent belong to common ids.

    Attributes:
      count: how many common ids there are in all.
      places: where the receiver sent each, uint32, in the order that all parties line up in.
    """

    count: Annotated[int, Meta(ge=0)]
    places: Annotated[bytes, Meta(max_length=WINDOW_IDS * PLACE_BYTES)]


class Closing(Message):
    """The last message each way.

    Attributes:
      common: the digest of the tags in common, in order.
    """

    common: Digest
