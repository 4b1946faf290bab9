"""Parties on this machine for tests: keys of a test PKI, limits in fractions of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardpar.fl.messages import Message
from shardpar.fl.net.grpc_channel import GrpcChannel
from shardpar.fl.net.keys import PartyKeys, read_keys
from shardpar.fl.net.limits import Limits

PARTIES = ("agg", "a", "b")
JOB = "job"
HERE = "127.0.0.1:0"
QUICK = Limits(
    beat_s=0.2,
    silence_s=1.0,
    patience_s=3.0,
    join_s=6.0,
    receive_s=20.0,
    flush_s=5.0,
    first_retry_s=0.05,
    longest_retry_s=0.2,
    max_message_bytes=1 << 27,
    window_bytes=1 << 28,
)


class Note(Message):
    """What parties send each other here."""

    text: str
    data: bytes = b""


def listening(directory: Path | None, party: str = "agg", **changes) -> GrpcChannel:
    """A party that waits to be dialled."""
    keys = _keys(directory, party, changes)
    given = {"job": JOB, "keys": keys, "listen": HERE, "limits": QUICK}
    return GrpcChannel.open(party, changes.pop("order", None) or PARTIES, **{**given, **changes})


def dialling(
    directory: Path | None, party: str, address: str | None, *, peer: str = "agg", **changes
) -> GrpcChannel:
    """A party that dials one other."""
    assert address is not None
    keys = _keys(directory, party, changes)
    given = {"job": JOB, "keys": keys, "dial": {peer: address}, "limits": QUICK}
    return GrpcChannel.open(party, changes.pop("order", None) or PARTIES, **{**given, **changes})


def _keys(directory: Path | None, party: str, changes: dict[str, Any]) -> PartyKeys:
    if directory is not None:
        return read_keys(directory, party)
    return changes.pop("keys")
