"""Products by tables beside plain integers and the other way of multiplying."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.fl.he import paillier
from shardpar.fl.he.pool import Pool
from shardpar.fl.he.tabled import signed_digits, tabled_matmul

SECRET = paillier.generate(256, unsafe_small_key_for_tests=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 6), st.sampled_from([1, 3, 15, 29]), st.integers(0, 99))
def test_products_are_those_of_integers(rows, columns, bits, seed):
    random = np.random.default_rng(seed)
    matrix = random.integers(-(1 << bits), (1 << bits) + 1, (rows, columns))
    matrix[random.random(matrix.shape) < 0.3] = 0
    numbers = random.integers(-1000, 1000, rows)
    held = SECRET.public.encrypt(numbers)
    found = SECRET.decrypt(tabled_matmul(held, matrix))
    assert found == (numbers @ matrix).tolist()


def test_processes_come_to_the_same():
    matrix = np.random.default_rng(0).integers(-300, 300, (9, 4))
    held = SECRET.public.encrypt(range(9))
    with Pool(2) as pool:
        found = SECRET.decrypt(tabled_matmul(held, matrix, pool))
    assert found == (np.arange(9) @ matrix).tolist()


@given(st.lists(st.integers(-(1 << 30), 1 << 30)), st.integers(2, 10))
def test_digits_are_small_and_make_the_number(numbers, window):
    digits = signed_digits(np.array(numbers, np.int64), window)
    assert np.abs(digits).max(initial=0) <= 1 << (window - 1)
    weights = (1 << window) ** np.arange(len(digits))
    assert (weights @ digits.reshape(len(digits), len(numbers))).tolist() == numbers


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (np.ones((3, 1), int), "3 rows for 2"),
        (np.ones((2, 1)), "integers"),
        (np.full((2, 1), 1 << 31), "more than 30 bits"),
    ],
)
def test_other_matrices_are_refused(matrix, words):
    with pytest.raises(ValueError, match=words):
        tabled_matmul(SECRET.public.encrypt([1, 2]), matrix)
