"""Secure aggregation over channels: the aggregator learns the sum of updates and no single one.

SecAgg+ (`secagg_client` names the papers): five exchanges, of which only the third is as long as
the update. Clients may drop out in any of them, down to the threshold.

Revealed to the aggregator: who takes part in which phase, the sum and whose it is of; to clients:
the same without the sum. Fewer clients than the threshold who join the aggregator learn the sum of
the others and no more. Nothing is promised against an aggregator that breaks the protocol beyond
what signatures catch: substituted keys, a second set of survivors, both secrets of one client.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from shardpar.errors import PartyError, RunError
from shardpar.fl.channel import Channel
from shardpar.fl.messages import M
from shardpar.fl.secagg_client import SecAggClient
from shardpar.fl.secagg_messages import (
    Aborted,
    AdvertiseKeys,
    Keyring,
    MaskedInput,
    RoutedShares,
    ShareKeys,
    SignedSurvivors,
    Survivors,
    ToClient,
    Unmask,
    UnmaskRequest,
)
from shardpar.fl.secagg_server import SecAggServer
from shardpar.fl.secagg_session import Identity, Roster, Session

Body = TypeVar("Body", Keyring, RoutedShares, Survivors, UnmaskRequest)
# Even when the time is up, what has already arrived is taken.
_LAST_LOOK_S = 0.01


@dataclass(frozen=True)
class Aggregate:
    """What comes out of one secure aggregation.

    Attributes:
      total: the sum modulo 2^32, uint32 [words].
      survivors: the clients it is the sum of.
      dropped: for each of the other clients, why.
    """

    total: np.ndarray
    survivors: tuple[str, ...]
    dropped: Mapping[str, str]


def run_client(
    channel: Channel,
    server: str,
    identity: Identity,
    session: Session,
    roster: Roster,
    vector: np.ndarray | Callable[[], np.ndarray],
    timeout_s: float | None = None,
) -> tuple[str, ...]:
    """Takes part in one secure aggregation.

    Args:
      channel: to the aggregator.
      server: the aggregator.
      identity: this client's long-term key.
      session: the same at all parties.
      roster: long-term public keys of the cohort.
      vector: uint32 [session.words], or what makes it, called when it is needed, so that keys can
        be exchanged before training is done.
      timeout_s: how long to wait for each of the aggregator's answers, which waits for all clients;
        None for the channel's patience.

    Returns:
      The survivors, whose sum the aggregator now has if enough of them answered.

    Raises:
      PartyError: the aggregator was silent, gave up, or asked for what must not be revealed.
    """
    client = SecAggClient(identity, session, roster)

    def send(phase: str, message: M) -> None:
        channel.send(server, _topic(session, phase), message)

    def receive(phase: str, kind: type[Body]) -> Body:
        body = channel.receive(server, _topic(session, phase), ToClient, timeout_s).body
        if isinstance(body, Aborted):
            raise PartyError(f"{server} gave up {session.label}: {body.reason}", party=server)
        if not isinstance(body, kind):
            raise PartyError(
                f"{server} sent {type(body).__name__} where {kind.__name__} is due", party=server
            )
        return body

    send("advertise", client.advertise())
    send("share", client.share(receive("keyring", Keyring)))
    routed = receive("routed", RoutedShares)
    send("masked", client.mask(routed, vector() if callable(vector) else vector))
    survivors = receive("survivors", Survivors)
    send("signed", client.sign(survivors))
    send("unmask", client.unmask(receive("request", UnmaskRequest)))
    return survivors.parties


def run_server(
    channel: Channel,
    session: Session,
    roster: Roster,
    deadline_s: float,
    before_unmasking: Callable[[], None] = lambda: None,
) -> Aggregate:
    """Runs one secure aggregation as its aggregator.

    Args:
      channel: to all clients of the cohort.
      session: the same at all parties.
      roster: long-term public keys of the cohort.
      deadline_s: how long each phase lasts at most; clients that are late have dropped out.
      before_unmasking: called before anyone is asked for what reveals the sum, so that its cost can
        be written down first; if it raises `RunError` the clients are told that the round is over.

    Raises:
      RunError: too few clients are left; those that are left have been told.
    """
    server = SecAggServer(session, roster)
    dropped: dict[str, str] = {}

    def collect(
        parties: Iterable[str], phase: str, kind: type[M], take: Callable[[str, M], None]
    ) -> list[str]:
        until = time.monotonic() + deadline_s
        heard = []
        for party in parties:
            wait_s = max(until - time.monotonic(), _LAST_LOOK_S)
            try:
                take(party, channel.receive(party, _topic(session, phase), kind, wait_s))
                heard.append(party)
            except PartyError as error:
                dropped[party] = f"{phase}: {error}"
        return heard

    def tell(parties: Iterable[str], phase: str, body: Callable[[str], ToClient]) -> list[str]:
        reached = []
        for party in parties:
            try:
                channel.send(party, _topic(session, phase), body(party))
                reached.append(party)
            except PartyError as error:
                dropped[party] = f"{phase}: {error}"
        return reached

    there: list[str] = list(session.cohort)
    phase = "keyring"
    try:
        there = collect(there, "advertise", AdvertiseKeys, server.take_keys)
        keyring = ToClient(server.keyring())
        there = tell(there, phase, lambda _: keyring)
        there, phase = collect(there, "share", ShareKeys, server.take_shares), "routed"
        routed = server.routed()
        there = tell(there, phase, lambda party: ToClient(routed[party]))
        there, phase = collect(there, "masked", MaskedInput, server.take_masked), "survivors"
        survivors = ToClient(server.survivors())
        there = tell(there, phase, lambda _: survivors)
        there, phase = collect(there, "signed", SignedSurvivors, server.take_signature), "request"
        request = ToClient(server.request())
        before_unmasking()
        there = tell(there, phase, lambda _: request)
        there = collect(there, "unmask", Unmask, server.take_unmask)
        total, summed = server.total()
    except RunError as error:
        reason = ToClient(Aborted(f"{error}"[:4096]))
        tell(there, phase, lambda _: reason)
        late = "; ".join(f"{party}: {why}" for party, why in sorted(dropped.items())[:5])
        raise RunError(f"{error}" + (f" (dropped: {late})" if late else "")) from error
    missing = {p: why for p, why in dropped.items() if p not in summed}
    return Aggregate(total, summed, missing)


def _topic(session: Session, phase: str) -> str:
    return f"secagg/{session.label}/{phase}"
