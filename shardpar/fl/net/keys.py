"""Decides who a party is on the network: what its certificate must say, and a PKI for tests.

A certificate names its party twice. The URI `shardpar://party/NAME` is what a server reads; the
DNS name `NAME.party.shardpar` is what a dialler lets TLS itself check, because gRPC's clients match
DNS names and addresses only. (RFC 5280, section 4.2.1.6, says what such names may be.)
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shardpar.errors import UserError

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_URI = "shardpar://party/"


@dataclass(frozen=True)
class PartyKeys:
    """What one party proves itself with, in PEM.

    Attributes:
      party: its name.
      ca: certificates of the authorities that it trusts.
      certificate: its own.
      key: the private key of that certificate.
    """

    party: str
    ca: bytes
    certificate: bytes
    key: bytes


def require_name(party: str) -> str:
    """A party's name, which is a DNS label.

    Raises:
      UserError: it is not one.

    >>> require_name("hospital-a")
    'hospital-a'
    """
    if not _LABEL.fullmatch(party):
        raise UserError(
            f"{party!r} cannot name a party: use up to 63 of a-z, 0-9 and '-', such as 'hospital-a'"
        )
    return party


def tls_name(party: str) -> str:
    """The DNS name that a party's certificate must hold.

    >>> tls_name("a")
    'a.party.shardpar'
    """
    return f"{party}.party.shardpar"


def party_of(certificate: bytes) -> str | None:
    """The party that a PEM certificate names, or None if it names none, or several."""
    try:
        loaded = x509.load_pem_x509_certificate(certificate)
        names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    found = [uri.removeprefix(_URI) for uri in uris if uri.startswith(_URI)]
    return found[0] if len(found) == 1 and _LABEL.fullmatch(found[0]) else None


def make_test_keys(
    directory: Path,
    parties: Sequence[str],
    *,
    addresses: Sequence[str] = (),
    valid_days: float = 30.0,
    force: bool = False,
) -> None:
    """Writes a test PKI: an authority, and a certificate and a signing key of each party.

    One process holds every private key here, so it is for tests only.

    Args:
      directory: gets `ca.pem` and, for each party, `NAME.pem`, `NAME.key`, `NAME.sign.key` and
        `NAME.sign.pub`; nobody but its owner may read them.
      parties: their names.
      addresses: host names and IP addresses to put into the certificates beside localhost.
      valid_days: from now; a negative number makes certificates that have expired.
      force: replace keys that are there.

    Raises:
      UserError: a name is no DNS label or is given twice, or keys are there.
    """
    for party in parties:
        require_name(party)
    if len(set(parties)) != len(parties) or not parties:
        raise UserError(f"the parties {list(parties)} must be at least one, each named once")
    if not force and directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty; choose another directory, or add --force")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    now = datetime.now(UTC)
    begin = min(now, now + timedelta(days=valid_days)) - timedelta(days=1)
    end = now + timedelta(days=valid_days)
    authority = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shardpar test CA")])
    ca = (
        _builder(name, name, authority.public_key(), begin, now + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority, hashes.SHA256())
    )
    _write(directory / "ca.pem", ca.public_bytes(serialization.Encoding.PEM))
    hosts = [_general_name(address) for address in ("localhost", "127.0.0.1", "::1", *addresses)]
    for party in parties:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, party)])
        alternative = [
            x509.UniformResourceIdentifier(_URI + party), x509.DNSName(tls_name(party)), *hosts
        ]  # fmt: skip
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _builder(subject, name, key.public_key(), begin, end)
            .add_extension(x509.SubjectAlternativeName(alternative), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .sign(authority, hashes.SHA256())
        )
        _write(directory / f"{party}.pem", certificate.public_bytes(serialization.Encoding.PEM))
        _write(directory / f"{party}.key", _private(key))
        signer = ed25519.Ed25519PrivateKey.generate()
        _write(directory / f"{party}.sign.key", _private(signer))
        public = signer.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        _write(directory / f"{party}.sign.pub", public)


def read_keys(directory: Path, party: str) -> PartyKeys:
    """A party's keys, refused before anything is dialled if they cannot work.

    Raises:
      UserError: a file is missing, or the certificate is not this party's, not the authority's,
        or not valid now; says which.
    """
    parts = []
    for name in ("ca.pem", f"{party}.pem", f"{party}.key"):
        try:
            parts.append((directory / name).read_bytes())
        except OSError as error:
            raise UserError(
                f"{directory / name}: {error.strerror}; make test keys with: shardpar fl keys "
                f"{directory} --party {party}"
            ) from None
    keys = PartyKeys(party, *parts)
    fault = fault_of(keys)
    if fault:
        raise UserError(f"{directory / f'{party}.pem'}: {fault}")
    return keys


def fault_of(keys: PartyKeys) -> str | None:
    """Why a party's keys cannot work, for people, or None."""
    party = keys.party
    try:
        authorities = x509.load_pem_x509_certificates(keys.ca)
        certificate = x509.load_pem_x509_certificate(keys.certificate)
    except ValueError as error:
        return f"the certificate of {party} or of its authority cannot be read: {error}"
    if party_of(keys.certificate) != party:
        return f"it is not the certificate of {party}: it lacks {_URI}{party}"
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        return f"it has expired at {certificate.not_valid_after_utc:%F %T} UTC"
    if now < certificate.not_valid_before_utc:
        return f"it is valid only from {certificate.not_valid_before_utc:%F %T} UTC"
    if not any(_issued(certificate, authority) for authority in authorities):
        return "it was not issued by an authority in ca.pem"
    return None


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _builder(
    subject: x509.Name, issuer: x509.Name, key: object, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)  # type: ignore[arg-type]
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def _private(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
