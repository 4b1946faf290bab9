"""How one party reaches the others, whatever carries it: queues in one process, or gRPC.

Protocols are written against `Channel`, so that the same code runs in a test, a simulation and
between organisations.
"""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from shardpar.errors import PartyError
from shardpar.fl.messages import M, Message, decode, encode

_PATIENCE_S = 600.0


class Channel(Protocol):
    """One party's end.

    Attributes:
      party: who this is.
      parties: everyone, this party too, in an order that all agree on.
      sent_bytes: what this party has sent so far.
    """

    party: str
    parties: tuple[str, ...]
    sent_bytes: int

    def send(self, to: str, topic: str, message: Message) -> None:
        """Sends a message; messages of one topic arrive in order, each once.

        Raises:
          PartyError: the other party cannot be reached.
        """
        ...

    def receive(self, sender: str, topic: str, kind: type[M], timeout_s: float | None = None) -> M:
        """The next message of a topic from a party.

        Args:
          sender: whose.
          topic: of which conversation, for example "round 3/masked".
          kind: what it must be.
          timeout_s: how long to wait; None for the channel's own patience.

        Raises:
          PartyError: nothing came in time, or something that is not of this kind.
        """
        ...


@dataclass
class LocalChannel:
    """Queues between threads of one process; bytes go through the same encoding as on a wire."""

    party: str
    parties: tuple[str, ...]
    boxes: dict[tuple[str, str, str], queue.SimpleQueue[bytes]]
    patience_s: float = _PATIENCE_S
    sent_bytes: int = field(default=0)

    def send(self, to: str, topic: str, message: Message) -> None:
        """Puts the message into the other party's queue."""
        if to not in self.parties:
            raise PartyError(f"there is no party {to!r}; there are {self.parties}", party=to)
        data = encode(message)
        self.sent_bytes += len(data)
        self.boxes[self.party, to, topic].put(data)

    def receive(self, sender: str, topic: str, kind: type[M], timeout_s: float | None = None) -> M:
        """Takes the next message out of this party's queue."""
        wait_s = self.patience_s if timeout_s is None else timeout_s
        try:
            data = self.boxes[sender, self.party, topic].get(timeout=wait_s)
        except queue.Empty:
            raise PartyError(
                f"{sender} sent nothing for {topic!r} within {wait_s:g} s", party=sender
            ) from None
        return decode(data, kind, party=sender)


class _Boxes(defaultdict[tuple[str, str, str], "queue.SimpleQueue[bytes]"]):
    def __missing__(self, key: tuple[str, str, str]) -> queue.SimpleQueue[bytes]:
        # `setdefault` is atomic: a sender and a receiver that come first together share one queue.
        return self.setdefault(key, queue.SimpleQueue())


def local_channels(parties: Iterable[str]) -> dict[str, LocalChannel]:
    """Channels between the threads of one process.

    >>> class Hello(Message):
    ...     text: str
    >>> ends = local_channels(["a", "b"])
    >>> ends["a"].send("b", "greeting", Hello("hello"))
    >>> ends["b"].receive("a", "greeting", Hello).text
    'hello'
    """
    names = tuple(parties)
    boxes = _Boxes()
    return {name: LocalChannel(name, names, boxes) for name in names}
