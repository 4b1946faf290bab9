from __future__ import annotations

import numpy as np
import pytest

from shardpar.errors import DataError
from shardpar.ps.graph.planted import planted


def test_most_edges_are_inside_groups_and_the_degree_is_what_was_asked_for():
    made = planted(4000, 10, 20, 0.3, seed=1)
    sources, targets = made.graph.sources, made.graph.targets
    same = made.groups[sources] == made.groups[targets]
    # Of those that end anywhere, a tenth happen to end inside.
    assert same.mean() == pytest.approx(0.7 + 0.3 / 10, abs=0.01)
    assert 2 * len(sources) / 4000 == pytest.approx(20, rel=0.01)
    assert (sources != targets).all()
    assert np.bincount(made.groups).tolist() == [400] * 10


def test_the_seed_decides():
    one, same, other = (planted(50, 5, 4, 0.1, seed).graph.targets for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_groups_of_one_node_are_refused():
    with pytest.raises(DataError, match="at least 60 nodes"):
        planted(40, 30, 4, 0.0, seed=0)
