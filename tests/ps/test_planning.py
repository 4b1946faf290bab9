"""Placements chosen from frequencies: what is counted, what is cheapest, what fits."""

from __future__ import annotations

import numpy as np
import pytest

from shardpar import ps
from shardpar.errors import InfeasibleError
from shardpar.ps.planning import Frequencies, capacity_for, choose, held, moved
from shardpar.ps.table import Table

TABLE = Table(1000, 8, ps.AdaGrad())


def zipf(rows: int = 1000) -> Frequencies:
    shares = 1 / np.arange(1, rows + 1)
    return Frequencies(shares / shares.sum(), 5.0)


def test_distinct_ids_are_as_many_as_drawing_them_gives() -> None:
    draw, known = np.random.default_rng(0), zipf()
    seen = [np.unique(draw.choice(1000, 500, p=known.shares)).size for _ in range(200)]
    assert known.distinct(100) == pytest.approx(np.mean(seen), rel=0.01)


def test_a_sample_is_counted_without_its_padding() -> None:
    found = Frequencies.of(np.array([[3, 3, -1], [5, -1, -1]]))
    np.testing.assert_allclose(found.shares, [2 / 3, 1 / 3])
    assert found.lookups == 1.5
    assert (found.covering(0.6), found.covering(0.7)) == (1, 2)


def test_the_placement_moves_the_fewest_bytes_of_those_that_fit() -> None:
    known, tried = zipf(), [ps.Placement(rows=4), ps.Placement(rows=2, columns=2),
                            ps.Placement(columns=4), ps.Placement(replicated=True)]  # fmt: skip
    share = known.distinct(16)
    for memory in (1e9, 40_000.0, 16_000.0):
        found = choose(
            TABLE, known, global_batch=64, devices=4, memory_bytes=memory, columns=(2, 4)
        )
        fitting = [p for p in tried if held(TABLE, p) <= memory]
        assert found.peak_bytes <= memory
        assert found.moved_bytes == min(moved(TABLE, p, share, 4) for p in fitting)


def test_what_rows_move_is_each_row_and_its_gradient_to_three_of_four_owners() -> None:
    # Ids go twice, with the pull and with the push.
    want = 100 * 3 / 4 * (2 * 8 * 4 + 2 * 4)
    assert moved(TABLE, ps.Placement(rows=4), 100, 4) == want
    assert held(TABLE, ps.Placement(rows=4)) == 250 * 2 * 8 * 4


def test_a_table_that_fits_nowhere_says_how_much_is_missing() -> None:
    with pytest.raises(InfeasibleError, match="more than there is; use more devices"):
        choose(TABLE, zipf(), global_batch=64, devices=4, memory_bytes=1000.0)


def test_one_round_holds_what_luck_brings() -> None:
    draw = np.random.default_rng(1)
    most = max(np.bincount(draw.integers(0, 8, 2000), minlength=8).max() for _ in range(500))
    assert 2000 / 8 < most <= capacity_for(2000, 8) < 2 * 2000 / 8
