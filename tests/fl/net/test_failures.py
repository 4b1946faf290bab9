"""Peers that die, stall, come back or were started twice; slow receivers; a dead network."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import pytest

from shardpar.errors import PartyError, UserError
from shardpar.fl.net.addresses import dialled
from shardpar.fl.net.grpc_channel import GrpcChannel
from shardpar.fl.net.keys import make_test_keys, read_keys
from tests.fl.net.parties import HERE, JOB, QUICK, Note, dialling, listening
from tests.fl.net.relay import Relay

MIB = 1 << 20


def process(pki, address: str, party: str, body: str) -> subprocess.Popen:
    """A party in a process of its own that says "ready" and runs `body` with its channel `me`."""
    program = f"""
import sys
from pathlib import Path
from tests.fl.net.parties import *
me = dialling(Path({str(pki)!r}), {party!r}, {address!r})
{textwrap.dedent(body)}
"""
    return subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_silent_network_is_noticed_and_nothing_is_lost(pki):
    with (
        listening(pki) as agg,
        Relay(agg.address) as relay,
        dialling(pki, "a", relay.address) as a,
    ):
        a.wait()
        relay.hold()
        for at in range(20):
            a.send("agg", "up", Note(f"{at}"))
            agg.send("a", "down", Note(f"{at}"))
        time.sleep(QUICK.silence_s + 0.6)
        assert agg.connected() == a.connected() == frozenset()
        relay.release()
        relay.drop()
        assert [agg.receive("a", "up", Note).text for _ in range(20)] == [
            f"{at}" for at in range(20)
        ]
        assert [a.receive("agg", "down", Note).text for _ in range(20)] == [
            f"{at}" for at in range(20)
        ]


def test_parties_with_nothing_to_say_keep_their_connection(pki):
    with listening(pki) as agg, dialling(pki, "a", agg.address) as a:
        agg.wait(["a"])
        a.wait()
        before = agg._peers["a"]._connection, a._peers["agg"]._connection
        time.sleep(2.2 * QUICK.silence_s)
        assert (agg._peers["a"]._connection, a._peers["agg"]._connection) == before


def test_a_peer_out_of_reach_is_named_after_the_patience_and_may_come_back(pki):
    patient = replace(QUICK, patience_s=0.8)
    with (
        listening(pki, limits=patient) as agg,
        Relay(agg.address) as relay,
        dialling(pki, "a", relay.address, limits=patient) as a,
    ):
        a.wait()
        relay.open = False
        relay.drop()
        began = time.monotonic()
        for channel, other in ((a, "agg"), (agg, "a")):
            with pytest.raises(PartyError, match=r"unreachable.*net.patience_s") as told:
                channel.receive(other, "x", Note)
            assert told.value.party == other
        assert 0.7 < time.monotonic() - began < 3
        relay.open = True
        a.wait(timeout_s=10)
        agg.wait(["a"], timeout_s=10)
        a.send("agg", "up", Note("back"))
        assert agg.receive("a", "up", Note).text == "back"


def test_a_killed_peer_that_starts_anew_is_let_in_only_when_accepted(pki):
    with listening(pki) as agg, dialling(pki, "b", agg.address) as b:
        first = process(
            pki, agg.address, "a", "me.send('agg', 'up', Note('one'))\nsys.stdin.read()"
        )
        assert agg.receive("a", "up", Note).text == "one"
        agg.send("a", "down", Note("for the first"))
        first.kill()
        first.communicate()
        with dialling(pki, "a", agg.address) as a:
            for waiting in (
                lambda: agg.receive("a", "up", Note),
                lambda: agg.send("a", "x", Note("")),
            ):
                deadline = time.monotonic() + 10
                while not agg.restarted() and time.monotonic() < deadline:
                    time.sleep(0.01)
                with pytest.raises(PartyError, match=r"started anew.*accept_incarnation") as told:
                    waiting()
                assert told.value.party == "a"
            b.send("agg", "up", Note("others go on"))
            assert agg.receive("b", "up", Note).text == "others go on"
            assert agg.restarted() == {"a"}
            assert agg.accept_incarnation("a")
            assert not agg.accept_incarnation("a")
            agg.send("a", "down", Note("for the second"))
            a.send("agg", "up", Note("two"))
            assert a.receive("agg", "down", Note).text == "for the second"
            assert agg.receive("a", "up", Note).text == "two"


def test_a_pending_receive_learns_of_a_restart(pki):
    with listening(pki) as agg:
        first = process(
            pki, agg.address, "a", "me.send('agg', 'up', Note('one'))\nsys.stdin.read()"
        )
        assert agg.receive("a", "up", Note).text == "one"
        told = []

        def pend():
            try:
                agg.receive("a", "up", Note)
            except PartyError as error:
                told.append(str(error))

        thread = threading.Thread(target=pend)
        thread.start()
        first.kill()
        first.communicate()
        with dialling(pki, "a", agg.address):
            thread.join(10)
        assert len(told) == 1
        assert "started anew" in told[0]


def test_an_aggregator_that_starts_anew_is_spoken_to_only_when_accepted(pki):
    agg = listening(pki)
    address = agg.address
    with dialling(pki, "a", address) as a:
        a.send("agg", "up", Note("one"))
        assert agg.receive("a", "up", Note).text == "one"
        agg.close()
        with pytest.raises(PartyError, match="agg has closed its channel"):
            a.receive("agg", "down", Note)
        with listening(pki, listen=address) as agg:
            deadline = time.monotonic() + 10
            while not a.restarted() and time.monotonic() < deadline:
                time.sleep(0.01)
            with pytest.raises(PartyError, match="agg has started anew"):
                a.receive("agg", "down", Note)
            assert a.accept_incarnation("agg")
            a.send("agg", "up", Note("two"))
            assert agg.receive("a", "up", Note).text == "two"


def test_a_party_started_twice_does_not_disturb_the_first(pki, caplog):
    with listening(pki) as agg, dialling(pki, "a", agg.address) as first:
        first.send("agg", "up", Note("first"))
        assert agg.receive("a", "up", Note).text == "first"
        with dialling(pki, "a", agg.address) as second:
            deadline = time.monotonic() + 10
            while "process" not in second._peers["agg"]._why and time.monotonic() < deadline:
                time.sleep(0.01)
            with pytest.raises(PartyError, match="connected with another process of a"):
                second.wait(timeout_s=0.1)
            first.send("agg", "up", Note("still"))
            assert agg.receive("a", "up", Note).text == "still"
            assert agg.restarted() == frozenset()
    assert any("another process of a" in message for message in caplog.messages)


def test_a_slow_receiver_holds_a_fast_sender_back_and_is_not_taken_for_dead(pki):
    small = replace(QUICK, max_message_bytes=2 * MIB, window_bytes=4 * MIB)
    with (
        listening(pki, limits=small) as agg,
        dialling(pki, "a", agg.address, limits=small) as a,
    ):
        sent = []

        def send():
            for at in range(20):
                a.send("agg", "up", Note(f"{at}", bytes(MIB)))
                sent.append(at)

        sender = threading.Thread(target=send)
        sender.start()
        time.sleep(1.5 * QUICK.silence_s)
        assert len(sent) <= 8, "a window here and a window there"
        assert agg.connected() == {"a"}
        assert [agg.receive("a", "up", Note).text for _ in range(20)] == [
            f"{at}" for at in range(20)
        ]
        sender.join(10)
        assert len(sent) == 20


def test_who_never_receives_is_named_and_what_is_discarded_makes_room(pki):
    small = replace(QUICK, max_message_bytes=MIB, window_bytes=2 * MIB, receive_s=0.5, flush_s=0.1)
    with (
        listening(pki, limits=small) as agg,
        dialling(pki, "a", agg.address, limits=small) as a,
    ):

        def send_on() -> None:
            for _ in range(20):
                a.send("agg", "round 1/up", Note("late", bytes(MIB // 2)))

        with pytest.raises(PartyError, match=r"agg has not taken .* raise net.window_bytes"):
            send_on()
        assert agg.discard("a", "round 2") == 0
        dropped = agg.discard("a", "round 1/")
        assert dropped > 0
        a.send("agg", "round 2/up", Note("in time"))
        deadline = time.monotonic() + 10
        while not agg._peers["a"]._inbox.get("round 2/up") and time.monotonic() < deadline:
            dropped += agg.discard("a", "round 1/")
            time.sleep(0.01)
        assert agg.receive("a", "round 2/up", Note).text == "in time"
        assert dropped >= 4
        with pytest.raises(UserError, match=r"larger than net.max_message_bytes"):
            a.send("agg", "x", Note("", bytes(MIB)))
        with pytest.raises(UserError, match="longer than 200"):
            a.send("agg", "x" * 201, Note(""))


def test_all_speak_with_all_without_an_aggregator(tmp_path):
    parties = ("p0", "p1", "p2", "p3")
    make_test_keys(tmp_path / "pki", parties)
    addresses: dict[str, str] = {}
    channels = {}
    for party in parties:
        channels[party] = GrpcChannel.open(
            party, parties, job=JOB, keys=read_keys(tmp_path / "pki", party), listen=HERE,
            dial=dialled(party, parties, addresses), limits=QUICK,
        )  # fmt: skip
        addresses[party] = channels[party].address
    totals = {}

    def add_up(at: int) -> None:
        me = channels[parties[at]]
        right, left = parties[(at + 1) % 4], parties[at - 1]
        passed, total = at + 1, at + 1
        for step in range(3):
            me.send(right, f"ring/{step}", Note(f"{passed}", bytes(300_000)))
            passed = int(me.receive(left, f"ring/{step}", Note).text)
            total += passed
        totals[me.party] = total
        me.close()

    threads = [threading.Thread(target=add_up, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert totals == dict.fromkeys(parties, 10)


def test_many_threads_share_a_channel(pki):
    with listening(pki) as agg, dialling(pki, "a", agg.address) as a:
        came: dict[int, list[str]] = {}

        def send(at: int) -> None:
            for step in range(30):
                a.send("agg", f"t{at}", Note(f"{step}", bytes(at * 50_000)))

        def receive(at: int) -> None:
            came[at] = [agg.receive("a", f"t{at}", Note).text for _ in range(30)]

        threads = [
            threading.Thread(target=f, args=(at,)) for at in range(6) for f in (send, receive)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert came == {at: [f"{step}" for step in range(30)] for at in range(6)}


def test_a_large_tensor_takes_few_copies_of_itself():
    program = """
        import resource, tempfile
        from pathlib import Path
        import numpy as np
        from shardpar.fl.messages import Message, Tensor, array_of, tensor_of
        from shardpar.fl.net.keys import make_test_keys
        from tests.fl.net.parties import *
        class Update(Message):
            tensor: Tensor
        keys = Path(tempfile.mkdtemp()) / "keys"
        make_test_keys(keys, PARTIES)
        rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        with listening(keys) as agg, dialling(keys, "a", agg.address) as a:
            a.send("agg", "up", Update(tensor_of(np.ones(3))))
            agg.receive("a", "up", Update)
            array = np.arange(8 << 20, dtype=np.int64)
            message = Update(tensor_of(array))
            before = rss()
            a.send("agg", "up", message)
            came = array_of(agg.receive("a", "up", Update).tensor)
            assert np.array_equal(came, array)
            print((rss() - before) / array.nbytes)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    # The sender's bytes until they are acknowledged, the receiver's, and the tensor made of them.
    assert float(done.stdout) < 3.6
