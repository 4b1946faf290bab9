"""Sums around a ring against sums of whole numbers, and what passes through whose hands."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shardpar.errors import PartyError, RunError
from shardpar.fl import ring as ring_module
from shardpar.fl.channel import local_channels
from shardpar.fl.ring import masked, ring_sum
from shardpar.fl.ring_messages import RingKey, RingPart
from shardpar.fl.secagg_session import Identity, Session
from shardpar.fl.streams import KeyStream, add_streams
from tests.fl.federation import modular_sum

NAMES = "abcdefgh"


class Tapped:
    """A channel that notes what is sent, and may change it."""

    def __init__(self, end, sent, change):
        self.end, self.sent, self.change = end, sent, change
        self.party, self.parties = end.party, end.parties

    def send(self, to, topic, message):
        message = self.change(self.party, to, topic, message)
        self.sent.append((self.party, to, topic, message))
        self.end.send(to, topic, message)

    def receive(self, sender, topic, kind, timeout_s=None):
        return self.end.receive(sender, topic, kind, timeout_s)


def run_ring(vectors, *, change=lambda *a: a[-1], timeout_s=10.0, identities=None, attempt=0):
    """(each member's sum or error, everything that was sent)."""
    names = tuple(vectors)
    identities = identities or {n: Identity(n, Ed25519PrivateKey.generate()) for n in names}
    roster = {name: one.key.public_key() for name, one in identities.items()}
    words = len(next(iter(vectors.values())))
    session = Session("job", 1, names, words, len(names), attempt=attempt)
    ends, sent, outcomes = local_channels(names), [], {}

    def member(name):
        channel = Tapped(ends[name], sent, change)
        try:
            outcomes[name] = ring_sum(
                channel, identities[name], session, roster, vectors[name], timeout_s
            )
        except Exception as error:
            outcomes[name] = error

    threads = [threading.Thread(target=member, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes, sent


def random_vectors(members: int, words: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {n: random.integers(0, 1 << 32, words, np.uint32) for n in NAMES[:members]}


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 1 << 20))
def test_every_member_has_the_sum(members, words, seed):
    vectors = random_vectors(members, words, seed)
    outcomes, _ = run_ring(vectors)
    expected = modular_sum(vectors.values())
    for outcome in outcomes.values():
        np.testing.assert_array_equal(outcome, expected)


def test_each_sends_twice_all_but_one_part_of_a_vector():
    members, words = 5, 1000
    _, sent = run_ring(random_vectors(members, words))
    for name in NAMES[:members]:
        parts = [m for party, _, _, m in sent if party == name and isinstance(m, RingPart)]
        assert sum(len(m.words) for m in parts) == 2 * (members - 1) * words // members * 4


def test_what_is_passed_on_before_the_sum_is_complete_is_uniform(monkeypatch):
    words = 4000
    vectors = {n: np.full(words, 7, np.uint32) for n in NAMES[:4]}

    def passed_on():
        _, sent = run_ring(vectors)
        parts = [m.words for _, _, topic, m in sent if "/reduce/" in topic]
        return np.frombuffer(b"".join(parts), "<u4")

    words_seen = passed_on()
    assert len(words_seen) == 3 * words
    assert stats.kstest(words_seen / 2.0**32, "uniform").pvalue > 1e-4
    top = np.bincount(words_seen >> 28, minlength=16)
    assert stats.chisquare(top).pvalue > 1e-4
    monkeypatch.setattr(ring_module, "masked", lambda vector, *_: vector.copy())
    assert set(passed_on()) == {7, 14, 21}


def test_members_who_join_read_the_sum_of_all_others_and_of_nobody_less():
    names, words = NAMES[:4], 64
    vectors = random_vectors(4, words, seed=5)
    private = {name: X25519PrivateKey.generate() for name in names}
    keys = {name: key.public_key().public_bytes_raw() for name, key in private.items()}
    session = Session("job", 1, tuple(names), words, 4)
    hidden = {n: masked(vectors[n], session, n, private[n], keys) for n in names}

    def mask(one: str, other: str) -> np.ndarray:
        """What `one` adds because of `other`, which either of them can compute."""
        two = Session("job", 1, tuple(sorted((one, other))), words, 2)
        return masked(np.zeros(words, np.uint32), two, one, private[one], keys)

    read = 0
    for size in (1, 2, 3):
        for joined in itertools.combinations(names, size):
            honest = [name for name in names if name not in joined]
            for count in range(1, len(honest) + 1):
                for among in itertools.combinations(honest, count):
                    # What passes is a sum of some; those who join take off every mask they share.
                    left = modular_sum(hidden[name] for name in among)
                    for one, other in itertools.product(among, joined):
                        left -= mask(one, other)
                    truth = modular_sum(vectors[name] for name in among)
                    if list(among) == honest:
                        np.testing.assert_array_equal(left, truth)
                        read += 1
                    else:
                        assert np.count_nonzero(left == truth) <= 1
    assert read == 4 + 6 + 4


def test_masks_of_another_attempt_are_others():
    vectors = random_vectors(3, 50)
    identities = {n: Identity(n, Ed25519PrivateKey.generate()) for n in vectors}
    _, first = run_ring(vectors, identities=identities)
    _, second = run_ring(vectors, identities=identities, attempt=1)

    def parts(sent):
        return {(p, t.split("/", 3)[-1]): m.words for p, _, t, m in sent if "/reduce/" in t}

    one, other = parts(first), parts(second)
    assert one.keys() == other.keys()
    assert not any(one[key] == other[key] for key in one)
    outcomes, _ = run_ring(vectors, identities=identities)
    assert all(isinstance(outcome, RunError) for outcome in outcomes.values())


def forge(party, to, topic, message):
    """A member that puts its own key in place of the one it passes on."""
    if party == "b" and isinstance(message, RingKey) and message.party == "a":
        key = X25519PrivateKey.generate().public_key().public_bytes_raw()
        return RingKey("a", key, message.signature)
    return message


def rename(party, to, topic, message):
    if party == "b" and isinstance(message, RingKey) and message.party == "b":
        return RingKey("c", message.mask_key, message.signature)
    return message


def shorten(party, to, topic, message):
    if party == "b" and topic.endswith("reduce/1"):
        return RingPart(message.part, message.words[4:])
    return message


def other_part(party, to, topic, message):
    if party == "b" and topic.endswith("gather/0"):
        return RingPart(message.part + 1, message.words)
    return message


def low_order(party, to, topic, message):
    if party == "b" and isinstance(message, RingKey) and message.party == "b":
        return RingKey("b", bytes(32), message.signature)
    return message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (forge, "a has not signed this ring key"),
        (rename, "passed on a key of 'c' where b's is due"),
        (shorten, "bytes of part"),
        (other_part, "of part"),
        (low_order, "b has not signed"),
    ],
)
def test_what_the_protocol_does_not_allow_is_refused(change, words):
    outcomes, _ = run_ring(random_vectors(3, 30), change=change, timeout_s=0.5)
    assert isinstance(outcomes["c"], PartyError)
    assert words in str(outcomes["c"])


def test_an_own_key_of_low_order_is_refused():
    session = Session("job", 1, ("a", "b", "c"), 4, 3)
    private = X25519PrivateKey.generate()
    keys = {"a": bytes(32), "b": bytes(32), "c": bytes(32)}
    with pytest.raises(PartyError, match="no secret can be agreed on"):
        masked(np.zeros(4, np.uint32), session, "a", private, keys)


def test_masks_cancel_only_together():
    names = ("a", "b", "c")
    session = Session("job", 1, names, 100, 3)
    private = {name: X25519PrivateKey.generate() for name in names}
    keys = {name: key.public_key().public_bytes_raw() for name, key in private.items()}
    zeros = np.zeros(100, np.uint32)
    hidden = [masked(zeros, session, name, private[name], keys) for name in names]
    assert not modular_sum(hidden).any()
    for two in itertools.combinations(hidden, 2):
        assert np.count_nonzero(modular_sum(two)) > 95
    stream = zeros.copy()
    add_streams(stream, [KeyStream(bytes(32))], [])
    assert not np.array_equal(stream, hidden[0])
