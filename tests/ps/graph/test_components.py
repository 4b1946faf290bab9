"""Components against networkx, on one host and over devices."""

from __future__ import annotations

import jax
import networkx as nx
import numpy as np
import pytest

from shardpar.ps.graph.components import by_size, components
from shardpar.ps.graph.graph import from_arrays
from shardpar.ps.graph.sharded import components as sharded
from tests.ps.graph.graphs import multigraph, random_graph


def numbered(groups):
    """The labels by the rule: falling size, then the first node."""
    order = sorted(groups, key=lambda g: (-len(g), min(g)))
    return {node: label for label, group in enumerate(order) for node in group}


@pytest.mark.parametrize("edges", [0, 20, 60, 500])
def test_components_are_those_of_networkx(edges):
    for seed in range(4):
        graph = random_graph(seed, edges=edges, skewed=False)
        whole = multigraph(graph, directed=True)
        weak, strong = components(graph), components(graph, strong=True)
        for found, groups in (
            (weak, nx.weakly_connected_components(whole)),
            (strong, nx.strongly_connected_components(whole)),
        ):
            wanted = numbered(list(groups))
            assert dict(enumerate(found.labels.tolist())) == wanted
            assert found.sizes.tolist() == np.bincount(list(wanted.values())).tolist()
        if seed == 0:
            for devices in (1, 4):
                spread = sharded.components(graph, jax.devices()[:devices])
                assert spread.labels.tolist() == weak.labels.tolist()


def test_long_paths_and_many_small_components():
    path = np.random.default_rng(0).permutation(5000)
    assert components(from_arrays(path[:-1], path[1:])).sizes.tolist() == [5000]
    cut = np.arange(1, 5000) % 5 > 0
    wanted = components(from_arrays(path[:-1][cut], path[1:][cut], num_nodes=5000))
    assert wanted.sizes.tolist() == [5] * 1000
    spread = sharded.components(
        from_arrays(path[:-1][cut], path[1:][cut], num_nodes=5000), jax.devices()[:4]
    )
    assert spread.labels.tolist() == wanted.labels.tolist()


def test_nodes_that_hang_on_the_giant_component_by_one_edge_either_way_belong_to_it():
    core = np.random.default_rng(0).integers(0, 50, (2, 5000))
    leaf = np.arange(50, 250)
    graph = from_arrays(
        np.concatenate([core[0], leaf[:100] % 50, leaf[100:]]),
        np.concatenate([core[1], leaf[:100], leaf[100:] % 50]),
    )
    assert components(graph).sizes.tolist() == [250]


def test_weights_below_one_join_too():
    graph = from_arrays([0, 1], [1, 0], [0.25, 0.5])
    assert components(graph, strong=True).sizes.tolist() == [2]


def test_labels_are_numbered_by_size_and_first_node():
    found = by_size(np.array([3, 0, 3, 2, 0, 5]))
    assert found.labels.tolist() == [0, 1, 0, 2, 1, 3]
    assert found.sizes.tolist() == [2, 2, 1, 1]
