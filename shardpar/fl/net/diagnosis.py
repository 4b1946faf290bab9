"""Explains why a connection failed, where gRPC only says that a peer is unavailable.

It repeats the first steps of a connection with Python's own `ssl`, which says what went wrong.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shardpar.fl.net.addresses import split_address
from shardpar.fl.net.keys import PartyKeys, fault_of, tls_name

_GRACE_S = 1.0
_SUSPICIOUS_AFTER = 5


@dataclass(frozen=True)
class Diagnosis:
    """Why a peer cannot be spoken with.

    Attributes:
      reason: for people.
      lasting_after: after how many attempts alike only a person can put it right; None for never.
    """

    reason: str
    lasting_after: int | None = None


def diagnose(address: str, peer: str, keys: PartyKeys, timeout_s: float = 3.0) -> Diagnosis | None:
    """Connects and shakes hands; None if that works.

    Args:
      address: "host:port" of the peer.
      peer: whom its certificate must name.
      keys: of this party.
      timeout_s: for each step.
    """
    try:
        with socket.create_connection(split_address(address), timeout=timeout_s) as plain:
            return _shake_hands(plain, address, peer, keys)
    except socket.gaierror as error:
        return Diagnosis(f"the host of {address} is not known: {error.strerror}")
    except ConnectionRefusedError:
        return Diagnosis(f"nothing listens at {address}")
    except OSError as error:
        return Diagnosis(f"{address} cannot be reached: {error}")


def _shake_hands(
    plain: socket.socket, address: str, peer: str, keys: PartyKeys
) -> Diagnosis | None:
    context = ssl.create_default_context(cadata=keys.ca.decode("ascii", "replace"))
    context.set_alpn_protocols(["h2"])
    shown = _show_certificate(context, keys)
    try:
        with context.wrap_socket(plain, server_hostname=tls_name(peer)) as secured:
            # In TLS 1.3 a server judges the client's certificate after the client is done. One that
            # accepts it begins to speak HTTP/2; gRPC's closes, without saying why, if it does not.
            secured.settimeout(_GRACE_S)
            accepted = _speaks(secured)
    except ssl.SSLCertVerificationError as error:
        return Diagnosis(
            f"who answers at {address} cannot show that it is {peer}: {error.verify_message}", 1
        )
    except ssl.SSLError as error:
        if "WRONG_VERSION" in (error.reason or ""):
            return Diagnosis(f"who answers at {address} does not speak TLS", 1)
        return Diagnosis(f"the TLS handshake with {address} failed: {error}")
    if accepted or not shown:
        return None
    refuses = f"{peer} at {address} does not accept the certificate of {keys.party}"
    fault = fault_of(keys)
    if fault:
        return Diagnosis(f"{refuses}: {fault}", 1)
    return Diagnosis(
        f"{refuses}: see that ca.pem of {peer} holds the authority that issued it, and that the "
        "clocks are right",
        _SUSPICIOUS_AFTER,
    )


def _speaks(secured: ssl.SSLSocket) -> bool:
    try:
        return bool(secured.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False


def _show_certificate(context: ssl.SSLContext, keys: PartyKeys) -> bool:
    """Loads a party's certificate, which `ssl` takes from files only: they stay in memory."""
    if not hasattr(os, "memfd_create"):
        return False
    with _memory_file(keys.certificate) as certificate, _memory_file(keys.key) as key:
        context.load_cert_chain(certificate, key)
    return True


@contextmanager
def _memory_file(content: bytes) -> Iterator[str]:
    descriptor = os.memfd_create("pem")
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
