"""A client that speaks the protocol by hand, with whatever credentials, and says what it likes."""

from __future__ import annotations

import queue
import threading
from typing import Self

import grpc

from shardpar.fl.messages import Message, decode, encode
from shardpar.fl.net.credentials import METHOD, SERVICE, dialling_credentials, dialling_options
from shardpar.fl.net.envelopes import Envelope, envelopes_of
from shardpar.fl.net.frames import Frame, Hello
from shardpar.fl.net.keys import PartyKeys
from shardpar.fl.net.links import Link
from tests.fl.net.parties import JOB, PARTIES


def greeting(party: str, peer: str = "agg", *, incarnation: bytes = b"\7" * 16) -> Hello:
    """What a party of the federation would begin with."""
    return Link(
        job=JOB,
        party=party,
        peer=peer,
        parties=PARTIES,
        incarnation=incarnation,
        max_message_bytes=1 << 20,
        window_bytes=1 << 22,
    ).hello()


def parts(
    message: Message, *, sender: str, sequence: int, receiver: str = "agg", topic: str = "up"
) -> list[Envelope]:
    """A message as it would travel."""
    return list(
        envelopes_of(
            encode(message),
            job=JOB, sender=sender, receiver=receiver, topic=topic, sequence=sequence,
        )
    )  # fmt: skip


class Attacker:
    """One stream to a listener.

    Args:
      address: whom to dial.
      keys: whose certificate to show; None shows none.
      ca: the authority to trust where `keys` is None; None for no TLS at all.
      peer: whom the listener's certificate names.
    """

    def __init__(
        self, address: str, keys: PartyKeys | None, *, ca: bytes | None = None, peer: str = "agg"
    ) -> None:
        # Nothing on this side keeps it from sending what should be refused.
        options = [one for one in dialling_options(peer) if "max_send" not in one[0]]
        if keys is not None:
            self._channel = grpc.secure_channel(address, dialling_credentials(keys), options)
        elif ca is not None:
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca), options)
        else:
            self._channel = grpc.insecure_channel(address)
        self._said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._heard: queue.SimpleQueue[Message | grpc.StatusCode] = queue.SimpleQueue()
        self._call = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(self._said.get, None))
        self._thread = threading.Thread(target=self._hear, daemon=True)
        self._thread.start()

    def say(self, *bodies: Message | bytes) -> None:
        """Sends frames, or bytes as they are."""
        for body in bodies:
            self._said.put(body if isinstance(body, bytes) else encode(Frame(body)))

    def hear(self, timeout_s: float = 10.0) -> Message | grpc.StatusCode:
        """The next frame's body, or the status with which the stream ended."""
        return self._heard.get(timeout=timeout_s)

    def until(self, *kinds: type) -> Message | grpc.StatusCode:
        """The next frame of one of these kinds, or the status."""
        while True:
            heard = self.hear()
            if isinstance(heard, (*kinds, grpc.StatusCode)):
                return heard

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._said.put(None)
        self._call.cancel()
        self._thread.join(10)
        self._channel.close()

    def _hear(self) -> None:
        try:
            for raw in self._call:
                self._heard.put(decode(raw, Frame).body)
        except grpc.RpcError:
            self._heard.put(self._call.code())
        else:
            self._heard.put(grpc.StatusCode.OK)
