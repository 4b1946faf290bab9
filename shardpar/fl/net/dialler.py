"""Keeps one peer dialled: connects, connects again after growing pauses, says why it cannot."""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import threading
from collections.abc import Iterator

import grpc

from shardpar.errors import PartyError
from shardpar.fl.messages import decode, encode
from shardpar.fl.net.connections import Connection, Watch
from shardpar.fl.net.credentials import (
    METHOD,
    SERVICE,
    dialling_credentials,
    dialling_options,
)
from shardpar.fl.net.diagnosis import Diagnosis, diagnose
from shardpar.fl.net.frames import Frame, Hello, Refusal
from shardpar.fl.net.keys import PartyKeys
from shardpar.fl.net.limits import Limits
from shardpar.fl.net.peers import Peer

_LOG = logging.getLogger(__name__)
_DRAW = secrets.SystemRandom()


def pause_s(attempt: int, limits: Limits, draw: float) -> float:
    """How long to wait before an attempt: doubled each time, and spread so that peers do not meet.

    Args:
      attempt: failures in a row, from 0.
      limits: `first_retry_s` and `longest_retry_s`.
      draw: uniform in [0, 1).

    >>> [pause_s(n, Limits(first_retry_s=1, longest_retry_s=5), 0.5) for n in range(4)]
    [0.75, 1.5, 3.0, 3.75]
    """
    longest_s = min(limits.longest_retry_s, limits.first_retry_s * 2.0 ** min(attempt, 30))
    return longest_s * (1 + draw) / 2


class Dialler:
    """A thread that keeps a connection to one peer."""

    def __init__(
        self, peer: Peer, address: str, keys: PartyKeys, limits: Limits, watch: Watch
    ) -> None:
        self._peer, self._address, self._keys = peer, address, keys
        self._limits, self._watch = limits, watch
        self._found: Diagnosis | None = None
        self._alike = 0
        self._thread = threading.Thread(
            target=self._run, name=f"shardpar-dial-{peer.name}", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Waits for the thread, which ends once its peer is closed."""
        self._thread.join()

    def _run(self) -> None:
        attempt = 0
        while True:
            met = self._connect()
            attempt = 0 if met else attempt + 1
            if not self._peer.rest(pause_s(attempt, self._limits, _DRAW.random())):
                return

    def _connect(self) -> bool:
        """One connection from beginning to end; whether it came about."""
        channel = grpc.secure_channel(
            self._address,
            dialling_credentials(self._keys),
            options=dialling_options(self._peer.name),
        )
        try:
            return self._converse(channel.stream_stream(f"/{SERVICE}/{METHOD}"))
        finally:
            channel.close()

    def _converse(self, stub: grpc.StreamStreamMultiCallable) -> bool:
        peer = self._peer
        connection = Connection(cancel=lambda: None)
        hello = encode(Frame(peer.hello()))
        call = stub(itertools.chain([hello], peer.frames(connection)))
        connection.cancel = call.cancel
        self._watch.add(connection)
        met = False
        try:
            met = self._meet(connection, call)
            if met:
                while peer.take(connection, next(call)):
                    pass
            if connection.farewell is not None:
                self._listen_out(call)
        except StopIteration:
            pass
        except grpc.RpcError as error:
            self._explain(connection, error, met=met)
        finally:
            peer.lose(connection, "the peer ended it")
            call.cancel()
            self._watch.remove(connection)
        return met

    def _meet(self, connection: Connection, call: Iterator[bytes]) -> bool:
        peer = self._peer
        try:
            body = decode(next(call), Frame, party=peer.name).body
        except PartyError as error:
            peer.fail(str(error), lasting=True)
            connection.refuse(Refusal(str(error)[:2000], lasting=True))
            return False
        if isinstance(body, Refusal):
            peer.refused(body)
            return False
        if not isinstance(body, Hello):
            peer.fail(f"{peer.name} does not begin with a greeting", lasting=True)
            return False
        refusal = peer.welcome(connection, body)
        if refusal is not None:
            connection.refuse(refusal)
        return refusal is None

    def _listen_out(self, call: Iterator[bytes]) -> None:
        """Lets the peer hear why this end leaves; of what it says only its own reason matters."""
        for raw in call:
            with contextlib.suppress(PartyError):
                body = decode(raw, Frame, party=self._peer.name).body
                if isinstance(body, Refusal):
                    self._peer.refused(body)

    def _explain(self, connection: Connection, error: grpc.RpcError, *, met: bool) -> None:
        if connection.why:
            if connection.farewell is None:
                self._peer.fail(connection.why, lasting=False)
            return
        details = error.details() if isinstance(error, grpc.Call) else str(error)
        if met:
            self._peer.lose(connection, str(details))
            return
        found = diagnose(self._address, self._peer.name, self._keys)
        found = found or Diagnosis(f"{self._address}: {details}")
        if found != self._found:
            self._found, self._alike = found, 0
            _LOG.warning("%s cannot be dialled: %s", self._peer.name, found.reason)
        self._alike += 1
        after = found.lasting_after
        self._peer.fail(found.reason, lasting=after is not None and self._alike >= after)
