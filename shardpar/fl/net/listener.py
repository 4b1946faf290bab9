"""Lets in the peers that dial: by certificate, job and incarnation; everyone else is told why not.

Handshakes that TLS itself refuses (no certificate, another authority, expired) never get here; gRPC
writes those to standard error.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import grpc

from shardpar.errors import PartyError, UserError
from shardpar.fl.messages import decode, encode
from shardpar.fl.net.connections import Connection, Watch
from shardpar.fl.net.credentials import (
    METHOD,
    SERVICE,
    listening_credentials,
    listening_options,
    party_behind,
)
from shardpar.fl.net.frames import Frame, Hello, Refusal
from shardpar.fl.net.keys import PartyKeys
from shardpar.fl.net.peers import Peer

_LOG = logging.getLogger(__name__)
_STREAMS_PER_PARTY = 4
_GRACE_S = 1.0


class Listener:
    """A gRPC server for the peers that dial this party.

    Attributes:
      address: "host:port" where it listens, with the port it got.

    Raises:
      UserError: the address is in use, or not one of this machine's.
    """

    def __init__(
        self, party: str, peers: Mapping[str, Peer], address: str, keys: PartyKeys, watch: Watch
    ) -> None:
        self._party, self._peers, self._watch = party, peers, watch
        self._lock = threading.Lock()
        self._streams: Counter[str] = Counter()
        handler = grpc.stream_stream_rpc_method_handler(self._converse)
        self._server = grpc.server(_DaemonThreads(), options=listening_options())
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),)
        )
        host = address.rpartition(":")[0]
        try:
            port = self._server.add_secure_port(address, listening_credentials(keys))
        except RuntimeError:
            port = 0
        if not port:
            self._server.stop(None)
            raise UserError(
                f"{party} cannot listen at {address}: another process listens there, or the "
                "address is not this machine's; choose another port, or 0.0.0.0 as the host"
            )
        self.address = f"{host}:{port}"
        self._server.start()

    def stop(self) -> None:
        """Ends all streams and the server."""
        self._server.stop(_GRACE_S).wait()

    def _converse(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        name = party_behind(context)
        peer = self._peers.get(name or "")
        if peer is None:
            who = f"{name!r} is no party that dials {self._party}"
            yield self._refuse(context, Refusal(who, lasting=True))
            return
        if not self._enter(peer.name, context):
            reason = f"{peer.name} has {_STREAMS_PER_PARTY} connections already"
            yield self._refuse(context, Refusal(reason, lasting=False))
            return
        connection = Connection(cancel=context.cancel)
        self._watch.add(connection)
        if not context.add_callback(lambda: self._leave(peer, connection)):
            self._leave(peer, connection)
            return
        try:
            body = decode(next(requests), Frame, party=peer.name).body
        except PartyError as error:
            yield self._refuse(context, Refusal(str(error)[:2000], lasting=True))
            return
        except (grpc.RpcError, StopIteration):
            return
        if not isinstance(body, Hello):
            reason = f"{peer.name} does not begin with a greeting"
            yield self._refuse(context, Refusal(reason, lasting=True))
            return
        refusal = peer.welcome(connection, body)
        if refusal is None or not refusal.lasting:
            yield encode(Frame(peer.hello()))
        if refusal is not None:
            yield self._refuse(context, refusal)
            return
        reader = threading.Thread(
            target=_read, args=(peer, connection, requests), name=f"shardpar-read-{peer.name}",
            daemon=True,
        )  # fmt: skip
        reader.start()
        yield from peer.frames(connection)

    def _refuse(self, context: grpc.ServicerContext, refusal: Refusal) -> bytes:
        _LOG.warning("%s refuses %s: %s", self._party, context.peer(), refusal.reason)
        context.set_code(grpc.StatusCode.PERMISSION_DENIED)
        context.set_details(refusal.reason[:500])
        return encode(Frame(refusal))

    def _enter(self, name: str, context: grpc.ServicerContext) -> bool:
        with self._lock:
            if self._streams[name] >= _STREAMS_PER_PARTY:
                return False
            self._streams[name] += 1
            return True

    def _leave(self, peer: Peer, connection: Connection) -> None:
        with self._lock:
            self._streams[peer.name] -= 1
        self._watch.remove(connection)
        peer.lose(connection, "the peer ended it")


def _read(peer: Peer, connection: Connection, requests: Iterator[bytes]) -> None:
    try:
        for raw in requests:
            if not peer.take(connection, raw):
                break
    except grpc.RpcError:
        pass
    if connection.farewell is None:
        peer.lose(connection, "the peer ended it")


class _DaemonThreads(futures.ThreadPoolExecutor):
    """A thread for each stream, which Python does not wait for when it exits.

    `ThreadPoolExecutor`'s own are joined at exit, before anything could tell their streams to end.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        """Runs a function in a thread of its own."""
        future: futures.Future[Any] = futures.Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="shardpar-stream", daemon=True).start()
        return future
