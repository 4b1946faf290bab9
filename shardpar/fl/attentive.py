"""Waiting on a channel without missing that somebody died, came back, or wants something else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from shardpar.errors import PartyError
from shardpar.fl.channel import Channel
from shardpar.fl.messages import M, Message

SLICE_S = 0.2
LOOK_S = 1e-3


@runtime_checkable
class Returning(Protocol):
    """A channel that tells when others have gone and have come back, as that of `net` does."""

    def connected(self) -> frozenset[str]:
        """Who is connected now."""
        ...

    def restarted(self) -> frozenset[str]:
        """Whose process is another one now, and has not been accepted."""
        ...

    def accept_incarnation(self, peer: str) -> bool:
        """Begins afresh with such a party."""
        ...

    def discard(self, sender: str, prefix: str) -> int:
        """Drops what waits under topics that begin so."""
        ...


def heard(channel: Channel, sender: str, topic: str, kind: type[M], wait_s: float) -> M | None:
    """The next message of a topic, or None if none has come within `wait_s` seconds.

    Raises:
      PartyError: something came that is not of this kind, or nothing can come any more.
    """
    began = time.monotonic()
    try:
        return channel.receive(sender, topic, kind, wait_s)
    except PartyError:
        # An error that comes before the time is up is not silence.
        if time.monotonic() - began >= wait_s / 2 or has_restarted(channel, sender):
            return None
        raise


def has_restarted(channel: Channel, party: str) -> bool:
    """Whether the party's process is another one now."""
    return isinstance(channel, Returning) and party in channel.restarted()


def is_connected(channel: Channel, party: str) -> bool:
    """Whether the party is connected, as far as the channel can tell."""
    return not isinstance(channel, Returning) or party in channel.connected()


@dataclass
class Attentive:
    """A channel on which every wait is cut into slices, with a look at something else in between.

    Attributes:
      channel: underneath.
      check: called between slices; what it raises ends the wait.
    """

    channel: Channel
    check: Callable[[], None]

    @property
    def party(self) -> str:
        """Who this is."""
        return self.channel.party

    @property
    def parties(self) -> tuple[str, ...]:
        """Everyone."""
        return self.channel.parties

    @property
    def sent_bytes(self) -> int:
        """What this party has sent."""
        return self.channel.sent_bytes

    def send(self, to: str, topic: str, message: Message) -> None:
        """See `Channel.send`."""
        self.channel.send(to, topic, message)

    def receive(self, sender: str, topic: str, kind: type[M], timeout_s: float | None = None) -> M:
        """See `Channel.receive`; a timeout must be given.

        Raises:
          PartyError: nothing came in time, or nothing can come any more.
        """
        assert timeout_s is not None
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0:
            message = heard(self.channel, sender, topic, kind, min(SLICE_S, left))
            if message is not None:
                return message
            self.check()
        raise PartyError(f"{sender} sent nothing for {topic!r} in {timeout_s:g} s", party=sender)
