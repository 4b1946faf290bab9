"""Attacks on secure aggregation. Each is a function of the implementation under attack, and each
finds its mark on a variant broken for it: an attack that cannot succeed would prove nothing."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy import stats

from shardpar.errors import PartyError, RunError, ShardparError
from shardpar.fl import secagg_client, secagg_server
from shardpar.fl.fixed import FixedPoint
from shardpar.fl.secagg_client import SecAggClient
from shardpar.fl.secagg_messages import (
    Keyring,
    RevealedShare,
    RoutedShares,
    Survivors,
    Unmask,
    UnmaskRequest,
)
from shardpar.fl.secagg_server import SecAggServer
from shardpar.fl.secagg_session import Identity, Session
from tests.fl.federation import Federation, play

VICTIM, OTHERS = "client 000", ("client 001", "client 002", "client 003")


def federation(words: int = 16) -> Federation:
    return Federation.of(4, words, threshold=3)


class CarelessIdentity(Identity):
    """Broken: begins a round as often as it is asked."""

    def begin(self, session: Session) -> None:
        pass


_ONCE = secagg_client._Secrets(bytes(32), *(X25519PrivateKey.generate() for _ in range(2)))


@dataclass
class ReusingClient(SecAggClient):
    """Broken: the same secrets in every round, and masks that do not depend on it."""

    _secrets: secagg_client._Secrets = _ONCE


@dataclass
class TalkativeClient(SecAggClient):
    """Broken: answers whatever it is asked, as often as it is asked."""

    def unmask(self, request: UnmaskRequest) -> Unmask:
        return Unmask(
            tuple(RevealedShare(p, s[0]) for p, s in self._shares.items() if p in request.alive),
            tuple(RevealedShare(p, s[1]) for p, s in self._shares.items() if p in request.dead),
        )


def difference_of_two_rounds(identity, client, monkeypatch=None) -> str:
    """The aggregator asks for one round twice and subtracts what comes."""
    built = federation()
    identities = {n: identity(n, i.key) for n, i in built.identities.items()}
    built = Federation(identities, built.session)
    vectors = built.vectors(0)
    later = {n: v + np.uint32(7) for n, v in vectors.items()}
    try:
        one = play(built, vectors, {}, built.clients(client), until="masked").masked[VICTIM]
        two = play(built, later, {}, built.clients(client), until="masked").masked[VICTIM]
    except RunError:
        return "refused"
    change = np.frombuffer(two.words, "<u4") - np.frombuffer(one.words, "<u4")
    return "revealed" if (change == 7).all() else "masks differ"


def test_mask_reuse_is_refused_and_caught_where_it_is_not():
    assert difference_of_two_rounds(Identity, SecAggClient) == "refused"
    # Even if a party forgets what it has begun, fresh keys keep masks apart.
    assert difference_of_two_rounds(CarelessIdentity, SecAggClient) == "masks differ"
    assert difference_of_two_rounds(CarelessIdentity, ReusingClient) == "revealed"


def test_masks_of_two_rounds_and_attempts_differ_even_under_equal_secrets():
    built = federation()
    session = built.session
    sessions = [session, replace(session, round_=2), replace(session, attempt=1)]
    sessions.append(replace(session, job="other"))
    for mask in (
        lambda s: secagg_client.self_mask(s, VICTIM, bytes(32)),
        lambda s: secagg_client.pair_mask(s, VICTIM, OTHERS[0], bytes(32)),
    ):
        drawn = {mask(s).words(8).tobytes() for s in sessions}
        assert len(drawn) == len(sessions)


def single_update(client, ask) -> str:
    """The aggregator asks for the victim's seed and key and takes its masks off alone."""
    built = federation()
    vectors = built.vectors(1)
    played = play(built, vectors, {}, built.clients(client), until="request")
    server, session = played.server, built.session
    alive, all_seeds, all_keys = played.request.alive, {}, {}
    try:
        for name, one in played.clients.items():
            for request in ask(played.request):
                answer = one.unmask(request)
                point = session.point(name)
                seeds = {s.party: s.share for s in answer.seeds}
                keys = {s.party: s.share for s in answer.keys}
                if VICTIM in seeds:
                    all_seeds[point] = seeds[VICTIM]
                if VICTIM in keys:
                    all_keys[point] = keys[VICTIM]
    except PartyError:
        return "refused"
    needed = session.shares_needed(len(alive))
    if min(len(all_seeds), len(all_keys)) < needed:
        return "too little"
    seed = secagg_server.shamir.restore(all_seeds, needed)
    private = X25519PrivateKey.from_private_bytes(secagg_server.shamir.restore(all_keys, needed))
    update = np.frombuffer(played.masked[VICTIM].words, "<u4").copy()
    update -= secagg_client.self_mask(session, VICTIM, seed).words(update.size)
    for other in OTHERS:
        secret = secagg_client.shared_secret(private, server._keys[other].mask_key, party=other)
        update -= secagg_client.pair_mask(session, VICTIM, other, secret).words(update.size)
    return "revealed" if np.array_equal(update, vectors[VICTIM]) else "nothing"


def both_at_once(request):
    return [UnmaskRequest(request.alive, (VICTIM,), request.signatures)]


def one_after_the_other(request):
    alive = tuple(p for p in request.alive if p != VICTIM)
    return [request, UnmaskRequest(alive, (VICTIM,), request.signatures)]


@pytest.mark.parametrize("ask", [both_at_once, one_after_the_other])
def test_both_secrets_of_one_client_are_not_revealed(ask):
    assert single_update(SecAggClient, ask) == "refused"
    assert single_update(TalkativeClient, ask) == "revealed"


def test_the_same_question_twice_gets_the_same_answer():
    built = federation()
    played = play(built, built.vectors(0), {}, until="request")
    client = played.clients[VICTIM]
    assert client.unmask(played.request) == client.unmask(played.request)


def test_survivors_that_others_did_not_sign_are_refused():
    built = Federation.of(4, 8, threshold=3)
    played = play(built, built.vectors(0), {}, until="request")
    client, request = played.clients[VICTIM], played.request
    few = UnmaskRequest(request.alive, (), request.signatures[:2])
    with pytest.raises(PartyError, match="2 clients signed the survivors; it takes 3"):
        client.unmask(few)
    with pytest.raises(PartyError, match="asked about others than the survivors"):
        client.unmask(UnmaskRequest(request.alive[:3], request.alive[3:], request.signatures[:3]))
    twice = UnmaskRequest(request.alive, (), request.signatures[:2] * 2)
    with pytest.raises(PartyError, match="sent signatures of"):
        client.unmask(twice)
    one, two, *rest = request.signatures
    swapped = (replace_(one, two.signature), replace_(two, one.signature), *rest)
    with pytest.raises(PartyError, match="has not signed this survivors"):
        client.unmask(UnmaskRequest(request.alive, (), swapped))
    with pytest.raises(PartyError, match="below 3"):
        played.clients[OTHERS[0]].sign(Survivors(request.alive[:2]))
    with pytest.raises(PartyError, match="named different survivors before"):
        client.sign(Survivors(request.alive[:3]))
    with pytest.raises(PartyError, match="left out"):
        client.sign(Survivors(request.alive[1:]))


def replace_(signed, signature):
    return type(signed)(signed.party, signature)


class Masks:
    """Where masks come from in a broken variant."""

    def __init__(self, draw) -> None:
        self.draw = draw

    def __call__(self, total, plus, minus):
        for stream in plus:
            total += self.draw(stream, total.size)
        for stream in minus:
            total -= self.draw(stream, total.size)


def uneven(words: np.ndarray) -> bool:
    """Whether masked zeros tell that they are masked: by their bytes, or by a top never seen."""
    counts = [np.bincount(words.view(np.uint8)[at::4], minlength=256) for at in range(4)]
    byte_p = min(stats.chisquare(count).pvalue for count in counts)
    # Among 2^16 words, some are expected within 2^-13 of either end; that none is: e^-8.
    near_top = np.count_nonzero(words > np.uint32(0xFFFFFFFF - (1 << 19)))
    near_bottom = np.count_nonzero(words < np.uint32(1 << 19))
    return byte_p < 1e-6 or not near_top or not near_bottom or bool((words % 2 == 0).all())


def masked_zeros(monkeypatch, draw=None) -> np.ndarray:
    if draw is not None:
        monkeypatch.setattr(secagg_client, "add_streams", Masks(draw))
    built = federation(1 << 16)
    zeros = {name: np.zeros(1 << 16, np.uint32) for name in built.identities}
    played = play(built, zeros, {}, until="masked")
    return np.frombuffer(played.masked[VICTIM].words, "<u4").copy()


def test_masks_are_uniform_to_the_top(monkeypatch):
    assert not uneven(masked_zeros(monkeypatch))
    for draw in (
        lambda stream, size: np.zeros(size, np.uint32),
        lambda stream, size: stream.words(size) >> np.uint32(4),
        lambda stream, size: stream.words(size) & np.uint32(0xFFFFFFFE),
        lambda stream, size: (
            stream.words(size)
            .astype(np.float32)
            .astype(np.uint64)
            .clip(0, 0xFFFFFFFF)
            .astype(np.uint32)
        ),
    ):
        with monkeypatch.context() as broken:
            assert uneven(masked_zeros(broken, draw))


@dataclass
class TrustingClient(SecAggClient):
    """Broken: takes keys as they come, unsigned."""

    def share(self, keyring):
        check, secagg_client.check_signature = secagg_client.check_signature, lambda *a: None
        try:
            return super().share(keyring)
        finally:
            secagg_client.check_signature = check


def man_in_the_middle(client) -> str:
    """The aggregator gives the victim keys of its own in place of the others'."""
    built = federation()
    vectors = built.vectors(2)
    clients = built.clients(client)
    adverts = {n: c.advertise() for n, c in clients.items()}
    mine = {n: X25519PrivateKey.generate() for n in OTHERS}
    seen = [adverts[VICTIM]]
    for name in OTHERS:
        public = mine[name].public_key().public_bytes_raw()
        old = adverts[name]
        seen.append(type(old)(name, public, public, old.seed_digest, old.signature))
    victim, session = clients[VICTIM], built.session
    keyring = Keyring(tuple(seen))
    try:
        sealed = {s.party: s.data for s in victim.share(keyring).shares}
    except PartyError:
        return "refused"
    # It opens the victim's shares, and seals some for it in the others' names.
    seeds, routed = {}, []
    for name in OTHERS:
        fake = client(CarelessIdentity(name, built.identities[name].key), session, built.roster)
        fake._secrets = secagg_client._Secrets(bytes(32), mine[name], mine[name])
        fake._near = {VICTIM: adverts[VICTIM]}
        seeds[session.point(name)] = fake._unseal(VICTIM, sealed[name])[0]
        share = secagg_client.SealedShare(name, fake._seal(VICTIM, bytes(33), bytes(33)))
        routed.append(share)
    update = np.frombuffer(victim.mask(RoutedShares(tuple(routed)), vectors[VICTIM]).words, "<u4")
    seed = secagg_server.shamir.restore(seeds, 3)
    update = update - secagg_client.self_mask(session, VICTIM, seed).words(update.size)
    for name in OTHERS:
        secret = secagg_client.shared_secret(mine[name], adverts[VICTIM].mask_key, party=VICTIM)
        update -= secagg_client.pair_mask(session, VICTIM, name, secret).words(update.size)
    return "revealed" if np.array_equal(update, vectors[VICTIM]) else "nothing"


def test_an_aggregator_in_the_middle_is_caught_by_signatures():
    assert man_in_the_middle(SecAggClient) == "refused"
    assert man_in_the_middle(TrustingClient) == "revealed"


def test_a_stranger_and_a_replayed_key_are_refused():
    built = federation()
    clients = built.clients()
    advert = clients[VICTIM].advertise()
    server = SecAggServer(replace(built.session, round_=2), built.roster)
    with pytest.raises(PartyError, match="is of another round"):
        server.take_keys(VICTIM, advert)
    roster = {n: k for n, k in built.roster.items() if n != VICTIM}
    with pytest.raises(PartyError, match="not in the roster"):
        SecAggServer(built.session, roster).take_keys(VICTIM, advert)
    with pytest.raises(PartyError, match="sent keys of"):
        SecAggServer(built.session, built.roster).take_keys(OTHERS[0], advert)


class UnboundClient(SecAggClient):
    """Broken: seals shares under nothing but the pair's secret."""

    def _sealing(self, other, sender, receiver):
        secret = secagg_client.shared_secret(
            self._secrets.share_key, self._near[other].share_key, party=other
        )
        return secret, b""


def replayed_share(client, change) -> str:
    """Shares that were sealed for another round, or another pair, are sent to the victim."""
    built = federation()
    sessions = [built.session, replace(built.session, round_=2)]
    secrets = {n: secagg_client._fresh() for n in built.identities}
    routed = []
    machines = []
    for session in sessions:
        clients = built.clients(client, session)
        for name, one in clients.items():
            # As if short-lived keys outlived their round: binding alone must tell rounds apart.
            one._secrets = secrets[name]
        keyring = Keyring(tuple(c.advertise() for c in clients.values()))
        server = SecAggServer(session, built.roster)
        for name, one in clients.items():
            server.take_keys(name, one.advertise())
        server.keyring()
        for name, one in clients.items():
            server.take_shares(name, one.share(keyring))
        routed.append(server.routed())
        machines.append(clients)
    message = change(routed, machines)
    try:
        machines[1][VICTIM].mask(message, np.zeros(16, np.uint32))
    except PartyError as error:
        return "refused" if "another round, sender or receiver" in str(error) else str(error)
    return "accepted"


def of_another_round(routed, machines):
    old, new = routed[0][VICTIM].shares, routed[1][VICTIM].shares
    return RoutedShares((old[0], *new[1:]))


def of_its_own(routed, machines):
    # What the victim sealed for another comes back as if the other had sealed it.
    client = machines[1][VICTIM]
    own = secagg_client.SealedShare(OTHERS[0], client._seal(OTHERS[0], bytes(33), bytes(33)))
    return RoutedShares((own, *routed[1][VICTIM].shares[1:]))


@pytest.mark.parametrize("change", [of_another_round, of_its_own])
def test_replayed_and_reflected_shares_are_refused(change):
    assert replayed_share(SecAggClient, change) == "refused"
    assert replayed_share(UnboundClient, change) == "accepted"


def test_shares_are_taken_once_and_from_neighbours_only():
    built = federation()
    clients = built.clients()
    server = SecAggServer(built.session, built.roster)
    for name, one in clients.items():
        server.take_keys(name, one.advertise())
    keyring = server.keyring()
    for name, one in clients.items():
        server.take_shares(name, one.share(keyring))
    share = server.routed()[VICTIM].shares[0]
    with pytest.raises(PartyError, match="came before"):
        clients[VICTIM].mask(RoutedShares((share, share)), np.zeros(16, np.uint32))


class UncheckedFixedPoint(FixedPoint):
    """Broken: no headroom."""

    def __post_init__(self) -> None:
        pass


def sum_of_the_largest(codec) -> str:
    """A hundred clients at the limit of a scale that 32 bits have no room for."""
    try:
        code = codec(1.0, 2.0**25, 100)
    except ShardparError:
        return "refused"
    words = code.encode(np.ones((100, 1), np.float32))
    total = code.decode(words.sum(axis=0, dtype=np.uint32))
    return "wrong" if abs(total[0] - 100) > 1e-3 else "right"


def test_sums_that_would_wrap_around_are_refused():
    assert sum_of_the_largest(FixedPoint) == "refused"
    assert sum_of_the_largest(UncheckedFixedPoint) == "wrong"


def test_wrong_shares_lose_the_round_instead_of_a_wrong_sum():
    built = federation()
    played = play(built, built.vectors(0), {})
    point = built.session.point(VICTIM)
    for shares in played.server._seeds.values():
        shares[point] = bytes(32) + b"\x01"
    with pytest.raises(RunError, match=r"cannot be restored|do not restore"):
        played.server.total()
