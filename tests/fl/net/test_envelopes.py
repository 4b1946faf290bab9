"""What a peer sends arrives once, in order and whole, or is refused: checked on mutants too."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import PartyError
from shardpar.fl.messages import decode, encode
from shardpar.fl.net.envelopes import PART_BYTES, Assembly, Envelope, envelopes_of

LINK = {"job": "j", "sender": "a", "receiver": "b"}


def assembly(limit: int = 1 << 24) -> Assembly:
    return Assembly(**LINK, max_message_bytes=limit)


def parts(data: bytes, sequence: int = 1, **changes) -> list[Envelope]:
    made = envelopes_of(data, **{**LINK, **changes}, topic="t", sequence=sequence)
    return [decode(encode(envelope), Envelope) for envelope in made]


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 5 * PART_BYTES + 3])
def test_messages_arrive_whole_and_in_order(size):
    end = assembly()
    for sequence in (1, 2):
        data = bytes([sequence]) * size
        taken = [end.add(envelope) for envelope in parts(data, sequence)]
        assert taken[:-1] == [None] * (len(taken) - 1)
        assert taken[-1] == ("t", data)
    assert end.received == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"job": "other"}, "job"),
        ({"sender": "c"}, "from 'c'"),
        ({"receiver": "c"}, "to 'c'"),
        ({"sequence": 3}, "instead of"),
        ({"part": 1}, "instead of"),
        ({"size_bytes": 2**60}, "at most"),
        ({"size_bytes": -1}, "at most"),
        ({"parts": 7}, "declares 7 parts"),
        ({"payload": b"longer than declared"}, "are left"),
        ({"payload": b"xyz"}, "hash"),
        ({"topic": "t" * 201}, "too long"),
    ],
)
def test_a_wrong_envelope_is_refused(changes, words):
    with pytest.raises(PartyError, match=words):
        assembly().add(msgspec.structs.replace(parts(b"abc")[0], **changes))


def test_a_replayed_envelope_is_refused():
    end = assembly()
    (envelope,) = parts(b"abc")
    assert end.add(envelope) == ("t", b"abc")
    with pytest.raises(PartyError, match="replayed message 1"):
        end.add(envelope)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 200), st.integers(0, 255))
def test_mutants_are_taken_or_refused(data, at, byte):
    raw = bytearray(encode(parts(data)[0]))
    raw[at % len(raw)] = byte
    end = assembly()
    try:
        taken = end.add(decode(bytes(raw), Envelope))
    except PartyError:
        return
    # Only the topic is outside the hash; TLS guards it.
    assert taken is not None
    assert taken[1] == data
