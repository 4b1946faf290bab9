"""Whatever bytes come, a secure aggregation answers with `PartyError` or goes on."""

import os
import random

import numpy as np
import pytest

from shardpar.errors import PartyError, RunError
from shardpar.fl.messages import decode, encode
from shardpar.fl.secagg_messages import (
    Aborted,
    AdvertiseKeys,
    MaskedInput,
    ShareKeys,
    SignedSurvivors,
    ToClient,
    Unmask,
)
from shardpar.fl.secagg_server import SecAggServer
from tests.fl.federation import Federation

MUTANTS = 1_000_000 if "SHARDPAR_LONG" in os.environ else 50_000
FIRST = "client 000"


@pytest.fixture(scope="module")
def recorded():
    """One of each message, and the machines to send mutants of it to, by phase."""
    federation = Federation.of(3, 4, threshold=2)
    clients = federation.clients()
    server = SecAggServer(federation.session, federation.roster)
    sent = {}
    sent[AdvertiseKeys] = {n: c.advertise() for n, c in clients.items()}
    for name, message in sent[AdvertiseKeys].items():
        server.take_keys(name, message)
    keyring = server.keyring()
    sent[ShareKeys] = {n: c.share(keyring) for n, c in clients.items()}
    for name, message in sent[ShareKeys].items():
        server.take_shares(name, message)
    routed = server.routed()
    zeros = np.zeros(4, np.uint32)
    sent[MaskedInput] = {n: c.mask(routed[n], zeros) for n, c in clients.items()}
    for name, message in sent[MaskedInput].items():
        server.take_masked(name, message)
    survivors = server.survivors()
    sent[SignedSurvivors] = {n: c.sign(survivors) for n, c in clients.items()}
    for name, message in sent[SignedSurvivors].items():
        server.take_signature(name, message)
    request = server.request()
    sent[Unmask] = {n: c.unmask(request) for n, c in clients.items()}
    to_client = [keyring, routed[FIRST], survivors, request, Aborted("enough")]
    return sent, [encode(ToClient(body)) for body in to_client], server, clients[FIRST]


def mutated(data: bytes, draw: random.Random) -> bytes:
    parts = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(parts))
        match draw.randrange(4):
            case 0:
                parts[at] = draw.randrange(256)
            case 1:
                del parts[at : at + draw.randint(1, 40)]
            case 2:
                parts[at:at] = draw.randbytes(draw.randint(1, 9))
            case 3:
                parts += parts[at : at + 64]
        if not parts:
            return b""
    return bytes(parts)


def test_the_aggregator_survives_mutants(recorded):
    sent, _, server, _ = recorded
    takes = {
        AdvertiseKeys: "take_keys",
        ShareKeys: "take_shares",
        MaskedInput: "take_masked",
        SignedSurvivors: "take_signature",
        Unmask: "take_unmask",
    }
    draw, understood = random.Random(0), 0
    for at in range(MUTANTS):
        kind = list(takes)[at % len(takes)]
        data = mutated(encode(sent[kind][FIRST]), draw)
        try:
            message = decode(data, kind, party=FIRST)
            understood += 1
            getattr(server, takes[kind])(FIRST, message)
        except PartyError:
            pass
    assert understood > MUTANTS // 100


def test_a_client_survives_mutants_and_never_answers_a_changed_request(recorded):
    _, to_client, _, client = recorded
    draw, understood = random.Random(1), 0
    answer = client._answered[1]
    for at in range(MUTANTS):
        try:
            body = decode(mutated(to_client[at % len(to_client)], draw), ToClient).body
            understood += 1
            match type(body).__name__:
                case "Keyring":
                    client.share(body)
                case "RoutedShares":
                    client.mask(body, np.zeros(4, np.uint32))
                case "Survivors":
                    client.sign(body)
                case "UnmaskRequest":
                    assert client.unmask(body) == answer
        except (PartyError, RunError):
            pass
    assert understood > MUTANTS // 100


@pytest.mark.parametrize("method", ["share", "mask"])
def test_fresh_clients_survive_mutants_of_what_they_wait_for(method):
    draw = random.Random(2)
    for _ in range(MUTANTS // 1000):
        federation = Federation.of(3, 4, threshold=2)
        clients = federation.clients()
        server = SecAggServer(federation.session, federation.roster)
        for name, client in clients.items():
            server.take_keys(name, client.advertise())
        body, first = server.keyring(), clients[FIRST]
        if method == "mask":
            for name, client in clients.items():
                server.take_shares(name, client.share(body))
            body = server.routed()[FIRST]
        try:
            changed = decode(mutated(encode(body), draw), type(body))
            if method == "share":
                first.share(changed)
            else:
                first.mask(changed, np.zeros(4, np.uint32))
            # What is not refused is what was sent, or fewer shares, as when others drop out.
            assert method == "mask" or changed == body
        except PartyError:
            pass
