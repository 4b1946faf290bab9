"""DeepWalk, node2vec and LINE find planted groups, on graphs with held-out edges."""

from __future__ import annotations

import jax
import networkx
import numpy as np
import pytest

from shardpar.ps.algorithms import deepwalk, node2vec
from shardpar.ps.algorithms.deepwalk import DeepWalkOptions
from shardpar.ps.algorithms.link_prediction import link_auc, split_edges
from shardpar.ps.algorithms.node2vec import Node2VecOptions
from shardpar.ps.algorithms.word2vec import Word2VecOptions

from .graphs import planted

NODES = 300
SOURCES, TARGETS, GROUP = planted(NODES, 10, 16, 0.05, seed=0)
SPLIT = split_edges(NODES, SOURCES, TARGETS, share=0.2)
MODEL = Word2VecOptions(dim=32, window=4)
ONE = jax.devices()[:1]


def best_possible():
    """The AUC of someone who knows the groups and nothing else."""
    return link_auc(np.eye(10)[GROUP], SPLIT)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (deepwalk, DeepWalkOptions(20, 10, model=MODEL)),
        (node2vec, Node2VecOptions(20, 10, p=2.0, q=0.5, model=MODEL)),
    ],
    ids=["deepwalk", "node2vec"],
)
def test_held_out_edges_are_told_from_pairs_that_are_none(method, options):
    found = method.fit(options, NODES, SPLIT.sources, SPLIT.targets, devices=ONE)
    assert best_possible() > 0.88
    assert link_auc(found.vectors, SPLIT) > best_possible() - 0.05
    assert link_auc(found.vectors, SPLIT, "hadamard") > best_possible() - 0.05


def test_the_two_halves_of_the_karate_club_part():
    graph = networkx.karate_club_graph()
    options = Node2VecOptions(20, 40, model=Word2VecOptions(dim=16, window=3))
    found = node2vec.fit(options, 34, *np.array(graph.edges()).T, devices=ONE)
    club = np.array([graph.nodes[node]["club"] == "Officer" for node in graph])
    same = np.array([np.mean(club[found.nearest(node, 5)] == club[node]) for node in graph])
    assert same.mean() > 0.85
