"""Louvain and label propagation: modularity against networkx, planted groups, devices."""

from __future__ import annotations

import jax
import networkx as nx
import numpy as np
import pytest

from shardpar.errors import UserError
from shardpar.ps.graph.graph import from_arrays, simple
from shardpar.ps.graph.label_propagation import LabelOptions, label_propagation
from shardpar.ps.graph.louvain import louvain, modularity
from shardpar.ps.graph.sharded import label_propagation as sharded
from tests.ps.graph.graphs import karate, plain, random_graph


def planted(weighted=False):
    """Eight groups of 20, and which node is in which."""
    whole = nx.planted_partition_graph(8, 20, 0.6, 0.01, seed=1)
    ends = np.array(whole.edges())
    order = np.random.default_rng(0).permutation(160)
    weights = np.ones(len(ends)) * 2 if weighted else None
    group = np.empty(160, int)
    group[order] = np.arange(160) // 20
    return from_arrays(order[ends[:, 0]], order[ends[:, 1]], weights), group


def same(labels, group):
    pairs = set(zip(labels.tolist(), group.tolist(), strict=True))
    return len(pairs) == len(set(labels.tolist())) == len(set(group.tolist()))


def groups_of(labels):
    return [set(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]


@pytest.mark.parametrize("weighted", [False, True])
def test_modularity_is_that_of_networkx(weighted):
    graph = random_graph(2, weighted=weighted)
    labels = np.random.default_rng(0).integers(0, 5, graph.num_nodes)
    for resolution in (0.5, 1.0, 2.0):
        wanted = nx.community.modularity(
            plain(graph), groups_of(labels), weight="weight", resolution=resolution
        )
        assert modularity(simple(graph), labels, resolution) == pytest.approx(wanted)


@pytest.mark.parametrize("backend", ["igraph", "networkit"])
@pytest.mark.parametrize("weighted", [False, True])
def test_louvain_finds_planted_groups_and_networkx_finds_none_better(backend, weighted):
    graph, group = planted(weighted)
    found = louvain(graph, backend)
    assert same(found.labels, group)
    assert found.sizes.tolist() == [20] * 8
    club = karate()
    peer = nx.community.louvain_communities(plain(club), seed=0)
    best = nx.community.modularity(plain(club), peer)
    ours = louvain(club, backend)
    assert ours.modularity > best - 0.03
    assert ours.modularity == pytest.approx(
        nx.community.modularity(plain(club), groups_of(ours.labels))
    )


def test_louvain_by_igraph_is_repeatable_and_resolution_makes_groups_smaller():
    graph = random_graph(4, nodes=300, edges=900)
    assert (louvain(graph, seed=3).labels == louvain(graph, seed=3).labels).all()
    assert len(louvain(graph, resolution=3.0).sizes) > len(louvain(graph).sizes)
    for wrong in (0.0, float("nan")):
        with pytest.raises(UserError, match="resolution is"):
            louvain(graph, resolution=wrong)


@pytest.mark.parametrize("weighted", [False, True])
def test_labels_find_planted_groups_and_settle(weighted):
    graph, group = planted(weighted)
    labels = label_propagation(graph).labels
    assert same(labels, group)
    # No label among a node's neighbours weighs more than its own.
    graph = random_graph(5, weighted=weighted)
    labels, whole = label_propagation(graph).labels, plain(graph)
    for node in whole:
        weight = np.zeros(len(labels))
        for other, data in whole[node].items():
            weight[labels[other]] += data["weight"]
        assert weight[labels[node]] == weight.max()


@pytest.mark.parametrize("weighted", [False, True])
def test_labels_are_the_same_over_any_number_of_devices(weighted):
    graph = random_graph(6, nodes=200, edges=500, weighted=weighted)
    for options in (LabelOptions(seed=1), LabelOptions(max_iterations=1)):
        wanted = label_propagation(graph, options).labels.tolist()
        for devices in (1, 4):
            found = sharded.label_propagation(graph, options, jax.devices()[:devices])
            assert found.labels.tolist() == wanted


def test_labels_are_not_swapped_for_ever():
    pairs = np.arange(400).reshape(200, 2)
    assert label_propagation(from_arrays(pairs[:, 0], pairs[:, 1])).sizes.tolist() == [2] * 200
    sides = np.array([(a, 8 + b) for a in range(8) for b in range(8)])
    found = label_propagation(from_arrays(sides[:, 0], sides[:, 1]))
    assert found.sizes.tolist() == [16]


def test_graphs_without_edges_have_communities_of_one():
    graph = from_arrays([], [], num_nodes=3)
    for found in (
        label_propagation(graph), sharded.label_propagation(graph), louvain(graph),
        louvain(graph, "networkit"),
    ):  # fmt: skip
        assert found.labels.tolist() == [0, 1, 2]
        assert found.modularity == 0
    with pytest.raises(UserError, match="max_iterations is 0"):
        LabelOptions(max_iterations=0)
