"""Messages come once, in order and whole over real sockets, whatever happens to connections."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from shardpar.errors import PartyError, UserError
from shardpar.fl.messages import encode
from shardpar.fl.net.grpc_channel import GrpcChannel
from shardpar.fl.net.keys import read_keys
from tests.fl.net.parties import JOB, PARTIES, QUICK, Note, dialling, listening
from tests.fl.net.relay import Relay


def test_parties_speak_and_what_is_sent_is_counted_as_in_a_simulation(pki):
    with listening(pki) as agg, dialling(pki, "a", agg.address) as a:
        for at in range(50):
            a.send("agg", "up", Note(f"{at}"))
            agg.send("a", "down", Note(f"-{at}"))
        ups = [agg.receive("a", "up", Note).text for _ in range(50)]
        downs = [a.receive("agg", "down", Note).text for _ in range(50)]
    assert ups == [f"{at}" for at in range(50)]
    assert downs == [f"-{at}" for at in range(50)]
    assert a.sent_bytes == sum(len(encode(Note(f"{at}"))) for at in range(50))


def test_messages_survive_dropped_connections(pki):
    with (
        listening(pki) as agg,
        Relay(agg.address) as relay,
        dialling(pki, "a", relay.address) as a,
    ):
        stop = threading.Event()

        def drop():
            while not stop.wait(0.15):
                relay.drop()

        breaker = threading.Thread(target=drop)
        breaker.start()
        sent = [Note(f"{at}", bytes([at]) * (at % 4 * 700_000)) for at in range(60)]

        def send():
            for note in sent:
                a.send("agg", "up", note)
                time.sleep(0.02)

        sender = threading.Thread(target=send)
        sender.start()
        came = [agg.receive("a", "up", Note) for _ in sent]
        stop.set()
        breaker.join()
        sender.join()
        assert relay.dropped > 3
        assert came == sent
        with pytest.raises(PartyError, match="nothing for 'up'"):
            agg.receive("a", "up", Note, timeout_s=0.1)


def test_a_peer_that_closed_is_named_at_once_and_all_it_sent_still_comes(pki):
    with listening(pki) as agg:
        with dialling(pki, "a", agg.address) as a:
            for _ in range(20):
                a.send("agg", "up", Note("last words", bytes(1 << 20)))
        began = time.monotonic()
        assert [agg.receive("a", "up", Note).text for _ in range(20)] == ["last words"] * 20
        with pytest.raises(PartyError, match="a has closed its channel") as gone:
            agg.receive("a", "up", Note)
        with pytest.raises(PartyError, match="a has closed its channel"):
            agg.send("a", "down", Note("too late"))
        assert gone.value.party == "a"
        assert time.monotonic() - began < 5


def test_no_thread_or_port_is_left(pki):
    before = set(threading.enumerate())
    with listening(pki) as agg, dialling(pki, "a", agg.address) as a:
        a.send("agg", "up", Note("x"))
        agg.receive("a", "up", Note)
        host, port = agg.address.split(":")
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert set(threading.enumerate()) <= before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=2)
    with pytest.raises(PartyError, match="closed"):
        a.send("agg", "up", Note("x"))
    a.close()


def test_who_forgets_to_close_still_exits(pki):
    program = f"""
        from pathlib import Path
        from tests.fl.net.parties import *
        agg = listening(Path({str(pki)!r}))
        a = dialling(Path({str(pki)!r}), "a", agg.address)
        a.send("agg", "up", Note("x"))
        print(agg.receive("a", "up", Note).text)
        a.send("agg", "up", Note("never taken", bytes(1 << 24)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "x"
    assert "Traceback" not in done.stderr
    assert "Fatal" not in done.stderr


def test_a_port_in_use_and_other_slips_are_explained(pki):
    with listening(pki) as agg, pytest.raises(UserError, match="choose another port"):
        listening(pki, listen=agg.address)
    keys = read_keys(pki, "a")
    for changes, words in [
        ({}, "neither dials"),
        ({"dial": {"agg": "nowhere"}}, "host:port"),
        ({"dial": {"zoe": "h:1"}}, "'zoe' is not one"),
        ({"dial": {"a": "h:1"}}, "dial itself"),
        ({"dial": {"agg": "h:1"}, "keys": read_keys(pki, "b")}, "keys of b"),
    ]:
        with pytest.raises(UserError, match=words):
            GrpcChannel.open("a", PARTIES, **{"job": JOB, "keys": keys, "limits": QUICK} | changes)
