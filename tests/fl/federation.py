"""A federation in one process, for tests: identities, a roster, and the protocol phase by phase."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shardpar.errors import PartyError
from shardpar.fl.channel import LocalChannel, local_channels
from shardpar.fl.secagg import Aggregate, run_client, run_server
from shardpar.fl.secagg_client import SecAggClient
from shardpar.fl.secagg_messages import MaskedInput, UnmaskRequest
from shardpar.fl.secagg_server import SecAggServer
from shardpar.fl.secagg_session import Identity, Session

PHASES = ("advertise", "share", "masked", "signed", "unmask")


@dataclass(frozen=True)
class Federation:
    identities: Mapping[str, Identity]
    session: Session

    @classmethod
    def of(cls, clients: int, words: int, threshold: int, neighbours: int | None = None):
        names = tuple(f"client {at:03}" for at in range(clients))
        identities = {name: Identity(name, Ed25519PrivateKey.generate()) for name in names}
        return cls(identities, Session("job", 1, names, words, threshold, neighbours))

    @property
    def roster(self):
        return {name: one.key.public_key() for name, one in self.identities.items()}

    def clients(self, kind=SecAggClient, session: Session | None = None):
        session = session or self.session
        roster = self.roster
        return {n: kind(i, session, roster) for n, i in self.identities.items()}

    def vectors(self, seed: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        return {
            name: random.integers(0, 1 << 32, self.session.words, np.uint32)
            for name in self.identities
        }


@dataclass
class Played:
    """How far a protocol without channels went."""

    server: SecAggServer
    clients: dict[str, SecAggClient]
    masked: dict[str, MaskedInput]
    request: UnmaskRequest | None = None


def play(
    federation: Federation,
    vectors: Mapping[str, np.ndarray],
    gone: Mapping[str, str],
    clients: dict[str, SecAggClient] | None = None,
    session: Session | None = None,
    until: str = "",
) -> Played:
    """Runs the machines; `gone` says in which phase a client falls silent."""
    session = session or federation.session
    clients = clients or federation.clients(session=session)
    server = SecAggServer(session, federation.roster)
    there = dict(clients)

    def left(phase: str) -> dict[str, SecAggClient]:
        for name, when in gone.items():
            if when == phase:
                there.pop(name, None)
        return there

    for name, client in left("advertise").items():
        server.take_keys(name, client.advertise())
    keyring = server.keyring()
    for name, client in left("share").items():
        server.take_shares(name, client.share(keyring))
    routed = server.routed()
    played = Played(server, clients, {})
    for name, client in left("masked").items():
        played.masked[name] = client.mask(routed[name], vectors[name])
        server.take_masked(name, played.masked[name])
    if until == "masked":
        return played
    survivors = server.survivors()
    for name, client in left("signed").items():
        server.take_signature(name, client.sign(survivors))
    played.request = server.request()
    if until == "request":
        return played
    for name, client in left("unmask").items():
        server.take_unmask(name, client.unmask(played.request))
    return played


class Silenced:
    """A channel whose party dies when it is about to send for a phase."""

    def __init__(self, channel: LocalChannel, phase: str) -> None:
        self._channel, self._phase = channel, phase
        self.party, self.parties = channel.party, channel.parties

    @property
    def sent_bytes(self) -> int:
        return self._channel.sent_bytes

    def send(self, to, topic, message):
        if topic.endswith("/" + self._phase):
            raise PartyError(f"{self.party} dies", party=self.party)
        self._channel.send(to, topic, message)

    def receive(self, sender, topic, kind, timeout_s=None):
        return self._channel.receive(sender, topic, kind, timeout_s)


def run_threads(
    federation: Federation,
    vectors: Mapping[str, np.ndarray],
    gone: Mapping[str, str],
    deadline_s: float,
) -> tuple[Aggregate, dict[str, tuple[str, ...] | Exception]]:
    """The protocol between threads over local channels."""
    ends = local_channels(["server", *federation.identities])
    roster, outcomes = federation.roster, {}

    def client(name: str) -> None:
        channel = Silenced(ends[name], gone.get(name, "never"))
        identity = federation.identities[name]
        try:
            outcomes[name] = run_client(
                channel, "server", identity, federation.session, roster, vectors[name], 20.0
            )
        except Exception as error:
            outcomes[name] = error

    threads = [threading.Thread(target=client, args=(n,), daemon=True) for n in vectors]
    for thread in threads:
        thread.start()
    try:
        aggregate = run_server(ends["server"], federation.session, roster, deadline_s)
    finally:
        for thread, name in zip(threads, vectors, strict=True):
            # Those who died before the end would wait for answers that nobody sends them.
            if gone.get(name, "never") == "never":
                thread.join(20)
    return aggregate, outcomes


def modular_sum(vectors: Iterable[np.ndarray]) -> np.ndarray:
    """By Python-sized integers, not by wrapping."""
    return (sum(v.astype(np.uint64) for v in vectors) % (1 << 32)).astype(np.uint32)
