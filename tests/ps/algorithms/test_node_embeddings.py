"""DeepWalk, node2vec and LINE find planted groups, on graphs with held-out edges."""

from __future__ import annotations

import jax
import networkx
import numpy as np
import pytest

from shardpar.ps.algorithms import deepwalk, line, node2vec
from shardpar.ps.algorithms.deepwalk import DeepWalkOptions
from shardpar.ps.algorithms.line import LineOptions, edge_loss
from shardpar.ps.algorithms.link_prediction import link_auc, split_edges
from shardpar.ps.algorithms.node2vec import Node2VecOptions

from .graphs import planted

NODES = 300
SOURCES, TARGETS, GROUP = planted(NODES, 10, 16, 0.05, seed=0)
SPLIT = split_edges(NODES, SOURCES, TARGETS, share=0.2)
MODEL = {"dim": 32, "window": 4}
ONE = jax.devices()[:1]


def best_possible():
    """The AUC of someone who knows the groups and nothing else."""
    return link_auc(np.eye(10)[GROUP], SPLIT)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (deepwalk, DeepWalkOptions(20, 10, **MODEL)),
        (node2vec, Node2VecOptions(20, 10, p=2.0, q=0.5, **MODEL)),
        (line, LineOptions(64, "both")),
    ],
    ids=["deepwalk", "node2vec", "line"],
)
def test_held_out_edges_are_told_from_pairs_that_are_none(method, options):
    found = method.fit(options, NODES, SPLIT.sources, SPLIT.targets, devices=ONE)
    assert best_possible() > 0.88
    assert link_auc(found.vectors, SPLIT) > best_possible() - 0.05
    assert link_auc(found.vectors, SPLIT, "hadamard") > best_possible() - 0.05


def test_the_two_halves_of_the_karate_club_part():
    graph = networkx.karate_club_graph()
    options = Node2VecOptions(20, 40, dim=16, window=3)
    found = node2vec.fit(options, 34, *np.array(graph.edges()).T, devices=ONE)
    club = np.array([graph.nodes[node]["club"] == "Officer" for node in graph])
    same = np.array([np.mean(club[found.nearest(node, 5)] == club[node]) for node in graph])
    assert same.mean() > 0.85


def test_lines_gradients_are_those_of_its_loss():
    random = np.random.default_rng(0)
    rows = tuple(random.standard_normal((3, n, 4)).astype(np.float32) for n in (5, 5, 2))

    def loss(rows):
        source, target, noise = rows
        edges = jax.nn.log_sigmoid((source * target).sum(-1)).sum()
        others = jax.nn.log_sigmoid(-(source[:, :, None] * noise[:, None]).sum(-1)).sum()
        return -edges - 6 / 2 * others

    gradients, value, weight = jax.jit(lambda rows: edge_loss(6)(rows, {}))(rows)
    for got, want in zip(gradients, jax.jit(jax.grad(loss))(rows), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(value, jax.jit(loss)(rows), rtol=1e-5)
    assert weight == 15


def test_line_draws_edges_by_weight():
    """All nodes are linked; only the weights say which belong together."""
    ends = np.triu_indices(24, 1)
    group = np.arange(24) % 3
    weights = np.where(group[ends[0]] == group[ends[1]], 10.0, 0.2)
    options = LineOptions(16, "second", samples_per_edge=200)
    found = line.fit(options, 24, *ends, weights, devices=ONE)
    same = [np.mean(group[found.nearest(node, 5)] == group[node]) for node in range(24)]
    assert np.mean(same) > 0.95


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"order": "third"}, "'third'"), ({"dim": 5}, "even"), ({"samples_per_edge": 0}, "above 0")],
)
def test_options_of_line_are_checked(wrong, says):
    with pytest.raises(ValueError, match=says):
        LineOptions(**wrong)
