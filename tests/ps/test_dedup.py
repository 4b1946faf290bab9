"""Distinct ids against numpy.unique."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.ps.dedup import HostDedup, representatives, rounded_size, sorted_representatives

IDS = st.lists(st.integers(-1, 30), min_size=0, max_size=60)


@settings(max_examples=100, deadline=None)
@given(first=IDS, second=IDS)
def test_the_host_finds_each_id_once_and_every_lookup_its_own(
    first: list[int], second: list[int]
) -> None:
    dedup = HostDedup(31)
    for step in (first, second):
        ids = np.array(step, np.int32)
        found = dedup(ids)
        assert sorted(found.ids.tolist()) == sorted({i for i in step if i >= 0})
        there = ids >= 0
        np.testing.assert_array_equal(found.ids[found.positions[there]], ids[there])
        assert (found.positions[~there] == -1).all()


@pytest.mark.parametrize("how", ["scratch", "sort"])
def test_a_program_finds_one_position_for_each_id(how: str) -> None:
    ids = jnp.asarray(np.random.default_rng(0).integers(-1, 9, 50).astype(np.int32))
    if how == "scratch":
        winners, _ = representatives(ids, jnp.full(9, 77, jnp.int32))
    else:
        winners = sorted_representatives(ids)
    winners, ids = np.asarray(winners), np.asarray(ids)
    np.testing.assert_array_equal(ids[winners], ids)
    for value in range(9):
        assert len(set(winners[ids == value])) == 1
    alone = np.flatnonzero(ids < 0)
    np.testing.assert_array_equal(winners[alone], alone)


def test_sizes_are_few() -> None:
    sizes = {rounded_size(count) for count in range(1, 100_000, 97)}
    assert len(sizes) < 40
    assert all(rounded_size(count) >= count for count in range(1, 5000, 13))
