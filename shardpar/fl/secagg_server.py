"""The aggregator of a secure aggregation, as a state machine without input or output.

It adds up masked vectors as they come, keeps none of them, and takes the masks off the sum alone.
`secagg_client` names the papers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shardpar.errors import PartyError, RunError
from shardpar.fl import shamir
from shardpar.fl.neighbours import neighbours_of
from shardpar.fl.secagg_client import checked_keys, pair_mask, self_mask
from shardpar.fl.secagg_messages import (
    AdvertiseKeys,
    Keyring,
    MaskedInput,
    PartySignature,
    RoutedShares,
    SealedShare,
    ShareKeys,
    SignedSurvivors,
    Survivors,
    Unmask,
    UnmaskRequest,
)
from shardpar.fl.secagg_session import Roster, Session, check_signature
from shardpar.fl.streams import KeyStream, add_streams, shared_secret


@dataclass
class SecAggServer:
    """The aggregator in one session.

    For each phase, `take_*` is called with each client's message and raises `PartyError` if that
    client is to be dropped; then the phase's other method closes it and says what to send. A client
    that has not been heard when a phase closes has dropped out.

    Attributes:
      session: what all parties agree on.
      roster: long-term public keys of the cohort.
    """

    session: Session
    roster: Roster
    _adverts: dict[str, AdvertiseKeys] = field(default_factory=dict)
    _keys: dict[str, AdvertiseKeys] = field(default_factory=dict)
    _keyring: Keyring | None = None
    _near: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _sealed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    _total: np.ndarray | None = None
    _masked: set[str] = field(default_factory=set)
    _survivors: tuple[str, ...] = ()
    _signatures: dict[str, bytes] = field(default_factory=dict)
    _seeds: dict[str, dict[int, bytes]] = field(default_factory=dict)
    _privates: dict[str, dict[int, bytes]] = field(default_factory=dict)

    def take_keys(self, party: str, message: AdvertiseKeys) -> None:
        """Phase 1, of one client."""
        if message.party != party or party not in self.session.cohort or party in self._adverts:
            raise PartyError(f"{party} sent keys of {message.party}, or twice", party=party)
        check_signature(
            self.roster, party, message.signature, self.session, "advertise", *message.signed()
        )
        self._adverts[party] = message

    def keyring(self) -> Keyring:
        """Ends phase 1: everyone's keys, for everyone.

        Raises:
          RunError: too few clients are left, as in the other phases.
        """
        self._enough(self._adverts, "sent keys")
        parties = [p for p in self.session.cohort if p in self._adverts]
        self._keyring = Keyring(tuple(self._adverts[p] for p in parties))
        self._keys = checked_keys(self.session, self.roster, self._keyring)
        self._near = neighbours_of(
            tuple(self._keys), self.session.neighbours, self._keyring.digest()
        )
        return self._keyring

    def take_shares(self, party: str, message: ShareKeys) -> None:
        """Phase 2, of one client."""
        near = self._near.get(party, ())
        if party in self._sealed or tuple(s.party for s in message.shares) != near:
            raise PartyError(f"{party} shared with others than {near}, or twice", party=party)
        self._sealed[party] = {s.party: s.data for s in message.shares}

    def routed(self) -> dict[str, RoutedShares]:
        """Ends phase 2: for each client that is left, what its neighbours sealed for it."""
        self._enough(self._sealed, "shared their keys")
        self._total = np.zeros(self.session.words, np.uint32)
        return {
            party: RoutedShares(
                tuple(
                    SealedShare(sender, self._sealed[sender][party])
                    for sender in self._near[party]
                    if sender in self._sealed
                )
            )
            for party in self._sealed
        }

    def take_masked(self, party: str, message: MaskedInput) -> None:
        """Phase 3, of one client; its vector is added and forgotten."""
        if self._total is None:
            raise RunError("take_masked() comes after routed()")
        if party not in self._sealed or party in self._masked:
            raise PartyError(f"{party} sent a vector without shares, or twice", party=party)
        if len(message.words) != 4 * self.session.words:
            raise PartyError(
                f"{party} sent {len(message.words)} bytes; {self.session.words} words were agreed",
                party=party,
            )
        self._masked.add(party)
        self._total += np.frombuffer(message.words, "<u4")

    def survivors(self) -> Survivors:
        """Ends phase 3: whose vectors are in the sum."""
        self._enough(self._masked, "sent a masked vector")
        self._survivors = tuple(p for p in self.session.cohort if p in self._masked)
        return Survivors(self._survivors)

    def take_signature(self, party: str, message: SignedSurvivors) -> None:
        """Phase 4, of one client."""
        if party not in self._survivors or self._keyring is None:
            raise PartyError(f"{party} signed survivors that it is not among", party=party)
        check_signature(
            self.roster,
            party,
            message.signature,
            self.session,
            "survivors",
            self._keyring.digest(),
            *self._survivors,
        )
        self._signatures[party] = message.signature

    def request(self) -> UnmaskRequest:
        """Ends phase 4: what to unmask."""
        self._enough(self._signatures, "signed the survivors")
        dead = tuple(
            p for p in self.session.cohort if p in self._sealed and p not in self._survivors
        )
        signatures = tuple(PartySignature(p, s) for p, s in self._signatures.items())
        return UnmaskRequest(self._survivors, dead, signatures)

    def take_unmask(self, party: str, message: Unmask) -> None:
        """Phase 5, of one client."""
        if party not in self._survivors:
            raise PartyError(f"{party} answered what it was not asked", party=party)
        point = self.session.point(party)
        held = {party, *self._near[party]} & set(self._sealed)
        alive = {share.party for share in message.seeds}
        dead = {share.party for share in message.keys}
        if alive != held & set(self._survivors) or dead != held - set(self._survivors):
            raise PartyError(f"{party} sent shares of {sorted(alive | dead)}", party=party)
        for share in message.seeds:
            self._seeds.setdefault(share.party, {})[point] = share.share
        for share in message.keys:
            self._privates.setdefault(share.party, {})[point] = share.share

    def total(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """Ends phase 5: (the sum, uint32 [words]; whose it is of).

        Raises:
          RunError: too few shares of someone's secret came, or they are wrong.
        """
        if self._total is None:
            raise RunError("total() comes after all phases")
        plus: list[KeyStream] = []
        minus: list[KeyStream] = []
        for party in self._survivors:
            seed = self._restored(party, self._seeds, "seed")
            if hashlib.sha256(seed).digest() != self._keys[party].seed_digest:
                raise RunError(f"the shares of {party}'s seed do not restore what it announced")
            minus.append(self_mask(self.session, party, seed))
        for party in self._sealed:
            # Whom no survivor shares a mask with has left nothing in the sum.
            near = [other for other in self._near[party] if other in self._masked]
            if party in self._masked or not near:
                continue
            private = X25519PrivateKey.from_private_bytes(
                self._restored(party, self._privates, "key")
            )
            if private.public_key().public_bytes_raw() != self._keys[party].mask_key:
                raise RunError(f"the shares of {party}'s key do not restore what it announced")
            for other in near:
                secret = shared_secret(private, self._keys[other].mask_key, party=other)
                stream = pair_mask(self.session, party, other, secret)
                # The survivor added it if it comes first, and subtracted it if not.
                (minus if other < party else plus).append(stream)
        add_streams(self._total, plus, minus)
        total, self._total = self._total, None
        return total, self._survivors

    def _restored(self, party: str, shares: dict[str, dict[int, bytes]], what: str) -> bytes:
        needed = self.session.shares_needed(len(self._near[party]) + 1)
        try:
            return shamir.restore(shares.get(party, {}), needed)
        except ValueError as error:
            raise RunError(
                f"{self.session.label} is lost: the {what} of {party} cannot be restored: {error}"
            ) from None

    def _enough(self, parties: dict[str, object] | dict[str, bytes] | set[str], did: str) -> None:
        if len(parties) < self.session.threshold:
            raise RunError(
                f"{len(parties)} of {len(self.session.cohort)} clients {did} in "
                f"{self.session.label}; it takes {self.session.threshold}. Wait longer, or lower "
                "the threshold"
            )
