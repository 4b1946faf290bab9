"""What parties leave out: never fewer rows than the minimum, shown or missing."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardpar.fl.suppression import kept_cells, microaggregated

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=12).map(np.array)


@given(COUNTS, st.integers(1, 15))
def test_shown_and_missing_are_nothing_or_enough(counts, minimum):
    kept = kept_cells(counts, minimum)
    shown, missing = counts[kept], counts[~kept].sum()
    assert ((shown == 0) | (shown >= minimum)).all()
    assert missing == 0 or missing >= minimum or not (shown > 0).any()
    if counts.sum() >= minimum:
        assert missing == 0 or missing >= minimum


@given(COUNTS, st.integers(1, 15))
def test_no_more_is_left_out_than_must_be(counts, minimum):
    kept = kept_cells(counts, minimum)
    small = (counts > 0) & (counts < minimum)
    left_out = ~kept
    assert (left_out >= small).all()
    assert (left_out & ~small).sum() <= 1
    if not small.any():
        assert kept.all()
    if (left_out & ~small).any():
        assert counts[small].sum() < minimum
        assert counts[left_out & ~small][0] == counts[counts >= minimum].min()


def test_tables_of_two_dims_are_one_table():
    counts = np.array([[20, 3], [9, 30]])
    assert kept_cells(counts, 5).tolist() == [[True, False], [False, True]]


@given(
    st.lists(st.floats(-1e6, 1e6), max_size=60).map(np.array),
    st.integers(1, 12),
)
def test_blocks_are_large_enough_and_keep_order_and_sum(values, minimum):
    found = microaggregated(values, minimum)
    if len(values) < minimum:
        assert found.size == 0
        return
    assert found.size == values.size
    assert (np.diff(found) >= 0).all()
    np.testing.assert_allclose(found.sum(), values.sum(), atol=1e-6 * max(len(values), 1))
    _, counts = np.unique(found, return_counts=True)
    assert counts.min() >= minimum
    # Each value moves within its own block of fewer than twice the minimum.
    ordered = np.sort(values)
    for threshold in np.unique(found):
        moved = (found <= threshold).sum() - (ordered <= threshold).sum()
        assert abs(moved) < 2 * minimum


@given(st.lists(st.floats(-1e6, 1e6), max_size=60).map(np.array))
def test_blocks_of_one_change_nothing(values):
    np.testing.assert_array_equal(microaggregated(values, 1), np.sort(values))
