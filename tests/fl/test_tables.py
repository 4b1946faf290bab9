"""Tables over parties against NumPy's of the pooled rows, cell by cell."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import DataError, SpecError
from shardpar.fl.sums import Alone
from shardpar.fl.suppression import kept_cells
from shardpar.fl.tables import group_by, histograms, stability_index, table
from tests.fl.analysis import RANGES, WIDTHS, tables, together


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


def test_cells_that_are_none_are_refused():
    with pytest.raises(DataError, match="whole numbers from 0 to 1"):
        table(Alone(), np.array([2]), 2)
    with pytest.raises(DataError, match="whole numbers from 0 to 1"):
        table(Alone(), np.array([-1]), 2)
    with pytest.raises(DataError, match="1 groups for 2 rows"):
        group_by(Alone(), np.array([0]), 2, np.zeros((2, 3)), RANGES)
    with pytest.raises(SpecError, match="cells"):
        stability_index(np.ones(2), np.ones(3))


def test_stability_is_that_of_the_formula():
    then, now = np.array([100, 200, 700]), np.array([300, 300, 400])
    expected, actual = then / then.sum(), now / now.sum()
    direct = np.sum((actual - expected) * np.log(actual / expected))
    assert stability_index(then, now) == pytest.approx(direct, rel=0.01)
    assert np.isfinite(stability_index(np.array([0, 5]), np.array([5, 0])))
