"""Homes of rows: every row has one place, and the place knows its row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import PlanError
from shardpar.ps.placement import Placement, whole_tables


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 40), shards=st.integers(1, 9), extents=st.booleans(), seed=st.integers(0, 9)
)
def test_places_and_rows_are_inverse(rows: int, shards: int, extents: bool, seed: int) -> None:
    placement = Placement(rows=shards)
    if extents:
        cuts = np.sort(np.random.default_rng(seed).integers(0, rows + 1, shards - 1))
        sizes = np.diff(np.concatenate([[0], cuts, [rows]]))
        placement = Placement(rows=shards, deal="ranges", extents=tuple(map(int, sizes)))
    shard, place = placement.home(np.arange(rows), rows)
    assert shard.min() >= 0
    assert shard.max() < shards
    assert place.max() < placement.shard_rows(rows)
    assert len({*zip(shard.tolist(), place.tolist(), strict=True)}) == rows
    np.testing.assert_array_equal(
        [
            placement.row_at(int(s), np.array([p]), rows)[0]
            for s, p in zip(shard, place, strict=True)
        ],
        np.arange(rows),
    )
    held = sum(
        int((placement.row_at(s, np.arange(placement.shard_rows(rows)), rows) >= 0).sum())
        for s in range(shards)
    )
    assert held == rows


@settings(max_examples=40, deadline=None)
@given(loads=st.lists(st.integers(1, 20), min_size=1, max_size=6), devices=st.integers(1, 3))
def test_whole_tables_are_near_the_best_balance(loads: list[int], devices: int) -> None:
    def fullest(dealt: tuple[int, ...]) -> int:
        held = [0] * devices
        for load, device in zip(loads, dealt, strict=True):
            held[device] += load
        return max(held)

    best = min(fullest(d) for d in itertools.product(range(devices), repeat=len(loads)))
    found = fullest(whole_tables(tuple(map(float, loads)), devices))
    assert found <= 4 / 3 * best + 1e-9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Placement(rows=0), "at least 1 shard"),
        (lambda: Placement(rows=2, replicated=True), "has no shards"),
        (lambda: Placement(rows=2, extents=(1, 2)), "write deal='ranges'"),
        (
            lambda: Placement(rows=2, deal="ranges", extents=(1, 2)).bounds(5),
            "hold 3 rows, but the table has 5",
        ),
        (lambda: Placement(columns=3).shard_columns(4), "columns=2 would fit"),
    ],
    ids=["none", "replicated", "extents", "sum", "columns"],
)
def test_what_does_not_fit_is_refused(make, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()
