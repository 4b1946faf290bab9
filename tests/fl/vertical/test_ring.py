"""Shares beside Python's integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.fl.vertical.ring import (
    MODULUS,
    from_bytes,
    masks,
    product,
    shares_of,
    shortened,
    signed,
    to_bytes,
)

RING = st.integers(0, MODULUS - 1)


@given(st.integers(-(1 << 80), 1 << 80), RING, st.integers(1, 60))
def test_shortening_is_off_by_one_at_most(number, mask, bits):
    # Within 2^80 of 0 a share can be wrapped by the number: with probability 2^-47.
    if not 1 << 81 < mask < MODULUS - (1 << 81):
        return
    one = shortened(shares_of([number - mask]), bits, first=True)
    other = shortened(shares_of([mask]), bits, first=False)
    [found] = signed((one + other) % MODULUS)
    assert abs(found - number // (1 << bits)) <= 1


@given(st.integers(0, 5), st.integers(1, 6), st.integers(0, 1000))
def test_products_are_exact(rows, columns, seed):
    random = np.random.default_rng(seed)
    matrix = random.integers(-(1 << 15), (1 << 15) + 1, (rows, columns))
    share = shares_of([MODULUS - 1, *masks(columns - 1, 128)])
    expected = [
        sum(int(a) * b for a, b in zip(row, share.tolist(), strict=True)) % MODULUS
        for row in matrix
    ]
    assert product(matrix, share).tolist() == expected


def test_a_long_product_of_largest_numbers_is_exact():
    matrix = np.full((1, 1 << 15), -(1 << 15))
    share = shares_of([MODULUS - 1] * (1 << 15))
    assert product(matrix, share).tolist() == [1 << 30]


@given(st.lists(RING))
def test_bytes_hold_shares(numbers):
    assert from_bytes(to_bytes(shares_of(numbers))).tolist() == numbers


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="32768"):
        product(np.array([[1 << 16]]), shares_of([1]))
    with pytest.raises(ValueError, match="whole number"):
        from_bytes(b"123")


def test_masks_use_every_bit_they_may_and_no_more():
    drawn = masks(400, 131)
    assert max(drawn).bit_length() == 131
    for bit in range(131):
        assert 120 < sum(number >> bit & 1 for number in drawn) < 280
