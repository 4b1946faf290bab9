"""A party's channel to others over gRPC with mutual TLS: `channel.Channel` between organisations.

    keys = read_keys(Path("keys"), "hospital-a")
    with GrpcChannel.open(
        "hospital-a", ("aggregator", "hospital-a", "hospital-b"),
        job="stroke-7", keys=keys, dial={"aggregator": "agg.example:7443"},
    ) as channel:
        channel.wait()                                      # optional: until all are connected
        channel.send("aggregator", "round 1/update", update)
        model = channel.receive("aggregator", "round 2/model", Model, timeout_s=60)

Of each pair of parties one dials: `addresses.dialled` says who. Whoever is dialled gives `listen`;
port 0 takes a free one, and `address` tells which. `open` returns at once and connects behind the
scenes; what is sent before is kept. A connection that breaks is made anew, and nothing is lost or
comes twice. `send` and `receive` raise `PartyError` (its `party` names whom) when a peer stays away
for longer than `Limits.patience_s`, breaks the protocol, refuses this party, has closed its
channel, or was started anew and so has lost what was under way; then drop it from the round, or
call `accept_incarnation(peer)` and begin with it afresh. What came for a conversation that is over
takes up the window of its peer until `discard` drops it.
"""

from __future__ import annotations

import atexit
import logging
import secrets
import threading
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

from shardpar.errors import PartyError, UserError
from shardpar.fl.messages import M, Message, decode, encode
from shardpar.fl.net.addresses import require_address
from shardpar.fl.net.connections import Watch
from shardpar.fl.net.dialler import Dialler
from shardpar.fl.net.envelopes import MOST_TOPIC
from shardpar.fl.net.frames import INCARNATION_BYTES
from shardpar.fl.net.keys import PartyKeys, require_name
from shardpar.fl.net.limits import Limits
from shardpar.fl.net.links import Link
from shardpar.fl.net.listener import Listener
from shardpar.fl.net.peers import Peer

_LOG = logging.getLogger(__name__)


class GrpcChannel:
    """One party's end of its links; see the module. It may be used by several threads.

    Attributes:
      party: who this is.
      parties: everyone, this party too, in the order that all agree on.
      sent_bytes: of messages sent so far, each counted once, as `LocalChannel` counts them.
      address: where this party listens, or None.
    """

    def __init__(
        self,
        party: str,
        parties: Iterable[str],
        *,
        job: str,
        keys: PartyKeys,
        dial: Mapping[str, str] | None = None,
        listen: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.party, self.parties, self.sent_bytes = party, tuple(parties), 0
        self._limits = limits or Limits()
        dial = dict(dial or {})
        self._require(keys, dial, listen)
        self._lock = threading.Lock()
        self._closed = False
        incarnation = secrets.token_bytes(INCARNATION_BYTES)
        others = [name for name in self.parties if name != party] if listen else list(dial)
        self._peers = {
            name: Peer(
                Link(
                    job=job, party=party, peer=name, parties=self.parties, incarnation=incarnation,
                    max_message_bytes=self._limits.max_message_bytes,
                    window_bytes=self._limits.window_bytes,
                ),
                self._limits,
                where=f" at {dial[name]}" if name in dial else "",
                dials=name in dial,
            )
            for name in others
        }  # fmt: skip
        self._watch = Watch(self._limits.silence_s)
        self._listener = None
        if listen is not None:
            diallers = {name: peer for name, peer in self._peers.items() if name not in dial}
            try:
                self._listener = Listener(party, diallers, listen, keys, self._watch)
            except UserError:
                self._watch.stop()
                raise
        self._diallers = [
            Dialler(self._peers[name], address, keys, self._limits, self._watch)
            for name, address in dial.items()
        ]
        # Whoever forgets to close must not see the interpreter end under running streams.
        atexit.register(self.close, flush_s=0.0)

    @classmethod
    def open(
        cls,
        party: str,
        parties: Iterable[str],
        *,
        job: str,
        keys: PartyKeys,
        dial: Mapping[str, str] | None = None,
        listen: str | None = None,
        limits: Limits | None = None,
    ) -> Self:
        """Listens and dials; does not wait for anyone.

        Args:
          party: who this is.
          parties: everyone, in an order that all agree on.
          job: the federation's name, the same for all.
          keys: this party's, see `keys.read_keys`.
          dial: "host:port" of each peer that this party dials; see `addresses.dialled`.
          listen: "host:port" at which all other peers dial this party; None if nobody does.
          limits: how patient to be, and how much memory to give a peer.

        Raises:
          UserError: the keys are another party's, an address is none or in use, or a party is
            named that is not one of the parties.
        """
        return cls(party, parties, job=job, keys=keys, dial=dial, listen=listen, limits=limits)

    @property
    def address(self) -> str | None:
        """Where this party listens, with the port it got."""
        return self._listener.address if self._listener else None

    def send(self, to: str, topic: str, message: Message) -> None:
        """Sends a message, or keeps it until the peer is there; see `Channel.send`.

        Raises:
          PartyError: the peer is gone, refuses this party, or takes nothing for long.
          UserError: the message is larger than `max_message_bytes`, or the topic too long.
        """
        peer = self._peer(to)
        data = encode(message)
        if len(data) > self._limits.max_message_bytes:
            raise UserError(
                f"a message of {len(data)} bytes to {to} for {topic!r} is larger than "
                f"net.max_message_bytes = {self._limits.max_message_bytes}; raise it at all parties"
            )
        if len(topic) > MOST_TOPIC:
            raise UserError(f"the topic {topic[:40]!r}... is longer than {MOST_TOPIC} characters")
        peer.put(topic, data, self._limits.receive_s)
        with self._lock:
            self.sent_bytes += len(data)

    def receive(self, sender: str, topic: str, kind: type[M], timeout_s: float | None = None) -> M:
        """The next message of a topic from a party; see `Channel.receive`.

        Raises:
          PartyError: nothing came in time, the peer is gone, or it sent something else.
        """
        wait_s = self._limits.receive_s if timeout_s is None else timeout_s
        return decode(self._peer(sender).get(topic, wait_s), kind, party=sender)

    def discard(self, sender: str, prefix: str) -> int:
        """Drops what waits here under topics that begin so; how many messages that were."""
        return self._peer(sender).discard(prefix)

    def wait(self, peers: Iterable[str] | None = None, timeout_s: float | None = None) -> None:
        """Waits until peers are connected; all by default, and for `join_s`.

        Raises:
          PartyError: one is not in time, or cannot be; names it and says why.
        """
        wait_s = self._limits.join_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + wait_s
        for name in self._peers if peers is None else peers:
            self._peer(name).await_met(deadline_s)

    def connected(self) -> frozenset[str]:
        """The peers that are connected now."""
        return frozenset(name for name, peer in self._peers.items() if peer.connected)

    def restarted(self) -> frozenset[str]:
        """The peers that were started anew and await `accept_incarnation`."""
        return frozenset(name for name, peer in self._peers.items() if peer.restarted)

    def accept_incarnation(self, peer: str) -> bool:
        """Lets a peer that was started anew rejoin; whether there was one to let in.

        What it had sent and was sent before is dropped on this side too.
        """
        return self._peer(peer).accept()

    def close(self, flush_s: float | None = None) -> None:
        """Has what was sent taken by the peers, tells them, and ends all threads and sockets.

        Args:
          flush_s: how long to wait for peers; None for `Limits.flush_s`, 0 to leave at once.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        deadline_s = time.monotonic() + (self._limits.flush_s if flush_s is None else flush_s)
        for peer in self._peers.values():
            peer.finish()
        for name, peer in self._peers.items():
            lacking = peer.await_finished(deadline_s)
            if lacking:
                _LOG.warning("%s has not taken %d messages of %s", name, lacking, self.party)
        for peer in self._peers.values():
            peer.close()
        self._watch.stop()
        for dialler in self._diallers:
            dialler.join()
        if self._listener is not None:
            self._listener.stop()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        """The channel itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes; after an error, without waiting for peers."""
        self.close(None if kind is None else 0.0)

    def _peer(self, name: str) -> Peer:
        peer = self._peers.get(name)
        if peer is None:
            raise PartyError(
                f"{self.party} has no link with {name!r}; it has links with "
                f"{', '.join(self._peers) or 'nobody'}",
                party=name,
            )
        return peer

    def _require(self, keys: PartyKeys, dial: Mapping[str, str], listen: str | None) -> None:
        for name in self.parties:
            require_name(name)
        if len(set(self.parties)) != len(self.parties):
            raise UserError(f"the parties {', '.join(self.parties)} are not all different")
        for name in (self.party, *dial):
            if name not in self.parties:
                raise UserError(f"{name!r} is not one of the parties {', '.join(self.parties)}")
        if self.party in dial:
            raise UserError(f"{self.party} need not dial itself")
        if keys.party != self.party:
            raise UserError(f"these are the keys of {keys.party}, not of {self.party}")
        if not dial and listen is None:
            raise UserError(f"{self.party} neither dials anyone nor listens; give one of the two")
        for name, address in dial.items():
            require_address(address, of=name)
        if listen is not None:
            require_address(listen, of=self.party)
