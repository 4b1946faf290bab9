"""What clients and aggregator say to each other in a secure aggregation, phase by phase."""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
from msgspec import Meta

from shardpar.fl.messages import Message
from shardpar.fl.shamir import SHARE_BYTES
from shardpar.fl.streams import joined

Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Share = Annotated[bytes, Meta(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
# Two shares, a nonce of 12 bytes and a tag of 16.
Sealed = Annotated[bytes, Meta(min_length=2 * SHARE_BYTES + 28, max_length=2 * SHARE_BYTES + 28)]
Name = Annotated[str, Meta(max_length=256)]


class AdvertiseKeys(Message):
    """Client to aggregator to all: keys of this round alone, signed by the long-term key.

    Attributes:
      party: whose.
      share_key: X25519, under which shares are sent to it.
      mask_key: X25519, from which masks are derived.
      seed_digest: SHA-256 of the seed of its self-mask.
      signature: of all of it.
    """

    party: Name
    share_key: Key
    mask_key: Key
    seed_digest: Key
    signature: Signature

    def signed(self) -> tuple[bytes, ...]:
        """What the signature is of."""
        return (self.share_key, self.mask_key, self.seed_digest)


class Keyring(Message):
    """Aggregator to clients: everyone who will take part, in the cohort's order."""

    keys: tuple[AdvertiseKeys, ...]

    def digest(self) -> bytes:
        """Of all keys: what the graph of neighbours follows from."""
        parts = [part for k in self.keys for part in (k.party, *k.signed())]
        return hashlib.sha256(joined(*parts)).digest()


class SealedShare(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shares of a client's two secrets, encrypted for one neighbour.

    Attributes:
      party: the other end: the receiver on the way to the aggregator, the sender on the way on.
      data: nonce and ciphertext.
    """

    party: Name
    data: Sealed


class ShareKeys(Message):
    """Client to aggregator: one sealed share for each neighbour."""

    shares: tuple[SealedShare, ...]


class RoutedShares(Message):
    """Aggregator to client: what its neighbours sealed for it."""

    shares: tuple[SealedShare, ...]


class MaskedInput(Message):
    """Client to aggregator: its vector under masks, little-endian uint32."""

    words: bytes


class Survivors(Message):
    """Aggregator to clients: whose masked vectors it has, in the cohort's order."""

    parties: tuple[Name, ...]


class SignedSurvivors(Message):
    """Client to aggregator: its signature of the survivors."""

    signature: Signature


class PartySignature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One client's signature of the survivors."""

    party: Name
    signature: Signature


class UnmaskRequest(Message):
    """Aggregator to clients: whose self-masks and whose keys it asks for.

    Attributes:
      alive: the survivors; their self-masks are to be taken off.
      dead: those who shared keys but sent no vector; their masks with others are to be taken off.
      signatures: by which each client sees that the others were asked the same.
    """

    alive: tuple[Name, ...]
    dead: tuple[Name, ...]
    signatures: tuple[PartySignature, ...]


class RevealedShare(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A share of one of a party's secrets."""

    party: Name
    share: Share


class Unmask(Message):
    """Client to aggregator: shares of its neighbours' secrets, one of the two for each."""

    seeds: tuple[RevealedShare, ...]
    keys: tuple[RevealedShare, ...]


class Aborted(Message):
    """Aggregator to clients: the round is given up, and why."""

    reason: Annotated[str, Meta(max_length=4096)]


class ToClient(Message):
    """Whatever the aggregator says; a client may be told at any point that the round is over."""

    body: Keyring | RoutedShares | Survivors | UnmaskRequest | Aborted
