"""What a channel tolerates: how long it waits for a peer, and how much a peer may send it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from shardpar.errors import ConfigError

Seconds = Annotated[float, Meta(gt=0.0)]
Bytes = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True)
class Limits:
    """How patient a channel is, and how much memory a peer may fill; no default is unlimited.

    Attributes:
      beat_s: after so long without anything to send, a sign of life is sent.
      silence_s: a connection on which nothing came for so long is given up and made anew.
      patience_s: a peer that was there and stays unreachable for so long is an error.
      join_s: the same for a peer that was never there yet; organisations do not start together.
      receive_s: how long `receive` waits for a message unless told otherwise.
      flush_s: how long `close` waits for peers to take what was sent.
      first_retry_s: before dialling a second time; doubled at each further attempt.
      longest_retry_s: between two attempts at most.
      max_message_bytes: of one message from or to a peer.
      window_bytes: of messages from one peer that wait here to be received, each with
        `links.OVERHEAD_BYTES`; what this party keeps for one peer until it has come is as much.

    Raises:
      ConfigError: a duration is not above 0, or two of the numbers contradict each other.
    """

    beat_s: Seconds = 5.0
    silence_s: Seconds = 20.0
    patience_s: Seconds = 120.0
    join_s: Seconds = 600.0
    receive_s: Seconds = 600.0
    flush_s: Seconds = 30.0
    first_retry_s: Seconds = 0.1
    longest_retry_s: Seconds = 5.0
    max_message_bytes: Bytes = 1 << 28
    window_bytes: Bytes = 1 << 29

    def __post_init__(self) -> None:
        """Checks what a config file's types cannot."""
        for name in (
            "beat_s", "silence_s", "patience_s", "join_s", "receive_s", "flush_s",
            "first_retry_s", "longest_retry_s", "max_message_bytes",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)} must be more than 0")
        if self.silence_s <= self.beat_s:
            raise ConfigError(
                f"silence_s = {self.silence_s:g} must be longer than beat_s = {self.beat_s:g}: "
                "a peer with nothing to say would count as dead; three times as long is usual"
            )
        if self.window_bytes < 2 * self.max_message_bytes:
            raise ConfigError(
                f"window_bytes = {self.window_bytes} must be at least twice max_message_bytes = "
                f"{self.max_message_bytes}, so that a message can come while another waits"
            )
