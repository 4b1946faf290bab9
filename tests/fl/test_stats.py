"""Statistics over parties against NumPy's of the pooled rows, with ragged and missing ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import DataError, SpecError
from shardpar.fl.stats import Ranges, moments, pearson, quantiles, resolution
from shardpar.fl.sums import Alone
from shardpar.fl.suppression import microaggregated
from shardpar.fl.tables import table
from tests.fl.analysis import RANGES, WIDTHS, tables, together


def counted_parts(parts, minimum):
    """Pooled rows without the columns of parties that have too few values, by the rule's words."""
    pooled = []
    for part in parts:
        part = part.copy()
        for column in part.T:
            if np.count_nonzero(~np.isnan(column)) < minimum:
                column[:] = np.nan
        pooled.append(part)
    return np.concatenate(pooled)


@settings(max_examples=12, deadline=None)
@given(tables(), st.sampled_from([1, 3]))
def test_moments_are_numpys(parts, minimum):
    found = together(parts, lambda s, rows: moments(s, rows, RANGES, minimum=minimum))
    pooled, parties = counted_parts(parts, minimum), len(parts)
    count = np.count_nonzero(~np.isnan(pooled), axis=0)
    assert found.count.tolist() == count.tolist()
    some = count > 0
    assert np.isnan(found.mean[~some]).all()
    assert np.isnan(found.variance[~some]).all()
    error = parties * WIDTHS[some] * 2.0**-29
    assert (np.abs(found.mean[some] - np.nanmean(pooled[:, some], axis=0)) <= error).all()
    variance = np.nanvar(pooled[:, some], axis=0)
    error = parties * variance * 2.0**-28 + error**2
    assert (np.abs(found.variance[some] - variance) <= error + 1e-12).all()


LEVELS = (0.0, 0.1, 0.25, 0.5, 0.9, 1.0)


def numpys_quantiles(columns):
    return np.stack(
        [
            np.quantile(c, LEVELS, method="averaged_inverted_cdf") if c.size else [np.nan] * 6
            for c in columns
        ]
    )


@settings(max_examples=8, deadline=None)
@given(tables(), st.sampled_from([1, 4]))
def test_quantiles_are_numpys(parts, minimum):
    found = together(parts, lambda s, rows: quantiles(s, rows, RANGES, LEVELS, minimum=minimum))
    columns = [
        np.concatenate([microaggregated(part[~np.isnan(part[:, c]), c], minimum) for part in parts])
        for c in range(3)
    ]
    expected = numpys_quantiles(columns)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    error = np.where(np.isnan(expected), 0, np.nan_to_num(np.abs(found - expected)))
    assert (error <= resolution(RANGES)[:, None] / 2 * (1 + 1e-6) + 1e-12).all()


def test_quantiles_of_few_neighbours_are_off_by_few_ranks():
    rows = np.random.default_rng(0).uniform(-8, 8, (3000, 1))
    parts, ranges = np.array_split(rows, [200, 900]), Ranges.of([(-8, 8)])
    levels = np.linspace(0.1, 0.9, 9)
    found = together(parts, lambda s, r: quantiles(s, r, ranges, levels, minimum=10))[0]
    ranks = np.searchsorted(np.sort(rows[:, 0]), found)
    assert (np.abs(ranks - levels * 3000) <= 3 * 20).all()


def test_correlations_are_numpys():
    random = np.random.default_rng(1)
    rows = random.normal(0, 1, (400, 4))
    rows[:, 1] = 0.9 * rows[:, 0] + 0.1 * rows[:, 1]
    rows[:, 2] = -rows[:, 0]
    rows[:, 3] = 2.5
    rows[::17, 0] = np.nan
    rows = np.clip(rows, -4, 4)
    parts = [*np.array_split(rows, [30, 170]), rows[:0]]
    ranges = Ranges.of([(-4, 4)] * 4)
    found = together(parts, lambda s, part: pearson(s, part, ranges))
    there = rows[~np.isnan(rows).any(axis=1)]
    expected = np.corrcoef(there[:, :3].T)
    np.testing.assert_allclose(found[:3, :3], expected, atol=4 * 2.0**-26)
    assert np.isnan(found[3]).all()
    assert np.isnan(found[:, 3]).all()


def test_a_party_of_few_rows_adds_nothing():
    rows = np.random.default_rng(2).uniform(0, 1, (100, 1))
    ranges, few = Ranges.of([(0, 1)]), np.full((9, 1), 0.999)
    for work in (
        lambda s, part: moments(s, part, ranges),
        lambda s, part: quantiles(s, part, ranges, (0.5,)),
        lambda s, part: table(s, (part[:, 0] > 0.5).astype(int), 2),
        lambda s, part: pearson(s, np.hstack([part, part**2]), Ranges.of([(0, 1)] * 2)),
    ):
        with_few = together([rows[:50], rows[50:], few], work)
        without = together([rows[:50], rows[50:], few[:0]], work)
        np.testing.assert_equal(vars_of(with_few), vars_of(without))


def vars_of(value):
    return value if isinstance(value, np.ndarray) else vars(value)


def test_values_beyond_their_range_are_named_by_column_only():
    with pytest.raises(DataError, match="column 1 has values beyond 0 to 1000") as caught:
        moments(Alone(), np.array([[0.0, 4321.0, 0.0]]), RANGES)
    assert "4321" not in str(caught.value)
    with pytest.raises(DataError, match="3 columns have ranges"):
        moments(Alone(), np.zeros((2, 2)), RANGES)
    with pytest.raises(SpecError, match="finite low end"):
        Ranges.of([(1, 1)])
    with pytest.raises(SpecError, match="shares between 0 and 1"):
        quantiles(Alone(), np.zeros((2, 3)), RANGES, (1.5,))
