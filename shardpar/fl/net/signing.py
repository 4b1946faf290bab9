"""Reads the long-term signing keys by which parties know each other's messages (Ed25519).

A certificate proves a party to whoever it is connected with. In secure aggregation and in a ring,
messages pass through others' hands, so each is signed, and public halves are exchanged beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from shardpar.errors import UserError
from shardpar.fl.secagg_session import Identity


def read_identity(directory: Path, party: str) -> Identity:
    """A party's private signing key, `NAME.sign.key`.

    Raises:
      UserError: the file is missing or no Ed25519 key.
    """
    path = directory / f"{party}.sign.key"
    try:
        key = load_pem_private_key(_content(path), password=None)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no private key without a password: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(
            f"{path} is no Ed25519 key; make one with: openssl genpkey -algorithm ed25519"
        )
    return Identity(party, key)


def read_roster(directory: Path, parties: Iterable[str]) -> dict[str, Ed25519PublicKey]:
    """The public signing keys of some parties, `NAME.sign.pub` each.

    Raises:
      UserError: a file is missing or no Ed25519 key; names it.
    """
    roster = {}
    for party in parties:
        path = directory / f"{party}.sign.pub"
        try:
            key = load_pem_public_key(_content(path))
        except ValueError as error:
            raise UserError(f"{path} is no public key: {error}") from None
        if not isinstance(key, Ed25519PublicKey):
            raise UserError(f"{path} is no Ed25519 key")
        roster[party] = key
    return roster


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; secure aggregation and rings need the signing key of this "
            "party and the public ones of all (test keys: shardpar fl keys)"
        ) from None
