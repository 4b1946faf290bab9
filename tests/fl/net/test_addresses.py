"""Of every two parties exactly one dials; addresses and limits that cannot be are explained."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.errors import ConfigError, UserError
from shardpar.fl.net.addresses import dialled, require_address, split_address
from shardpar.fl.net.diagnosis import diagnose
from shardpar.fl.net.dialler import pause_s
from shardpar.fl.net.limits import Limits
from tests.fl.net.authority import Authority

NAMES = st.lists(st.sampled_from([f"p{n}" for n in range(9)]), min_size=1, unique=True)


@given(NAMES, st.booleans(), st.data())
def test_of_two_parties_one_dials(parties, coordinated, data):
    aggregator = data.draw(st.sampled_from(parties)) if coordinated else None
    where = {name: f"host:{at}" for at, name in enumerate(parties)}
    pairs = [
        frozenset({party, peer})
        for party in parties
        for peer in dialled(party, parties, where, aggregator=aggregator)
    ]
    expected = {
        frozenset({one, other})
        for one in parties
        for other in parties
        if one != other and (aggregator is None or aggregator in (one, other))
    }
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected


def test_who_is_missing_is_named():
    with pytest.raises(UserError, match="c dials b, whose address is not given"):
        dialled("c", ("a", "b", "c"), {"a": "h:1"})
    with pytest.raises(UserError, match="'d' is not one of the parties a, b"):
        dialled("a", ("a", "b"), {}, aggregator="d")
    with pytest.raises(UserError, match="the address of a is 'nowhere'"):
        dialled("b", ("a", "b"), {"a": "nowhere"})


@pytest.mark.parametrize(
    "address", ["", "host", ":1", "host:", "host:x", "host:65536", "host:-1", "::1:80", "host:١"]
)
def test_what_is_no_address(address):
    with pytest.raises(UserError, match="write host:port"):
        require_address(address, of="a")


@pytest.mark.parametrize("address", ["a.example:1", "10.0.0.1:65535", "[::1]:0"])
def test_what_is_an_address(address):
    host, port = split_address(require_address(address, of="a"))
    assert f"{host}:{port}" == address.replace("[", "").replace("]", "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patience_s": 0.0}, "patience_s = 0.0 must be more than 0"),
        ({"receive_s": float("nan")}, "receive_s = nan must be more"),
        ({"beat_s": 30.0}, "silence_s = 20 must be longer than beat_s = 30"),
        ({"max_message_bytes": 1 << 29}, "at least twice max_message_bytes"),
    ],
)
def test_limits_that_contradict_themselves(changes, words):
    with pytest.raises(ConfigError, match=words):
        replace(Limits(), **changes)


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_pauses_grow_to_a_limit_and_are_never_nothing(attempt, draw):
    limits = Limits(first_retry_s=0.1, longest_retry_s=5.0)
    pause = pause_s(attempt, limits, draw)
    assert 0.05 <= pause <= 5.0
    assert pause_s(attempt + 1, limits, draw) >= pause


def test_a_host_that_nobody_knows_is_said_to_be_so():
    found = diagnose("no-such-host.invalid:1", "b", Authority().issue("a"))
    assert found is not None
    assert found.lasting_after is None
    assert "host of no-such-host.invalid:1 is not known" in found.reason
