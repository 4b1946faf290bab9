"""Alias tables: the chances that a table gives are exactly those of the weights."""

from __future__ import annotations

import numpy as np
import pytest

from shardpar.errors import DataError
from shardpar.ps.algorithms.alias import alias_tables


def chances(table):
    """What each entry is drawn for within its row, from the table itself."""
    given = table.keep.copy()
    np.add.at(given, table.other, 1 - table.keep)
    sizes = np.diff(table.starts)
    return given / np.repeat(sizes, sizes)


@pytest.mark.parametrize("seed", range(40))
def test_each_entry_is_drawn_as_often_as_its_weight_says(seed):
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 12, random.integers(1, 30))
    starts = np.append(0, np.cumsum(sizes))
    weights = random.random(starts[-1]) ** random.integers(1, 9)
    if seed % 3 == 0:
        weights = random.integers(1, 4, starts[-1]).astype(float)
    if seed % 4 == 0:
        weights[random.random(len(weights)) < 0.3] = 0
        weights[starts[:-1][sizes > 0]] = 0.5
    table = alias_tables(starts, weights)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    assert (rows[table.other] == rows).all()
    np.testing.assert_allclose(
        chances(table), weights / np.bincount(rows, weights, len(sizes))[rows], atol=1e-12
    )


def test_draws_follow_the_table():
    table = alias_tables(np.array([0, 1, 4]), np.array([2.0, 1.0, 0.0, 3.0]))
    drawn = table.draw(np.repeat([0, 1], 20_000), np.random.default_rng(0))
    assert (drawn[:20_000] == 0).all()
    share = np.bincount(drawn[20_000:], minlength=4)[1:] / 20_000
    np.testing.assert_allclose(share, [0.25, 0, 0.75], atol=0.02)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([1.0, -1.0], "the weight of entry 1 is -1.0; weights are finite, not negative"),
        ([1.0, np.nan], "the weight of entry 1 is nan"),
        ([0.0, 0.0], "all 2 weights of row 0 are 0"),
    ],
)
def test_weights_that_are_none_are_refused(weights, says):
    with pytest.raises(DataError, match=says):
        alias_tables(np.array([0, 2]), np.array(weights))
