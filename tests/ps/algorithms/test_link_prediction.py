"""Link prediction: splits that keep graphs together, and AUC as scikit-learn has it."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from shardpar.errors import ConfigError, DataError
from shardpar.ps.algorithms.link_prediction import link_auc, split_edges

from .graphs import planted


def parts(nodes, sources, targets):
    matrix = sparse.csr_array((np.ones(len(sources)), (sources, targets)), (nodes, nodes))
    return connected_components(matrix, directed=False)[0]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_rest_is_as_connected_as_the_graph(share):
    sources, targets, _ = planted(300, 3, 6, 0.1, seed=0)
    split = split_edges(300, sources, targets, share=share, seed=1)
    assert parts(300, split.sources, split.targets) == parts(300, sources, targets)
    whole = {frozenset(edge) for edge in zip(sources.tolist(), targets.tolist(), strict=True)}
    held = {frozenset(pair) for pair in split.held.tolist()}
    known = {frozenset(e) for e in zip(split.sources.tolist(), split.targets.tolist(), strict=True)}
    absent = {frozenset(pair) for pair in split.absent.tolist()}
    assert held | known == whole
    assert not held & known
    assert not absent & whole
    assert len(absent) == len(held) == len(split.held) == len(split.absent)
    if share < 0.6:
        assert len(held) == round(share * len(whole))


def test_weights_stay_with_their_edges():
    graph = networkx.karate_club_graph()
    edges = np.array(graph.edges())
    weights = edges @ [1.0, 100.0] + 1
    split = split_edges(34, *edges.T, weights, share=0.3)
    np.testing.assert_array_equal(
        split.weights, np.stack([split.sources, split.targets], 1) @ [1.0, 100.0] + 1
    )


def test_a_tree_has_no_edge_to_hold_out():
    with pytest.raises(DataError, match="no edge can be held out"):
        split_edges(3, [0, 1], [1, 2])


def test_of_a_complete_graph_nothing_is_absent():
    with pytest.raises(DataError, match="all pairs of nodes are edges"):
        split_edges(3, [0, 1, 2], [1, 2, 0])


def test_a_share_is_below_one():
    with pytest.raises(ConfigError, match="share"):
        split_edges(3, [0, 1], [1, 2], share=1.0)


def test_vectors_that_know_the_groups_score_high_and_random_ones_do_not():
    sources, targets, group = planted(200, 4, 12, 0.0, seed=0)
    split = split_edges(200, sources, targets)
    random = np.random.default_rng(0).standard_normal((200, 4))
    assert link_auc(np.eye(4)[group], split) > 0.85
    assert abs(link_auc(random, split) - 0.5) < 0.1
    # A column that misleads a dot product; the regression gives it no weight.
    misled = np.concatenate([np.eye(4)[group], 3 * random[:, :1]], axis=1)
    assert link_auc(misled, split, "hadamard") > 0.85 > link_auc(misled, split)
