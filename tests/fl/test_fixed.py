"""Fixed-point codes against exact fractions, and their headroom."""

from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import SpecError
from shardpar.fl.fixed import FixedPoint
from shardpar.fl.streams import Randomness

FLOATS = st.floats(-10, 10, width=32)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=9), st.data())
def test_sums_are_those_of_the_rounded_numbers(rows, data):
    addends = data.draw(st.integers(len(rows), 1000))
    codec = FixedPoint.of(data.draw(st.sampled_from([0.1, 1.0, 3.7, 8.0])), addends)
    total = np.zeros(3, np.uint32)
    for row in rows:
        total += codec.encode(np.float32(row))
    limit, scale = Fraction(float(np.float32(codec.limit))), Fraction(codec.scale)
    for at, got in enumerate(codec.decode(total)):
        cut = [max(-limit, min(limit, Fraction(float(np.float32(row[at]))))) for row in rows]
        assert Fraction(float(got)) == sum(round(value * scale) for value in cut) / scale


@pytest.mark.parametrize(("limit", "addends"), [(1.0, 2), (0.1, 1), (3.7, 100), (1e-6, 10**6)])
def test_everyone_at_the_limit_does_not_wrap(limit, addends):
    codec = FixedPoint.of(limit, addends)
    for sign in (1, -1):
        word = int(codec.encode(np.float32([sign * 1e9])).view(np.int32)[0])
        assert abs(word) * addends < 1 << 31
        assert abs(word / codec.scale - sign * limit) < 2 / codec.scale + 1e-6 * limit
    assert codec.scale * limit > (1 << 29) / addends  # at most two bits are given away


def test_headroom_is_checked_and_the_error_says_what_to_change():
    with pytest.raises(SpecError, match="lower the scale, the limit or the number of clients"):
        FixedPoint(1.0, 2.0**25, 100)
    with pytest.raises(SpecError, match="use bits <= 25 or fewer clients"):
        FixedPoint.of(1.0, 100, bits=26)
    assert FixedPoint.of(1.0, 100, bits=25).scale == 2.0**23
    with pytest.raises(SpecError, match="fewer clients at once"):
        FixedPoint.of(1.0, 1 << 25)
    with pytest.raises(SpecError, match="not a power of two"):
        FixedPoint(1.0, 3.0, 1)


def test_a_compiled_program_makes_the_same_integers():
    codec = FixedPoint.of(0.37, 5)
    values = np.random.default_rng(0).normal(0, 0.2, 10_000).astype(np.float32)
    compiled = np.asarray(jax.jit(codec.integers)(values))
    np.testing.assert_array_equal(compiled.view(np.uint32), codec.encode(values))
    assert codec.cut(values) == np.count_nonzero(np.abs(values) > 0.37) > 0


def test_random_rounding_keeps_the_mean_and_both_neighbours():
    codec = FixedPoint(1.0, 4.0, 1)
    values = np.full(100_000, 0.3)  # 1.2 steps
    words = codec.encode(values, Randomness(bytes(32))).view(np.int32)
    assert set(words.tolist()) == {1, 2}
    assert abs(words.mean() - 1.2) < 0.01
    assert codec.encode(np.array([-0.3]), Randomness()).view(np.int32)[0] in (-2, -1)
    assert codec.encode(np.array([0.5]), Randomness()).view(np.int32)[0] == 2


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(SpecError, match="not finite"):
        FixedPoint.of(1.0, 2).encode(np.array([0.0, np.nan]))
