"""A client of a secure aggregation, as a state machine without input or output.

Bell et al., "Secure single-server aggregation with (poly)logarithmic overhead" (CCS 2020), with the
consistency check of Bonawitz et al., "Practical secure aggregation for privacy-preserving machine
learning" (CCS 2017). Each method takes what the aggregator sent and returns what to send back; one
that raises has revealed nothing, and the client must leave the round.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shardpar.errors import PartyError, RunError, SpecError
from shardpar.fl import shamir
from shardpar.fl.neighbours import neighbours_of
from shardpar.fl.secagg_messages import (
    AdvertiseKeys,
    Keyring,
    MaskedInput,
    RevealedShare,
    RoutedShares,
    SealedShare,
    ShareKeys,
    SignedSurvivors,
    Survivors,
    Unmask,
    UnmaskRequest,
)
from shardpar.fl.secagg_session import Identity, Roster, Session, check_signature
from shardpar.fl.streams import KeyStream, add_streams, derived_key, joined, shared_secret

NONCE_BYTES = 12
_SERVER = "the aggregator"


@dataclass(frozen=True)
class _Secrets:
    seed: bytes
    share_key: X25519PrivateKey
    mask_key: X25519PrivateKey


def _fresh() -> _Secrets:
    return _Secrets(os.urandom(32), X25519PrivateKey.generate(), X25519PrivateKey.generate())


@dataclass
class SecAggClient:
    """One client in one session; its methods are called in their order, each once.

    What the aggregator learns: who takes part and who drops out, the length of vectors, and the
    sum of at least `session.threshold` of them. Other clients learn the cohort and the survivors.

    Attributes:
      identity: its long-term key.
      session: what all parties agree on.
      roster: long-term public keys of the cohort, from somewhere else than the aggregator.
    """

    identity: Identity
    session: Session
    roster: Roster
    _secrets: _Secrets = field(default_factory=_fresh, repr=False)
    _advert: AdvertiseKeys | None = None
    _keyring: Keyring | None = None
    _near: dict[str, AdvertiseKeys] = field(default_factory=dict)
    _shares: dict[str, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)
    _masked: bool = False
    _survivors: tuple[str, ...] | None = None
    _answered: tuple[UnmaskRequest, Unmask] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Begins the session, which this party can do once.

        Raises:
          SpecError: this party is not of the cohort.
          RunError: it has begun this session before.
        """
        if self.party not in self.session.cohort:
            raise SpecError(f"{self.party} is not in the cohort {self.session.cohort}")
        self.identity.begin(self.session)

    @property
    def party(self) -> str:
        """Who this is."""
        return self.identity.party

    def advertise(self) -> AdvertiseKeys:
        """Phase 1: public keys for this round, signed."""
        if self._advert is None:
            secrets = self._secrets
            parts = (
                secrets.share_key.public_key().public_bytes_raw(),
                secrets.mask_key.public_key().public_bytes_raw(),
                hashlib.sha256(secrets.seed).digest(),
            )
            signature = self.identity.sign(self.session, "advertise", *parts)
            self._advert = AdvertiseKeys(self.party, *parts, signature)
        return self._advert

    def share(self, keyring: Keyring) -> ShareKeys:
        """Phase 2: shares of this client's seed and mask key, sealed for its neighbours.

        Raises:
          PartyError: the keys are not those of the cohort's clients, or too few.
          RunError: called twice, or before `advertise`.
        """
        if self._advert is None or self._keyring is not None:
            raise RunError("share() comes once, after advertise()")
        keys = checked_keys(self.session, self.roster, keyring)
        if keys.get(self.party) != self._advert:
            raise PartyError(
                f"{_SERVER} sent other keys of {self.party} than it advertised", party=_SERVER
            )
        self._keyring = keyring
        near = neighbours_of(tuple(keys), self.session.neighbours, keyring.digest())[self.party]
        self._near = {party: keys[party] for party in near}
        holders = (self.party, *near)
        points = {holder: self.session.point(holder) for holder in holders}
        needed = self.session.shares_needed(len(holders))
        seeds = shamir.split(self._secrets.seed, list(points.values()), needed)
        private = self._secrets.mask_key.private_bytes_raw()
        private_shares = shamir.split(private, list(points.values()), needed)
        pair = {h: (seeds[points[h]], private_shares[points[h]]) for h in holders}
        self._shares[self.party] = pair[self.party]
        return ShareKeys(tuple(SealedShare(to, self._seal(to, *pair[to])) for to in near))

    def mask(self, routed: RoutedShares, vector: np.ndarray) -> MaskedInput:
        """Phase 3: the vector plus this client's masks, modulo 2^32.

        Args:
          routed: the neighbours' shares; those whose shares are missing have dropped out.
          vector: uint32 [session.words]; see `packing`.

        Raises:
          PartyError: a share is not from this round, sender and receiver, or too few came.
          SpecError: the vector is not one that was agreed on.
          RunError: called twice, or before `share`.
        """
        if self._keyring is None or self._masked:
            raise RunError("mask() comes once, after share()")
        if vector.dtype != np.uint32 or vector.shape != (self.session.words,):
            raise SpecError(
                f"a vector of {vector.dtype} {vector.shape}; {self.session.label} adds up "
                f"uint32 ({self.session.words},)"
            )
        for sealed in routed.shares:
            sender = sealed.party
            if sender not in self._near or sender in self._shares:
                raise PartyError(
                    f"{_SERVER} sent shares of {sender}, who is no neighbour or came before",
                    party=_SERVER,
                )
            self._shares[sender] = self._unseal(sender, sealed.data)
        needed = self.session.shares_needed(len(self._near) + 1)
        if len(self._shares) < needed:
            raise PartyError(
                f"{len(self._shares)} of {len(self._near) + 1} clients shared keys with "
                f"{self.party}; masks that {needed} could not take off again would be lost",
                party=_SERVER,
            )
        self._masked = True
        total = vector.copy()
        plus, minus = [self_mask(self.session, self.party, self._secrets.seed)], []
        for other in self._shares:
            if other == self.party:
                continue
            stream = pair_mask(
                self.session,
                self.party,
                other,
                shared_secret(self._secrets.mask_key, self._near[other].mask_key, party=other),
            )
            (plus if self.party < other else minus).append(stream)
        add_streams(total, plus, minus)
        return MaskedInput(total.astype("<u4", copy=False).tobytes())

    def sign(self, survivors: Survivors) -> SignedSurvivors:
        """Phase 4: this client's word for whose vectors the sum is of.

        Raises:
          PartyError: too few survive, this client is not among them, or it has signed another set.
          RunError: called before `mask`.
        """
        if not self._masked or self._keyring is None:
            raise RunError("sign() comes after mask()")
        alive = survivors.parties
        cohort = [k.party for k in self._keyring.keys]
        _check_set(alive, cohort)
        if len(alive) < self.session.threshold:
            raise PartyError(
                f"{len(alive)} clients survive in {self.session.label}; their sum is not given "
                f"away below {self.session.threshold}",
                party=_SERVER,
            )
        if self.party not in alive:
            raise PartyError(f"{_SERVER} has left out {self.party}", party=_SERVER)
        silent = [p for p in alive if p in self._near and p not in self._shares]
        if silent:
            raise PartyError(f"{silent} survive, but never shared their keys", party=_SERVER)
        if self._survivors not in (None, alive):
            raise PartyError(f"{_SERVER} named different survivors before", party=_SERVER)
        self._survivors = alive
        return SignedSurvivors(
            self.identity.sign(self.session, "survivors", self._keyring.digest(), *alive)
        )

    def unmask(self, request: UnmaskRequest) -> Unmask:
        """Phase 5: of each neighbour a share of its seed if it survives, of its key if not.

        Raises:
          PartyError: the request would reveal both of someone, names others than were signed, lacks
            signatures, or differs from an earlier one.
          RunError: called before `sign`.
        """
        if self._survivors is None or self._keyring is None:
            raise RunError("unmask() comes after sign()")
        if self._answered is not None:
            if self._answered[0] != request:
                raise PartyError(f"{_SERVER} asked twice, differently", party=_SERVER)
            return self._answered[1]
        both = sorted(set(request.alive) & set(request.dead))
        if both:
            raise PartyError(
                f"{_SERVER} asked for the seed and the key of {both}, which would reveal their "
                "updates",
                party=_SERVER,
            )
        if request.alive != self._survivors:
            raise PartyError(f"{_SERVER} asked about others than the survivors", party=_SERVER)
        _check_set(request.dead, [k.party for k in self._keyring.keys])
        self._check_signatures(request)
        alive, dead = set(request.alive), set(request.dead)
        answer = Unmask(
            tuple(RevealedShare(p, s[0]) for p, s in self._shares.items() if p in alive),
            tuple(RevealedShare(p, s[1]) for p, s in self._shares.items() if p in dead),
        )
        self._answered = (request, answer)
        return answer

    def _check_signatures(self, request: UnmaskRequest) -> None:
        assert self._keyring is not None
        signers = [signed.party for signed in request.signatures]
        if len(set(signers)) != len(signers) or not set(signers) <= set(request.alive):
            raise PartyError(f"{_SERVER} sent signatures of {signers}", party=_SERVER)
        if len(signers) < self.session.threshold:
            raise PartyError(
                f"{len(signers)} clients signed the survivors; it takes {self.session.threshold}",
                party=_SERVER,
            )
        digest = self._keyring.digest()
        for signed in request.signatures:
            check_signature(
                self.roster,
                signed.party,
                signed.signature,
                self.session,
                "survivors",
                digest,
                *request.alive,
            )

    def _seal(self, to: str, seed: bytes, private: bytes) -> bytes:
        key, bound = self._sealing(to, self.party, to)
        nonce = os.urandom(NONCE_BYTES)
        return nonce + AESGCM(key).encrypt(nonce, seed + private, bound)

    def _unseal(self, sender: str, data: bytes) -> tuple[bytes, bytes]:
        key, bound = self._sealing(sender, sender, self.party)
        try:
            pair = AESGCM(key).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], bound)
        except InvalidTag:
            raise PartyError(
                f"what came as shares of {sender} for {self.party} is of another round, sender or "
                "receiver, or was changed on its way",
                party=sender,
            ) from None
        return pair[: shamir.SHARE_BYTES], pair[shamir.SHARE_BYTES :]

    def _sealing(self, other: str, sender: str, receiver: str) -> tuple[bytes, bytes]:
        secret = shared_secret(self._secrets.share_key, self._near[other].share_key, party=other)
        round_ = f"{self.session.round_}.{self.session.attempt}"
        key = derived_key(
            secret,
            job=self.session.job,
            round_=round_,
            first=sender,
            second=receiver,
            purpose="shares",
        )
        return key, joined(self.session.digest, sender, receiver)


def checked_keys(session: Session, roster: Roster, keyring: Keyring) -> dict[str, AdvertiseKeys]:
    """The keys of those who take part, in the cohort's order.

    Raises:
      PartyError: a key is not signed by its party, someone is not of the cohort or comes twice, or
        there are fewer than the threshold.
    """
    _check_set(tuple(k.party for k in keyring.keys), list(session.cohort))
    if len(keyring.keys) < session.threshold:
        raise PartyError(
            f"{len(keyring.keys)} clients take part in {session.label}; it takes "
            f"{session.threshold}",
            party=_SERVER,
        )
    for key in keyring.keys:
        check_signature(roster, key.party, key.signature, session, "advertise", *key.signed())
    return {key.party: key for key in keyring.keys}


def self_mask(session: Session, party: str, seed: bytes) -> KeyStream:
    """The mask that is taken off when the party survives."""
    return KeyStream(_mask_key(session, seed, party, party, "self mask"))


def pair_mask(session: Session, one: str, other: str, secret: bytes) -> KeyStream:
    """The mask that the first of two parties adds and the second subtracts."""
    first, second = sorted((one, other))
    return KeyStream(_mask_key(session, secret, first, second, "pair mask"))


def _mask_key(session: Session, secret: bytes, first: str, second: str, purpose: str) -> bytes:
    return derived_key(
        secret,
        job=session.job,
        round_=f"{session.round_}.{session.attempt}",
        first=first,
        second=second,
        purpose=purpose,
    )


def _check_set(parties: tuple[str, ...], among: list[str]) -> None:
    order = [p for p in among if p in set(parties)]
    if list(parties) != order:
        raise PartyError(
            f"{_SERVER} named {parties[:20]}, which is not a subset of {among[:20]} in order",
            party=_SERVER,
        )
