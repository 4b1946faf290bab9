"""Whatever bytes come, a party of a vertical protocol answers with `PartyError`, or goes on.

A conversation is recorded once; then one party hears it again with one message changed.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict, deque
from dataclasses import dataclass

import numpy as np
import pytest

from shardpar.errors import PartyError, RunError
from shardpar.fl.channel import LocalChannel
from shardpar.fl.he import paillier
from shardpar.fl.messages import decode, encode
from shardpar.fl.vertical import linear_model, tree_model
from shardpar.fl.vertical.link import greet
from shardpar.fl.vertical.options import KeyOptions, LinearOptions, TreeOptions
from tests.fl.test_secagg_wire import mutated
from tests.fl.vertical.parties import together

MUTANTS = 30_000 if "SHARDPAR_LONG" in os.environ else 250
KEYS = KeyOptions(bits=512, processes=1, unsafe_small_keys_for_tests=True)
SECRETS = {
    role: paillier.generate(512, unsafe_small_key_for_tests=True) for role in ("guest", "host")
}
X = np.array([[0.0, 3], [1, 2], [2, np.nan], [3, 1], [4, 5], [5, 0]])
Y = np.array([0.0, 1, 0, 1, 1, 1])


@dataclass
class Replayed:
    """A channel on which the other party says what it once said."""

    party: str
    said: list[tuple[str, bytes]]
    parties: tuple[str, ...] = ("guest", "host")
    sent_bytes: int = 0

    def __post_init__(self):
        self.waiting = defaultdict(deque)
        for topic, data in self.said:
            self.waiting[topic].append(data)

    def send(self, to, topic, message):
        encode(message)

    def receive(self, sender, topic, kind, timeout_s=None):
        if not self.waiting[topic]:
            raise PartyError(f"{sender} says nothing", party=sender)
        return decode(self.waiting[topic].popleft(), kind, party=sender)


def linear_party(end, role):
    options = LinearOptions(epochs=1, batch=3)
    x, y = (X[:, :1], Y) if role == "guest" else (np.nan_to_num(X[:, 1:]), None)
    return linear_model.fit(end, role, x, y, options, KEYS)


def trees_party(end, role):
    options = TreeOptions(trees=1, max_depth=2)
    x, y = (X[:, :1], Y) if role == "guest" else (X[:, 1:], None)
    half = tree_model.fit(end, role, x, y, options, KEYS)
    tree_model.predict(end, half, x, KEYS)
    return half


@pytest.mark.parametrize("role", ["guest", "host"])
@pytest.mark.parametrize("party", [linear_party, trees_party])
def test_a_party_survives_mutants(monkeypatch, party, role):
    def greeted(channel, role, *rest, **how):
        return greet(channel, role, *rest, **how, secret=SECRETS[role])

    monkeypatch.setattr(linear_model, "greet", greeted)
    monkeypatch.setattr(tree_model, "greet", greeted)
    said: list[tuple[str, bytes]] = []
    send = LocalChannel.send

    def noting(self, to, topic, message):
        if to == role:
            said.append((topic, encode(message)))
        send(self, to, topic, message)

    with monkeypatch.context() as patch:
        patch.setattr(LocalChannel, "send", noting)
        together(lambda end: party(end, "guest"), lambda end: party(end, "host"))

    def refuses(heard) -> bool:
        try:
            party(Replayed(role, heard), role)
        except PartyError:
            return True
        except RunError:
            # Shares of another time add up to weights that run away.
            pass
        return False

    assert not refuses(said)
    draw, refused = random.Random(5), 0
    for _ in range(MUTANTS):
        at = draw.randrange(len(said))
        topic, data = said[at]
        refused += refuses([*said[:at], (topic, mutated(data, draw)), *said[at + 1 :]])
    assert refused > MUTANTS // 3
