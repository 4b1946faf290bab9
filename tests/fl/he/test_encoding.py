"""Encodings give back what went in, negatives too, and refuse what does not fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.fl.he import paillier
from shardpar.fl.he.encoding import FixedPoint
from shardpar.fl.he.packing import Packing

SECRET = paillier.generate(768, unsafe_small_key_for_tests=True)


@given(st.lists(st.floats(-1000, 1000), max_size=20), st.integers(0, 80))
def test_fixed_point_is_off_by_half_a_step_at_most(numbers, bits):
    fixed = FixedPoint(bits, 1000.0)
    encoded = fixed.encode(numbers)
    assert all(abs(number) <= fixed.most_encoded for number in encoded)
    error = np.abs(fixed.decode(encoded) - np.array(numbers, float))
    assert np.all(error <= 0.5 / 2.0**bits)


@pytest.mark.parametrize("bad", [1.01, -1.01, np.inf, -np.inf, np.nan])
def test_fixed_point_refuses_what_is_beyond(bad):
    with pytest.raises(OverflowError, match="clip"):
        FixedPoint(8, 1.0).encode([0.0, bad])


@given(
    most=st.integers(1, 2**70),
    additions=st.integers(1, 1000),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_sums_of_packed_numbers_unpack_to_the_sums(most, additions, data):
    packing = Packing.of(SECRET.public, most=most, additions=additions)
    count = data.draw(st.integers(1, 2 * packing.slots))
    extreme = st.sampled_from([-most, most, 0]) | st.integers(-most, most)
    values = data.draw(st.lists(extreme, min_size=count, max_size=count))
    packed = packing.pack(values)
    assert len(packed) == packing.count(count)
    sums = [number * additions for number in packed]
    assert all(abs(number) <= SECRET.public.most for number in sums)
    assert packing.unpack(sums, count) == [value * additions for value in values]


@given(additions=st.integers(1, 1000), sign=st.sampled_from([-1, 1]), slot=st.integers(0, 3))
def test_one_addition_too_many_is_noticed(additions, sign, slot):
    packing = Packing.of(SECRET.public, most=100, additions=additions)
    values = [0] * 4
    values[slot] = sign * 100
    [packed] = packing.pack(values)
    with pytest.raises(OverflowError, match="state more additions"):
        packing.unpack([packed * (additions + 1)], 4)


def test_packing_refuses_what_does_not_fit():
    packing = Packing.of(SECRET.public, most=100)
    with pytest.raises(OverflowError, match="101"):
        packing.pack([101])
    with pytest.raises(OverflowError, match="-101"):
        packing.pack([-101])
    with pytest.raises(OverflowError, match="larger key"):
        Packing.of(SECRET.public, most=1 << 768)
    with pytest.raises(ValueError, match="not in 2"):
        packing.unpack([1, 2], 1)
    with pytest.raises(OverflowError):
        packing.unpack([1 << packing.slot_bits], 1)


def test_packing_ciphertexts_equals_packing_numbers():
    packing = Packing.of(SECRET.public, most=2**20, additions=16)
    assert packing.slots > 10
    values = [(-1) ** i * (2**20 - i) for i in range(packing.slots + 3)]
    held = SECRET.public.encrypt(values).times([16] * len(values))
    packed = packing.pack_ciphertexts(held)
    assert len(packed) == 2
    numbers = SECRET.decrypt(packed.rerandomised())
    assert packing.unpack(numbers, len(values)) == [16 * value for value in values]
