"""Who has no right to be there is told so, and others go on; attacks succeed on broken variants.

Each attack is run against the code as it is and against a variant broken for it: an attack that
cannot succeed anywhere would prove nothing.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from dataclasses import replace

import grpc
import pytest

from shardpar.errors import PartyError
from shardpar.fl.messages import encode
from shardpar.fl.net import credentials, dialler, listener
from shardpar.fl.net.frames import Frame, Hello, Refusal
from shardpar.fl.net.keys import PartyKeys, tls_name
from tests.fl.net.attacker import Attacker, greeting, parts
from tests.fl.net.authority import Authority
from tests.fl.net.parties import HERE, QUICK, Note, dialling, listening

FORGED = Note("forged")


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def keys(authority) -> dict[str, PartyKeys]:
    return {party: authority.issue(party) for party in ("agg", "a", "b", "zoe")}


def listener_of(keys, **changes):
    return listening(None, keys=keys["agg"], **changes)


def goes_on(agg, keys) -> None:
    """Another party still joins and is heard."""
    with dialling(None, "b", agg.address, keys=keys["b"]) as b:
        b.send("agg", "proof", Note("on"))
        assert agg.receive("b", "proof", Note, timeout_s=10).text == "on"


def forged_as_a(agg, shown: PartyKeys | None, ca: bytes | None = None) -> str:
    """Someone who is not `a` greets as `a` and sends a message in its name."""
    with Attacker(agg.address, shown, ca=ca) as attacker:
        attacker.say(greeting("a"))
        heard = attacker.hear()
        if not isinstance(heard, Hello):
            return heard.reason if isinstance(heard, Refusal) else heard.name
        attacker.say(*parts(FORGED, sender="a", sequence=1))
        return "believed: " + agg.receive("a", "up", Note, timeout_s=10).text


def as_is(patch) -> None:
    """Nothing is broken."""


def lets_in_without_certificates(patch) -> None:
    patch.setattr(
        listener,
        "listening_credentials",
        lambda keys: grpc.ssl_server_credentials([(keys.key, keys.certificate)]),
    )


def believes_what_is_said(patch) -> None:
    patch.setattr(listener, "party_behind", lambda context: "a")


def no_certificates_and_believes(patch) -> None:
    lets_in_without_certificates(patch)
    believes_what_is_said(patch)


@pytest.mark.parametrize(
    ("broken", "outcome"),
    [
        (as_is, "UNAVAILABLE"),
        (lets_in_without_certificates, "is no party"),
        (no_certificates_and_believes, "believed: forged"),
    ],
)
def test_without_a_certificate(keys, authority, monkeypatch, broken, outcome):
    broken(monkeypatch)
    with listener_of(keys) as agg:
        assert outcome in forged_as_a(agg, None, authority.pem)
        if broken is as_is:
            goes_on(agg, keys)


@pytest.mark.parametrize(
    ("broken", "outcome"), [(as_is, "agg speaks with b"), (believes_what_is_said, "believed")]
)
def test_with_the_certificate_of_another_party(keys, monkeypatch, caplog, broken, outcome):
    broken(monkeypatch)
    with listener_of(keys) as agg:
        assert outcome in forged_as_a(agg, keys["b"])
        if broken is as_is:
            assert any("agg speaks with b" in message for message in caplog.messages)
            goes_on(agg, keys)


@pytest.mark.parametrize("trusted", [False, True])
def test_with_a_certificate_of_another_authority(keys, authority, trusted):
    other = Authority("another authority")
    agg_keys = keys["agg"]
    if trusted:
        agg_keys = PartyKeys("agg", authority.pem + other.pem, agg_keys.certificate, agg_keys.key)
    foreign = other.issue("a")
    shown = PartyKeys("a", authority.pem, foreign.certificate, foreign.key)
    with listening(None, keys=agg_keys) as agg:
        assert forged_as_a(agg, shown) == ("believed: forged" if trusted else "UNAVAILABLE")
        if not trusted:
            for given, words in [
                (shown, "it was not issued by an authority in ca.pem"),
                (PartyKeys("a", authority.pem + other.pem, shown.certificate, shown.key), "see"),
            ]:
                with dialling(None, "a", agg.address, keys=given) as a:
                    with pytest.raises(PartyError, match=f"not accept .* of a: {words}") as told:
                        a.wait()
                    assert told.value.party == "agg"
            goes_on(agg, keys)


@pytest.mark.parametrize("days", [(-2, -1), (1, 2), (-1, 1)])
def test_with_a_certificate_that_is_not_valid_now(keys, authority, days):
    shown = authority.issue("a", days=days)
    valid = days == (-1, 1)
    with listener_of(keys) as agg:
        assert forged_as_a(agg, shown) == ("believed: forged" if valid else "UNAVAILABLE")
        if not valid:
            words = "expired at" if days[1] < 0 else "valid only from"
            with (
                dialling(None, "a", agg.address, keys=shown) as a,
                pytest.raises(PartyError, match=f"not accept the certificate of a: it .*{words}"),
            ):
                a.wait()
            goes_on(agg, keys)


@pytest.mark.parametrize(
    "uris",
    [
        (),
        ("shardpar://party/a", "shardpar://party/b"),
        ("https://party/a",),
        ("shardpar://party/A",),
        ("shardpar://party/a/b",),
    ],
)
def test_with_a_certificate_that_does_not_name_one_party(keys, authority, uris):
    with listener_of(keys) as agg:
        assert "is no party" in forged_as_a(agg, authority.issue("a", uris=uris))


def test_without_tls(keys):
    with listener_of(keys) as agg:
        assert forged_as_a(agg, None) == "UNAVAILABLE"
        with socket.create_connection(agg.address.split(":")) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            goes_on(agg, keys)


def test_a_party_of_another_federation_is_told_on_both_sides(keys, caplog):
    with listener_of(keys) as agg:
        with Attacker(agg.address, keys["zoe"]) as zoe:
            refusal = zoe.hear()
            assert isinstance(refusal, Refusal)
            assert refusal.reason == "'zoe' is no party that dials agg"
            assert zoe.hear() is grpc.StatusCode.PERMISSION_DENIED
        for changes, words in [
            ({"job": "other"}, "agg is in job 'job', not in 'other'"),
            ({"parties": ("a", "agg", "b")}, "another order"),
        ]:
            parties = changes.pop("parties", None)
            opened = dialling(None, "a", agg.address, keys=keys["a"], **changes, order=parties)
            with opened as a:
                for ask in (
                    lambda a=a: a.receive("agg", "x", Note),
                    lambda a=a: a.send("agg", "x", Note("")),
                ):
                    with pytest.raises(PartyError, match=words) as told:
                        ask()
                    assert told.value.party == "agg"
            assert any(words in message for message in caplog.messages)
        goes_on(agg, keys)


class Impostor:
    """A server that answers as the aggregator would, with another party's certificate."""

    def __init__(self, shown: PartyKeys) -> None:
        self._server = grpc.server(listener._DaemonThreads())
        handler = grpc.stream_stream_rpc_method_handler(self._converse)
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    credentials.SERVICE, {credentials.METHOD: handler}
                ),
            )
        )
        port = self._server.add_secure_port(HERE, credentials.listening_credentials(shown))
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def _converse(self, requests, context):
        next(requests)
        yield encode(Frame(greeting("agg", "a")))
        for part in parts(FORGED, sender="agg", receiver="a", sequence=1, topic="down"):
            yield encode(Frame(part))
        for _ in requests:
            pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.stop(0).wait()


@pytest.mark.parametrize("matches_names", [True, False])
def test_an_impostor_of_the_aggregator(keys, monkeypatch, matches_names):
    if not matches_names:
        options = credentials.dialling_options
        monkeypatch.setattr(dialler, "dialling_options", lambda peer: options("b"))
    with (
        Impostor(keys["b"]) as impostor,
        dialling(None, "a", impostor.address, keys=keys["a"]) as a,
    ):
        if matches_names:
            with pytest.raises(PartyError, match=f"cannot show that it is agg.*{tls_name('agg')}"):
                a.receive("agg", "down", Note)
        else:
            assert a.receive("agg", "down", Note).text == "forged"


def test_who_answers_without_tls_or_not_at_all(keys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        stop = threading.Event()

        def answer():
            while not stop.is_set():
                try:
                    one, _ = server.accept()
                except OSError:
                    return
                one.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                one.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with (
            dialling(None, "a", address, keys=keys["a"]) as a,
            pytest.raises(PartyError, match="does not speak TLS"),
        ):
            a.wait()
        stop.set()
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    limits = replace(QUICK, join_s=1.5)
    with dialling(None, "a", address, keys=keys["a"], limits=limits) as a:
        with pytest.raises(PartyError, match=f"nothing listens at {address}"):
            a.wait(timeout_s=0.5)
        began = time.monotonic()
        with pytest.raises(PartyError, match=r"unreachable at .* raise net.join_s"):
            a.receive("agg", "x", Note)
        assert time.monotonic() - began < 3


def test_refusals_are_logged_with_names(keys, caplog):
    caplog.set_level(logging.WARNING)
    with listener_of(keys) as agg, Attacker(agg.address, keys["a"]) as attacker:
        attacker.say(b"\xff\xff")
        assert isinstance(attacker.hear(), Refusal)
    assert any("a sent something that is not a Frame" in message for message in caplog.messages)
