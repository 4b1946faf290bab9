"""The id map against a plain dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import DataError
from shardpar.ps.ids import IdMap, IdOptions


def test_ids_keep_their_rows_and_no_two_share_one() -> None:
    ids = IdMap(2000)
    draw, expected = np.random.default_rng(0), {}
    for _ in range(20):
        wide = draw.integers(-(2**62), 2**62, 300)
        wide[:100] = draw.choice(list(expected) or [5], 100)
        mapped = ids(wide)
        for row, fresh in zip(mapped.fresh_rows.tolist(), mapped.fresh_ids.tolist(), strict=True):
            for gone in [key for key, at in expected.items() if at == row]:
                assert gone in mapped.evicted_ids
                del expected[gone]
            expected[fresh] = row
        assert [expected.get(key, -1) for key in wide.tolist()] == mapped.rows.tolist()
        assert len(set(expected.values())) == len(expected)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=12),
    rows=st.integers(1, 20),
)
def test_the_least_recently_used_go_first(steps: list[list[int]], rows: int) -> None:
    ids = IdMap(rows, IdOptions(evict="lru"))
    used: dict[int, int] = {}
    for number, step in enumerate(steps):
        mapped = ids(np.array(step))
        for gone in mapped.evicted_ids.tolist():
            waiting = [used[key] for key in used if key not in step]
            assert used[gone] == min(waiting), "an id used later went before it"
            del used[gone]
        for key, row in zip(step, mapped.rows.tolist(), strict=True):
            if row >= 0:
                used[key] = number
        assert len(used) == len(ids) <= rows
        # Only where a step has more ids than rows may one stay without.
        assert (mapped.rows >= 0).all() or len(set(step)) > rows


def test_the_least_frequent_go_first_where_asked() -> None:
    ids = IdMap(3, IdOptions(evict="lfu"))
    for step in ([1, 1, 2, 3], [3], [2, 2]):
        ids(np.array(step))
    # Counts: 1 twice, 2 three times, 3 twice; of 1 and 3 the one used longest ago goes.
    assert ids(np.array([9])).evicted_ids.tolist() == [1]


def test_ids_not_seen_for_long_make_room_and_nobody_does_where_told() -> None:
    ids = IdMap(2, IdOptions(evict="never", ttl_steps=2))
    ids(np.array([1, 2]))
    assert ids(np.array([2, 3])).rows.tolist() == [1, -1]
    ids(np.array([2]))
    step = ids(np.array([3]))
    assert step.evicted_ids.tolist() == [1]
    assert step.rows.tolist() == [0]


def test_an_id_gets_a_row_when_seen_often_enough() -> None:
    ids = IdMap(4, IdOptions(admit_after=3))
    assert ids(np.array([7, 8])).rows.tolist() == [-1, -1]
    assert ids(np.array([7])).rows.tolist() == [-1]
    step = ids(np.array([7, 8]))
    assert step.rows.tolist() == [0, -1]
    assert step.fresh_ids.tolist() == [7]


def test_a_restored_map_goes_on_as_the_one_that_was_saved() -> None:
    options = IdOptions(admit_after=2, evict="lfu")
    ids, draw = IdMap(30, options), np.random.default_rng(1)
    for _ in range(10):
        ids(draw.integers(0, 60, 20))
    other = IdMap.restored(ids.arrays(), options)
    for _ in range(10):
        step = draw.integers(0, 60, 20)
        ours, theirs = ids(step), other(step)
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_array_equal(ours.evicted_ids, theirs.evicted_ids)


def test_the_number_of_empty_places_is_refused() -> None:
    with pytest.raises(DataError, match="marks empty places"):
        IdMap(3)(np.array([-(2**63)]))
