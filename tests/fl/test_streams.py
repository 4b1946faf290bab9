"""Keystreams against published vectors, and what they refuse."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy import stats

from shardpar.errors import PartyError, RunError
from shardpar.fl.streams import (
    KeyStream,
    Randomness,
    add_streams,
    derived_key,
    joined,
    shared_secret,
)

LOW_ORDER = [
    bytes(32),
    bytes([1]) + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
]


def test_the_stream_is_aes_256_in_counter_mode_from_zero():
    # AES-256 of the zero block under the zero key (NIST CAVP, KAT VarKey / AESAVS zero vector).
    words = KeyStream(bytes(32)).words(4)
    assert words.astype("<u4").tobytes().hex() == "dc95c078a2408989ad48a21492842087"


def test_adding_and_subtracting_streams_in_chunks_cancels():
    total = np.arange(100_003, dtype=np.uint32)
    keys = [bytes([at]) * 32 for at in range(3)]
    expected = total + KeyStream(keys[0]).words(total.size) - KeyStream(keys[1]).words(total.size)
    add_streams(
        total,
        [KeyStream(keys[0]), KeyStream(keys[2])],
        [KeyStream(keys[1]), KeyStream(keys[2])],
    )
    np.testing.assert_array_equal(total, expected)


def test_a_stream_is_read_once():
    stream = KeyStream(bytes(32))
    add_streams(np.zeros(4, np.uint32), [stream], [])
    with pytest.raises(RunError, match="has been read"):
        add_streams(np.zeros(4, np.uint32), [], [stream])
    with pytest.raises(RunError, match="has been read"):
        stream.words(1)


def test_every_part_of_the_binding_changes_the_key():
    names = {"job": "j", "round_": "1.0", "first": "a", "second": "b", "purpose": "mask"}
    keys = {derived_key(bytes(32), **names)}
    for name in names:
        keys.add(derived_key(bytes(32), **{**names, name: "other"}))
    keys.add(derived_key(bytes(32), **{**names, "first": "b", "second": "a"}))
    keys.add(derived_key(bytes([1]) + bytes(31), **names))
    assert len(keys) == len(names) + 3
    assert joined("a", "bc") != joined("ab", "c")


@pytest.mark.parametrize("point", LOW_ORDER)
def test_points_of_low_order_are_refused(point):
    with pytest.raises(PartyError, match="eve sent an X25519 key"):
        shared_secret(X25519PrivateKey.generate(), point, party="eve")


def test_bulk_words_go_on_and_bounded_ones_are_uniform():
    random = Randomness(bytes(32))
    first, second = random.words(1000), random.words(1000)
    assert not np.intersect1d(first, second).size
    together = np.concatenate([first, second])
    np.testing.assert_array_equal(together, Randomness(bytes(32)).words(2000))
    counts = np.bincount(random.below(7, 70_000).astype(int), minlength=7)
    assert counts.size == 7
    assert stats.chisquare(counts).pvalue > 1e-6
    # A bound just over half the range: without rejection small numbers would come twice as often.
    large = random.below(3 << 61, 20_000)
    assert large.max() < 3 << 61
    assert abs(np.mean(large < 1 << 61) - 1 / 3) < 0.02


def test_two_systems_draws_differ():
    assert not np.array_equal(Randomness().words(4), Randomness().words(4))


def test_the_top_word_occurs():
    # Found by search over keys; a generator of floats, or of [0, 2^32 - 1), would never give it.
    assert KeyStream((31_818).to_bytes(32, "big")).words(44_113)[-1] == 0xFFFFFFFF
