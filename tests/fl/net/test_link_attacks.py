"""A party with a good certificate that breaks the protocol is refused, in bounded memory.

The replay is shown to succeed on a variant that does not count; the rest are refused by name.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import time
import tracemalloc

import grpc
import msgspec
import pytest

from shardpar.errors import PartyError
from shardpar.fl.messages import encode
from shardpar.fl.net import links
from shardpar.fl.net.envelopes import PART_BYTES, Assembly, Envelope
from shardpar.fl.net.frames import Ack, Beat, Bye, Frame, Hello, Refusal
from shardpar.fl.net.keys import read_keys
from shardpar.fl.net.links import OVERHEAD_BYTES
from tests.fl.net.attacker import Attacker, greeting, parts
from tests.fl.net.parties import QUICK, Note, dialling, listening

SMALL = dataclasses.replace(QUICK, patience_s=1.0, max_message_bytes=3 << 20, window_bytes=8 << 20)


def goes_on(agg, pki) -> None:
    with dialling(pki, "b", agg.address) as b:
        b.send("agg", "proof", Note("on"))
        assert agg.receive("b", "proof", Note, timeout_s=10).text == "on"


class ForgetfulAssembly(Assembly):
    """Broken: takes whatever number a message has."""

    def add(self, envelope: Envelope) -> tuple[str, bytearray] | None:
        return super().add(msgspec.structs.replace(envelope, sequence=self.received + 1))


@pytest.mark.parametrize("over", ["the same connection", "a new connection"])
@pytest.mark.parametrize("assembly", [Assembly, ForgetfulAssembly])
def test_a_replayed_message_is_refused(pki, monkeypatch, assembly, over):
    monkeypatch.setattr(links, "Assembly", assembly)
    recorded = parts(Note("pay 100"), sender="a", sequence=1)
    with listening(pki) as agg:
        with Attacker(agg.address, read_keys(pki, "a")) as a:
            a.say(greeting("a"))
            assert isinstance(a.hear(), Hello)
            a.say(*recorded)
            assert agg.receive("a", "up", Note).text == "pay 100"
            if over == "the same connection":
                a.say(*recorded)
                outcome = replayed(agg)
        if over == "a new connection":
            with Attacker(agg.address, read_keys(pki, "a")) as a:
                a.say(greeting("a"))
                assert isinstance(a.hear(), Hello)
                a.say(*recorded)
                outcome = replayed(agg)
        if assembly is Assembly:
            assert outcome == "a replayed message 1; 1 were taken already"
            goes_on(agg, pki)
        else:
            assert outcome == "taken again: pay 100"


def replayed(agg) -> str:
    try:
        return "taken again: " + agg.receive("a", "up", Note, timeout_s=10).text
    except PartyError as error:
        return str(error)


WHOLE = parts(Note("x", bytes(5 * PART_BYTES // 2)), sender="a", sequence=1)
replace = msgspec.structs.replace


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([WHOLE[0], WHOLE[0]], "part 0 of message 1 instead of part 1"),
        ([WHOLE[0], WHOLE[2]], "part 2 of message 1 instead of part 1"),
        ([WHOLE[1]], "part 1 of message 1 instead of part 0"),
        ([*WHOLE[:2], replace(WHOLE[2], payload=WHOLE[2].payload[:-1] + b"\1")], "its hash says"),
        ([replace(WHOLE[0], size_bytes=2**62)], "though only"),
        ([replace(WHOLE[0], size_bytes=4 << 20, parts=4)], "raise net.max_message_bytes"),
        ([replace(WHOLE[0], size_bytes=-(2**62))], "at most"),
        ([replace(WHOLE[0], job="other")], "speaks of job 'other'"),
        ([replace(WHOLE[0], sender="b")], "from 'b' to 'agg'"),
        ([replace(WHOLE[0], receiver="b")], "from 'a' to 'b'"),
        ([replace(WHOLE[0], topic="t" * 201)], "too long"),
        ([WHOLE[0], replace(WHOLE[1], topic="other")], "changed what message 1 is"),
        ([Ack(1, 0)], "acknowledges message 1"),
        ([Ack(0, 1)], "took 1 bytes"),
        ([greeting("a")], "greets twice"),
        ([b""], "not a Frame"),
        ([b"\x81" * 3000], "not a Frame"),
        ([encode(Frame(Beat()))[:-1]], "not a Frame"),
        ([encode(WHOLE[0])], "not a Frame"),
    ],
)
def test_who_breaks_the_protocol_is_told_and_named(pki, frames, words):
    with listening(pki, limits=SMALL) as agg, Attacker(agg.address, read_keys(pki, "a")) as a:
        a.say(greeting("a"))
        assert isinstance(a.hear(), Hello)
        a.say(*frames)
        refusal = a.until(Refusal)
        assert isinstance(refusal, Refusal)
        assert words in refusal.reason
        assert refusal.lasting
        for ask in (
            lambda: agg.receive("a", "up", Note, timeout_s=5),
            lambda: agg.send("a", "down", Note("")),
        ):
            with pytest.raises(PartyError, match="a ") as told:
                ask()
            assert told.value.party == "a"
            assert words in str(told.value)
        with Attacker(agg.address, read_keys(pki, "a")) as again:
            again.say(greeting("a"))
            refusal = again.hear()
            assert isinstance(refusal, Refusal)
            assert words in refusal.reason
        goes_on(agg, pki)


def test_a_frame_larger_than_a_part_is_never_read(pki):
    with listening(pki, limits=SMALL) as agg, Attacker(agg.address, read_keys(pki, "a")) as a:
        a.say(greeting("a"))
        assert isinstance(a.hear(), Hello)
        a.say(bytes(64 << 20))
        assert a.until() is grpc.StatusCode.RESOURCE_EXHAUSTED
        goes_on(agg, pki)


def test_who_says_nothing_is_sent_away(pki):
    with listening(pki, limits=SMALL) as agg, Attacker(agg.address, read_keys(pki, "a")) as a:
        began = time.monotonic()
        assert a.hear() is grpc.StatusCode.CANCELLED
        assert time.monotonic() - began < 2 * SMALL.silence_s + 1
        goes_on(agg, pki)


def test_who_goes_silent_is_sent_away_but_a_sign_of_life_is_enough(pki):
    with listening(pki, limits=SMALL) as agg, Attacker(agg.address, read_keys(pki, "a")) as a:
        a.say(greeting("a"))
        for _ in range(8):
            a.say(Beat())
            time.sleep(SMALL.silence_s / 4)
        assert agg.connected() == {"a"}
        assert a.until() is grpc.StatusCode.CANCELLED
        with pytest.raises(PartyError, match=f"nothing came for {SMALL.silence_s:g} s"):
            agg.receive("a", "up", Note)


def test_a_flood_of_streams_of_one_party_leaves_room_for_others(pki):
    with listening(pki, limits=SMALL) as agg:
        attackers = [Attacker(agg.address, read_keys(pki, "a")) for _ in range(12)]
        refused = [a.hear() for a in attackers[:8]]
        assert any(isinstance(one, Refusal) and "connections already" in one.reason
                   for one in refused)  # fmt: skip
        goes_on(agg, pki)
        for a in attackers:
            a.__exit__()
        deadline = time.monotonic() + 5
        while agg._listener._streams["a"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert agg._listener._streams["a"] == 0


def allocated(work) -> int:
    """The most bytes that Python held meanwhile, above what it held before."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_floods_of_half_messages_and_of_empty_ones_stay_within_the_window(pki):
    half = encode(Frame(WHOLE[0]))
    empty = hashlib.sha256(b"").digest()

    def halves():
        for _ in range(60):
            with Attacker(agg.address, read_keys(pki, "a")) as a:
                a.say(greeting("a"))
                assert isinstance(a.hear(), Hello)
                a.say(half, encode(Frame(WHOLE[1])))

    def empties():
        with Attacker(agg.address, read_keys(pki, "b")) as b:
            b.say(greeting("b"))
            assert isinstance(b.hear(), Hello)
            for at in range(1, tiny.window_bytes // OVERHEAD_BYTES + 2):
                b.say(Envelope("job", "b", "agg", f"{at:0200d}", at, 0, 1, 0, b"", empty))
            refusal = b.until(Refusal)
            assert isinstance(refusal, Refusal)
            assert "though only" in refusal.reason

    with listening(pki, limits=SMALL) as agg:
        assert allocated(halves) < 40 << 20
        with dialling(pki, "a", agg.address) as a:
            agg.wait(["a"])
            a.send("agg", "proof", Note("on"))
            agg.receive("a", "proof", Note)
    tiny = dataclasses.replace(SMALL, max_message_bytes=1 << 20, window_bytes=2 << 20)
    with listening(pki, limits=tiny) as agg:
        # What a message takes beside its bytes is counted, and is no less than it takes.
        assert allocated(empties) < 2 * tiny.window_bytes


def test_bye_ends_it_for_good_manners(pki):
    with listening(pki) as agg, Attacker(agg.address, read_keys(pki, "a")) as a:
        a.say(greeting("a"), *parts(Note("1"), sender="a", sequence=1), Bye())
        assert a.until() is grpc.StatusCode.OK
        assert agg.receive("a", "up", Note).text == "1"
        with pytest.raises(PartyError, match="has closed its channel"):
            agg.receive("a", "up", Note)
