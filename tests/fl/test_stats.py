"""Statistics over parties against NumPy's of the pooled rows, with ragged and missing ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shardpar.errors import DataError, SpecError
from shardpar.fl.stats import (
    Ranges,
    group_by,
    histograms,
    moments,
    pearson,
    quantiles,
    resolution,
    stability_index,
    table,
)
from shardpar.fl.sums import Alone
from shardpar.fl.suppression import kept_cells, microaggregated
from tests.fl.analysis import together

RANGES = Ranges.of([(-8, 8), (0, 1000), (-1, 1)])
WIDTHS = RANGES.widths


@st.composite
def tables(draw):
    """Rows of each party: some have none, columns may be constant or missing altogether."""
    constant = draw(st.booleans())
    parts = []
    for _ in range(draw(st.integers(2, 3))):
        rows = draw(st.sampled_from([0, 1, 4, 20]))
        part = draw(arrays(np.float64, (rows, 3), elements=st.floats(0, 1), fill=st.nothing()))
        missing = draw(arrays(np.bool_, (rows, 3), elements=st.booleans()))
        part = np.array(RANGES.low) + part * WIDTHS
        part[:, 1] = 7.0 if constant else part[:, 1]
        parts.append(np.where(missing, np.nan, part))
    return parts


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


def cells_kept(parts, size, minimum):
    """(shown, left out) by the rule's words."""
    shown, left_out = np.zeros(size, int), 0
    for cells in parts:
        counts = np.bincount(cells, minlength=size)
        kept = kept_cells(counts, minimum)
        shown += np.where(kept, counts, 0)
        missing = counts[~kept].sum()
        left_out += missing if missing >= minimum else 0
    return shown, left_out


CELLS = st.lists(st.integers(0, 4), max_size=60).map(lambda c: np.array(c, np.int64))


@settings(max_examples=20, deadline=None)
@given(st.lists(CELLS, min_size=2, max_size=4), st.sampled_from([1, 5]))
def test_tables_count_what_is_not_left_out(parts, minimum):
    found = together(parts, lambda s, cells: table(s, cells, 5, minimum=minimum))
    shown, left_out = cells_kept(parts, 5, minimum)
    assert found.counts.tolist() == shown.tolist()
    assert found.left_out == left_out
    assert ((found.counts == 0) | (found.counts >= minimum)).all()
    assert found.left_out == 0 or found.left_out >= minimum
    if minimum == 1:
        assert found.counts.tolist() == np.bincount(np.concatenate(parts), minlength=5).tolist()


def test_a_cell_that_is_rare_is_seen_by_nobody():
    parts = [np.repeat([0, 1], [50, 3]), np.repeat([0, 1], [40, 4])]
    seen = []

    def work(sums, cells):
        add = sums.add

        def noted(label, words):
            seen.append(words.copy())
            return add(label, words)

        sums.add = noted
        return table(sums, cells, 2, minimum=5)

    found = together(parts, work)
    # Nor do the rest follow from it: 3 rows are missing unless another cell is missing too.
    assert found.counts.tolist() == [0, 0]
    assert found.left_out == 97
    assert all(w in (0, 53, 44) for words in seen for w in words.tolist())


@settings(max_examples=6, deadline=None)
@given(tables())
def test_histograms_are_numpys(parts):
    edges = [(-4.0, 0.0, 4.0), (10.0,), (-0.5, 0.5)]
    found = together(parts, lambda s, rows: histograms(s, rows, RANGES, edges, minimum=1))
    pooled = np.concatenate(parts)
    for at, inner in enumerate(edges):
        column = pooled[:, at]
        there = column[~np.isnan(column)]
        expected = np.histogram(there, [-np.inf, *inner, np.inf])[0]
        assert found[at].counts.tolist() == [*expected, np.isnan(column).sum()]


@settings(max_examples=10, deadline=None)
@given(tables(), st.sampled_from([1, 4]), st.integers(0, 99))
def test_groups_are_numpys(parts, minimum, seed):
    random = np.random.default_rng(seed)
    codes = [random.integers(0, 3, len(part)) for part in parts]
    found = together(
        list(zip(codes, parts, strict=True)),
        lambda s, part: group_by(s, part[0], 3, part[1], RANGES, minimum=minimum),
    )
    count, total = np.zeros((3, 3), int), np.zeros((3, 3))
    for code, part in zip(codes, parts, strict=True):
        there = ~np.isnan(part)
        for column in range(3):
            counts = np.bincount(code[there[:, column]], minlength=3)
            kept = kept_cells(counts, minimum)
            for group in np.flatnonzero(kept):
                mine = (code == group) & there[:, column]
                count[group, column] += mine.sum()
                total[group, column] += part[mine, column].sum()
    assert found.count.tolist() == count.tolist()
    error = len(parts) * count * WIDTHS * 2.0**-29
    assert (np.abs(found.total - total) <= error + 1e-9).all()
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    np.testing.assert_allclose(found.mean, mean, atol=1e-5)


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
    with pytest.raises(DataError, match="whole numbers from 0 to 1"):
        table(Alone(), np.array([2]), 2)
    with pytest.raises(SpecError, match="finite low end"):
        Ranges.of([(1, 1)])
    with pytest.raises(SpecError, match="shares between 0 and 1"):
        quantiles(Alone(), np.zeros((2, 3)), RANGES, (1.5,))
    with pytest.raises(SpecError, match="cells"):
        stability_index(np.ones(2), np.ones(3))


def test_stability_is_that_of_the_formula():
    then, now = np.array([100, 200, 700]), np.array([300, 300, 400])
    expected, actual = then / then.sum(), now / now.sum()
    direct = np.sum((actual - expected) * np.log(actual / expected))
    assert stability_index(then, now) == pytest.approx(direct, rel=0.01)
    assert np.isfinite(stability_index(np.array([0, 5]), np.array([5, 0])))
