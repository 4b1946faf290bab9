"""Encrypted sums beside plain ones, and how many multiplications they take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.fl.he import paillier
from shardpar.fl.he.pool import Pool
from shardpar.fl.vertical.bins import Bins, histogram_of
from shardpar.fl.vertical.histograms import (
    EncryptedHistogram,
    opened,
    pair_packing,
    pairs_of,
    stacked,
    sums_by_bin,
)

SECRET = paillier.generate(512, unsafe_small_key_for_tests=True)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 40), st.integers(1, 4), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(0, 99)
)
def test_what_splits_have_on_their_left_is_the_sum_in_the_clear(rows, columns, zeros, seed):
    random = np.random.default_rng(seed)
    x = np.round(random.normal(size=(rows, columns)))
    x[random.random(x.shape) < zeros] = 0
    x[random.random(x.shape) < 0.2] = np.nan
    first, second = random.integers(-999, 1000, rows), random.integers(0, 1000, rows)
    bins = Bins.of(x, most=5)
    binned = bins.sorted(x)
    packing = pair_packing(SECRET.public, 1000, rows)
    held = SECRET.public.encrypt(pairs_of(packing, first, second))
    histogram = EncryptedHistogram(SECRET.public, columns, bins.width)
    with Pool(1) as pool:
        histogram.add(held.values[: rows // 2], binned[: rows // 2], pool)
        histogram.add(held.values[rows // 2 :], binned[rows // 2 :], pool)
    numbers = SECRET.decrypt(stacked(packing, histogram.left_of(bins)))
    found = opened(packing, numbers, len(bins.splits))
    for sums, plain in zip(found, (first, second), strict=True):
        expected = bins.splits.left_of(bins, histogram_of(binned, bins.width, plain))
        assert sums.tolist() == expected.tolist()
    for at in range(len(bins.splits)):
        goes = bins.splits.goes_left(bins, at, binned)
        assert first[goes].sum() == found[0][at]


def test_a_sparse_column_is_not_added_up_row_by_row(monkeypatch):
    binned = np.zeros((100, 6), np.int64)
    binned[:3] = 1
    held, added = SECRET.public.encrypt(range(100)), []
    sums = type(held).sums

    def counted(self, groups, count):
        added.append(sum(group >= 0 for group in groups))
        return sums(self, groups, count)

    monkeypatch.setattr(type(held), "sums", counted)
    found = sums_by_bin(held, binned, 2)
    assert added == [3] * 6
    numbers = SECRET.decrypt(type(held)(SECRET.public, found))
    assert numbers == [sum(range(3, 100)), 3] * 6


def test_numbers_beyond_the_slots_are_refused():
    packing = pair_packing(SECRET.public, 1000, 10)
    with pytest.raises(OverflowError, match="1001"):
        pairs_of(packing, np.array([-1001]), np.array([1]))
    with pytest.raises(OverflowError, match="two slots"):
        pair_packing(SECRET.public, 1 << 300, 10)
    with pytest.raises(OverflowError, match="more than 10 values"):
        opened(packing, [11 * 1000], 1)
