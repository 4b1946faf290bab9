"""Requests of a step: every lookup finds its id, padding finds a -1, owners get only their own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import DataError
from shardpar.ps.asked import Call, HostFinder, Wanted
from shardpar.ps.placement import Placement

ROWS = 40
PLACEMENTS = (
    Placement(),
    Placement(rows=4),
    Placement(rows=4, deal="ranges"),
    Placement(rows=4, deal="ranges", extents=(1, 30, 0, 9)),
    Placement(rows=2, columns=2),
    Placement(replicated=True),
)


def finder(placement: Placement, capacity: int | None = None) -> HostFinder:
    calls = (Call(0, "a", (8, 3)), Call(0, "b", (8,)))
    return HostFinder(calls, (ROWS,), 4, (placement,), capacity)


def found(wanted: Wanted, devices: int = 4) -> list[np.ndarray]:
    """Of each call, the ids that its positions are of."""
    ids = wanted.ids[0].reshape(devices, -1)
    out = []
    for positions in wanted.positions:
        parts = positions.reshape(devices, -1)
        out.append(np.take_along_axis(ids, parts, axis=1).reshape(positions.shape))
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PLACEMENTS),
    st.lists(st.integers(-2, ROWS - 1), min_size=24, max_size=24),
    st.lists(st.integers(-2, ROWS - 1), min_size=8, max_size=8),
)
def test_every_lookup_finds_its_id_and_padding_finds_a_minus_one(placement, a, b):
    batch = {"a": np.array(a).reshape(8, 3), "b": np.array(b)}
    wanted = finder(placement)(batch)
    for name, ids in zip(("a", "b"), found(wanted), strict=True):
        np.testing.assert_array_equal(ids, np.maximum(batch[name], -1))
    for part in wanted.ids[0].reshape(4, -1):
        there = part[part >= 0]
        assert np.unique(there).size == there.size


@pytest.mark.parametrize("placement", [p for p in PLACEMENTS if p.rows > 1], ids=Placement.text)
def test_each_part_of_a_devices_requests_is_for_one_owner(placement):
    ids = np.random.default_rng(0).integers(-1, ROWS, (8, 3))
    wanted = finder(placement)({"a": ids, "b": ids[:, 0]})
    assert wanted.by_owner == (True,)
    for part in wanted.ids[0].reshape(4, placement.rows, -1):
        for owner, asked in enumerate(part):
            there = asked[asked >= 0]
            np.testing.assert_array_equal(placement.home(there, ROWS)[0], owner)


def test_more_than_the_capacity_is_not_laid_out_by_owner():
    batch = {"a": np.arange(24).reshape(8, 3), "b": np.arange(8)}
    assert finder(Placement(rows=4), capacity=2)(batch).by_owner == (False,)
    assert finder(Placement(rows=4))(batch).by_owner == (True,)


def test_no_owner_is_asked_for_more_than_the_capacity_and_one_place_of_padding():
    wanted = finder(Placement(rows=4), capacity=5)({"a": np.arange(24).reshape(8, 3) % 9,
                                                    "b": np.arange(8) % 9})  # fmt: skip
    assert wanted.by_owner == (True,)
    assert wanted.ids[0].size == 4 * 4 * 6


def test_after_three_overflows_a_table_keeps_to_rounds_and_to_one_program():
    find = finder(Placement(rows=4), capacity=2)
    few = {"a": np.zeros((8, 3), int), "b": np.zeros(8, int)}
    many = {"a": np.arange(24).reshape(8, 3), "b": np.arange(8)}
    seen = [find(batch).by_owner for batch in (few, many, few, many, few, many, few)]
    assert seen == [(way,) for way in (True, False, True, False, True, False, False)]
    np.testing.assert_array_equal(found(find(many))[0], many["a"])


def test_padding_is_spread_over_places():
    ids = np.full((8, 3), -1)
    ids[0, 0] = 4
    for placement in (Placement(), Placement(rows=4)):
        wanted = finder(placement)({"a": ids, "b": ids[:, 0]})
        np.testing.assert_array_equal(found(wanted)[0], ids)
        for device in wanted.positions[0].reshape(4, -1)[1:]:
            assert np.unique(device).size == device.size


def test_a_table_that_nothing_is_looked_up_in_wants_nothing():
    calls = (Call(0, "a", (8,)),)
    find = HostFinder(calls, (ROWS, 7), 4, (Placement(rows=4), Placement(rows=4)))
    wanted = find({"a": np.arange(8)})
    assert (wanted.ids[1] == -1).all()
    np.testing.assert_array_equal(found(wanted)[0], np.arange(8))


def test_all_ids_of_one_owner_go_in_rounds_instead_of_mostly_empty_parts():
    # 2,000 distinct ids of one owner would make parts of 2,048 for each of four.
    calls = (Call(0, "a", (8000,)),)
    find = HostFinder(calls, (80_000,), 4, (Placement(rows=4),))
    wanted = find({"a": np.arange(8000) * 4})
    assert wanted.by_owner == (False,)
    np.testing.assert_array_equal(found(wanted)[0], np.arange(8000) * 4)


def test_an_id_beyond_the_table_is_named():
    with pytest.raises(DataError, match="id 40 is asked for"):
        finder(Placement(rows=4))({"a": np.full((8, 3), ROWS), "b": np.zeros(8, int)})
