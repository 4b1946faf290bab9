"""What parties and the aggregator say to each other around each secure sum."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from shardpar.fl.messages import Message

MOST_WORDS = 1 << 22
"""Of one sum."""


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The sum that a party is about to take part in; all must name the same.

    Attributes:
      index: how many there were before it in this job.
      label: of what.
      words: how long it is.
    """

    index: Annotated[int, Meta(ge=0)]
    label: Annotated[str, Meta(max_length=256)]
    words: Annotated[int, Meta(ge=1, le=MOST_WORDS)]


class Finished(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The party wants no more sums."""


class ToSums(Message):
    """Party to aggregator, before each sum."""

    body: Wanted | Finished


class Total(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The sum modulo 2^32, uint32."""

    index: int
    words: Annotated[bytes, Meta(max_length=4 * MOST_WORDS)]


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """There will be no sum."""

    reason: Annotated[str, Meta(max_length=4096)]


class FromSums(Message):
    """Aggregator to party, before and after each sum."""

    body: Wanted | Total | Refused
