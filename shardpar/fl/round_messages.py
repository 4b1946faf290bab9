"""What an aggregator and its parties say to each other about rounds; SecAgg has its own messages.

A party that starts names its incarnation, a fresh random word, and what the aggregator sends goes
to that incarnation alone: what was on its way to a process that died is never taken for news.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from shardpar.fl.messages import Message, Tensor

Word = Annotated[str, Meta(max_length=64, pattern=r"^[0-9a-f]*$")]
Name = Annotated[str, Meta(max_length=256)]
Reason = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Key = Annotated[str, Meta(max_length=1024)]
Value = Annotated[str, Meta(max_length=65536)]
Tensors = dict[Key, Tensor]

HELLO = "hello"
STOPPED = "stopped"


class Hello(Message):
    """Party to aggregator, again and again while it waits: here I am.

    Attributes:
      incarnation: of this process.
      terms: digest of what it takes the federation to be; see `agreement`.
    """

    incarnation: Word
    terms: Digest


class Terms(Message):
    """Aggregator to a party whose terms differ: what they are here."""

    terms: dict[Key, Value]


class Train(Message):
    """Aggregator to party: train a round.

    Attributes:
      run: names the run; a party that has taken part in another is told apart.
      round_: from 0.
      attempt: counts up when a round is begun again.
      committed: the last (round, attempt) that was committed with this party in it; whatever else
        the party has prepared was given up.
      model: what the algorithm broadcasts.
    """

    run: Word
    round_: Count
    attempt: Count
    committed: tuple[Count, Count] | None
    model: Tensors


class Begin(Message):
    """Aggregator to party: all of these are done; secure aggregation begins."""

    round_: Count
    attempt: Count
    cohort: tuple[Name, ...]


class Wait(Message):
    """Aggregator to party: nothing to do yet, and why."""

    reason: Reason


class Stop(Message):
    """Aggregator to party: there will be no more rounds.

    Attributes:
      committed: as in `Train`.
      rounds: that were committed.
      reason: why it ends.
      params: the model as the last round left it.
    """

    run: Word
    committed: tuple[Count, Count] | None
    rounds: Count
    reason: Reason
    params: Tensors


class Orders(Message):
    """Whatever the aggregator wants of a party."""

    body: Terms | Train | Begin | Wait | Stop


class Trained(Message):
    """Party to aggregator: its update is ready and its own state on disk."""


class Update(Message):
    """Party to aggregator, without secure aggregation: its update."""

    sums: Tensors


class Failed(Message):
    """Party to aggregator: it cannot take part.

    Attributes:
      reason: why.
      spent: it is its privacy budget that forbids it, which is no failure.
    """

    reason: Reason
    spent: bool = False


class FromParty(Message):
    """A party's answer to `Train`."""

    body: Trained | Update | Failed


class Sent(Message):
    """Party to aggregator: the round is over for it.

    Attributes:
      sent_bytes: what it has sent since its last such message.
    """

    sent_bytes: Count


def orders_topic(incarnation: str) -> str:
    """Where a party's process is told what to do.

    >>> orders_topic("5eed")
    'orders/5eed'
    """
    return f"orders/{incarnation}"


def round_topic(round_: int, attempt: int, what: str) -> str:
    """Where parties answer in one attempt at a round.

    >>> round_topic(3, 0, "update")
    'round/3.0/update'
    """
    return f"round/{round_}.{attempt}/{what}"
