"""CKKS against NumPy, over the wire; keys and vectors that are none are refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import ConfigError, PartyError
from shardpar.fl.messages import decode, encode

ckks = pytest.importorskip("shardpar.fl.he.ckks")


@pytest.fixture(scope="module")
def secret():
    return ckks.generate(ckks.CKKSOptions(depth=2))


@pytest.fixture(scope="module")
def remote(secret):
    """The key as another party has it."""
    message = decode(encode(secret.public.to_message()), ckks.KeyOfCKKS)
    return ckks.PublicKey.from_message(message, party="a")


def back(secret, vector):
    """A vector of another party, as its owner reads it."""
    message = decode(encode(vector.to_message()), ckks.VectorOfCKKS)
    return secret.decrypt(ckks.Vector.from_message(message, secret.public, party="b"), trusted=True)


@pytest.mark.parametrize("size", [1, 5, 4096, 4097, 9000])
def test_what_another_party_computes_is_what_numpy_does(secret, remote, size):
    draw = np.random.default_rng(size)
    x, y, known = draw.normal(0, 10, (3, size))
    a, b = remote.encrypt(x), remote.encrypt(y)
    np.testing.assert_allclose(back(secret, a + b), x + y, atol=1e-5)
    np.testing.assert_allclose(back(secret, a + known), x + known, atol=1e-5)
    np.testing.assert_allclose(back(secret, (a * known + b) * b), (x * known + y) * y, atol=1e-2)


def test_aggregator_adds_updates_that_it_cannot_read(secret, remote):
    updates = np.random.default_rng(0).normal(0, 0.1, (5, 5000))
    total = remote.encrypt(updates[0])
    for update in updates[1:]:
        total = total + remote.encrypt(update)
    assert not remote.context.has_secret_key()
    np.testing.assert_allclose(back(secret, total), updates.sum(0), atol=1e-6)


def test_sums_and_dot_products():
    secret = ckks.generate(ckks.CKKSOptions(depth=1, sums=True))
    x, y = np.random.default_rng(1).normal(size=(2, 5000))
    held = secret.public.encrypt(x)
    assert secret.decrypt(held.sum(), trusted=True) == pytest.approx([x.sum()], abs=1e-4)
    assert secret.decrypt(held.dot(y), trusted=True) == pytest.approx([x @ y], abs=1e-4)


def test_the_same_vector_is_never_the_same_bytes(remote):
    assert remote.encrypt([1.0]).to_message() != remote.encrypt([1.0]).to_message()


def test_a_sent_key_holds_no_secret(secret, remote):
    held = remote.encrypt([1.0])
    with pytest.raises(ValueError, match="secret_key"):
        held.chunks[0].decrypt()
    assert not secret.public.context.has_secret_key()


def test_the_depth_is_a_limit(secret):
    held = secret.public.encrypt([2.0])
    twice = held * held * held
    assert secret.decrypt(twice, trusted=True) == pytest.approx([8], abs=1e-4)
    with pytest.raises(ValueError, match="one after the other may be 2"):
        twice * held


def test_exact_answers_are_given_only_to_who_vouches(secret):
    with pytest.raises(ValueError, match="trusted=True"):
        secret.decrypt(secret.public.encrypt([1.0]))


def test_vectors_under_different_keys_do_not_meet(secret):
    other = ckks.generate()
    with pytest.raises(ValueError, match="different keys"):
        secret.public.encrypt([1.0]) + other.public.encrypt([1.0])
    with pytest.raises(ValueError, match="another key"):
        secret.decrypt(other.public.encrypt([1.0]), trusted=True)


@pytest.mark.parametrize("numbers", [[], [np.nan], [np.inf], [[1.0]], 3.0])
def test_what_is_no_vector_is_refused(secret, numbers):
    with pytest.raises(ValueError, match="finite"):
        secret.public.encrypt(numbers)
    with pytest.raises(ValueError, match="finite"):
        secret.public.encrypt([1.0, 2.0]) + numbers


@pytest.mark.parametrize(
    "wrong", [{"depth": 0}, {"depth": 8}, {"scale_bits": 60}, {"depth": 7, "scale_bits": 50}]
)
def test_options_beyond_what_is_secure_are_refused(wrong):
    with pytest.raises(ConfigError):
        ckks.CKKSOptions(**wrong)


def test_keys_of_other_parameters_than_they_say_are_refused(secret):
    message = secret.public.to_message()
    weaker = ckks.generate(ckks.CKKSOptions(depth=1)).public.to_message()
    with_secret = secret.context.serialize(
        save_public_key=True, save_secret_key=True, save_galois_keys=False, save_relin_keys=True
    )
    for changes in (
        {"depth": 3},
        {"scale_bits": 41},
        {"sums": True},
        {"context": weaker.context},
        {"context": with_secret},
        {"context": b""},
        {"context": message.context[:1000]},
    ):
        values = {name: getattr(message, name) for name in message.__struct_fields__} | changes
        with pytest.raises(PartyError, match="b sent"):
            ckks.PublicKey.from_message(ckks.KeyOfCKKS(**values), party="b")


def test_vectors_of_other_sizes_than_they_say_are_refused(remote):
    message = remote.encrypt(np.ones(5000)).to_message()
    one, two = message.chunks
    for size, chunks in [
        (5000, (one,)),
        (4096, (one, two)),
        (5001, (one, two)),
        (0, ()),
        (-1, ()),
        (1 << 60, (one,)),
        (4096, (two,)),
        (4096, (one + one,)),
    ]:
        with pytest.raises(PartyError, match="b sent"):
            ckks.Vector.from_message(ckks.VectorOfCKKS(size, chunks), remote, party="b")


@pytest.fixture(scope="module")
def sent(remote):
    """One ciphertext; others are of other lengths."""
    return remote.encrypt([1.0, 2.0]).to_message().chunks[0]


@settings(max_examples=60, deadline=None)
@given(
    at=st.one_of(st.integers(0, 200), st.integers(0, 150_000)),
    noise=st.binary(min_size=1, max_size=20),
    dropped=st.integers(0, 30),
)
def test_damaged_vectors_are_refused_or_read(secret, remote, sent, at, noise, dropped):
    damaged = sent[:at] + noise + sent[at + dropped :]
    try:
        found = ckks.Vector.from_message(ckks.VectorOfCKKS(2, (damaged,)), remote, party="b")
    except PartyError:
        return
    assert secret.decrypt(dataclasses.replace(found, key=secret.public), trusted=True).shape == (2,)
