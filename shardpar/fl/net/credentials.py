"""TLS for gRPC: both ends show certificates of an authority that the other trusts.

gRPC's own defaults would let clients in without a certificate and two servers share one port.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from shardpar.fl.net.frames import FRAME_BYTES
from shardpar.fl.net.keys import PartyKeys, party_of, tls_name

SERVICE, METHOD = "shardpar.fl.Link", "Converse"
_STREAMS = 8
_HANDSHAKE_MS = 10_000

Options = list[tuple[str, object]]


def listening_credentials(keys: PartyKeys) -> grpc.ServerCredentials:
    """Of a listener: whoever shows no certificate of its authority is not let in."""
    return grpc.ssl_server_credentials(
        [(keys.key, keys.certificate)], root_certificates=keys.ca, require_client_auth=True
    )


def dialling_credentials(keys: PartyKeys) -> grpc.ChannelCredentials:
    """Of a dialler."""
    return grpc.ssl_channel_credentials(keys.ca, keys.key, keys.certificate)


def listening_options() -> Options:
    """A listener's: one process per port, and little memory for those who have said nothing yet."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", FRAME_BYTES),
        ("grpc.max_send_message_length", FRAME_BYTES),
        ("grpc.max_concurrent_streams", _STREAMS),
        ("grpc.max_metadata_size", 1 << 13),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
    ]


def dialling_options(peer: str) -> Options:
    """A dialler's: the certificate must name the peer, whatever host it was found at."""
    return [
        ("grpc.ssl_target_name_override", tls_name(peer)),
        ("grpc.max_receive_message_length", FRAME_BYTES),
        ("grpc.max_send_message_length", FRAME_BYTES),
        # Each attempt is a connection of its own; `dialler` decides when to try again.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        # Parties dial each other, never through a proxy that the environment happens to name.
        ("grpc.enable_http_proxy", 0),
    ]


def party_behind(context: grpc.ServicerContext) -> str | None:
    """The party that the certificate of a caller names; None without one, or if it names none."""
    auth: Mapping[str, list[bytes]] = context.auth_context()
    certificates = auth.get("x509_pem_cert", [])
    return party_of(certificates[0]) if len(certificates) == 1 else None
