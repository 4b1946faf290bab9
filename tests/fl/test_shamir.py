"""Shamir's scheme against its algebra."""

import os

import gmpy2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.fl import shamir


def test_the_modulus_is_prime():
    assert gmpy2.is_prime(shamir.PRIME, 50)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.binary(min_size=32, max_size=32))
def test_any_threshold_of_shares_restores(data, secret):
    points = data.draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=12, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = shamir.split(secret, points, threshold)
    some = data.draw(st.permutations(points))[: data.draw(st.integers(threshold, len(points)))]
    assert shamir.restore({point: shares[point] for point in some}, threshold) == secret
    with pytest.raises(ValueError, match="takes"):
        shamir.restore({p: shares[p] for p in some[: threshold - 1]}, threshold)


def test_extreme_secrets():
    for secret in (bytes(32), b"\xff" * 32):
        shares = shamir.split(secret, [1, 5, 9], 3)
        assert shamir.restore(shares, 3) == secret


def test_fewer_shares_than_the_threshold_fit_every_secret():
    # With one share and any guess of the secret, there is a polynomial through both.
    shares = shamir.split(bytes(32), [1, 2], 2)
    guess = int.from_bytes(os.urandom(32), "big")
    slope = (int.from_bytes(shares[1], "big") - guess) % shamir.PRIME
    forged = (guess + 2 * slope) % shamir.PRIME
    restored = shamir.restore({1: shares[1], 2: forged.to_bytes(33, "big")}, 2)
    assert int.from_bytes(restored, "big") == guess
    again = [shamir.split(bytes(32), [1, 2], 2)[1] for _ in range(8)]
    assert len(set(again)) == 8


def test_wrong_shares_are_found():
    shares = shamir.split(os.urandom(32), [1, 2, 3, 4], 2)
    value = (int.from_bytes(shares[4], "big") + 1) % shamir.PRIME
    with pytest.raises(ValueError, match="point 4 belongs to another secret"):
        shamir.restore({**shares, 4: value.to_bytes(33, "big")}, 2)
    with pytest.raises(ValueError, match="point 2 is not an element"):
        shamir.restore({1: shares[1], 2: b"\xff" * 33}, 2)
    with pytest.raises(ValueError, match="point 2 is not an element"):
        shamir.restore({1: shares[1], 2: b"\x00"}, 2)


def test_what_cannot_be_shared():
    with pytest.raises(ValueError, match="repeat"):
        shamir.split(bytes(32), [1, 1], 2)
    with pytest.raises(ValueError, match="the secret itself"):
        shamir.split(bytes(32), [0, 1], 2)
    with pytest.raises(ValueError, match=r"use 1\.\.2"):
        shamir.split(bytes(32), [1, 2], 3)
    with pytest.raises(ValueError, match="31 bytes"):
        shamir.split(bytes(31), [1, 2], 2)
