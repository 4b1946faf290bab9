"""k-core, triangles and common neighbours against networkx, by every backend."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

from shardpar.errors import DataError
from shardpar.ps.graph.common_neighbours import common_neighbours
from shardpar.ps.graph.graph import from_arrays
from shardpar.ps.graph.kcore import core_numbers
from shardpar.ps.graph.triangles import triangles
from tests.ps.graph.graphs import plain, random_graph

BACKENDS = ("scipy", "igraph", "networkit")
GRAPHS = [
    *(random_graph(seed, edges=edges) for seed in range(3) for edges in (50, 300)),
    random_graph(9, nodes=400, edges=12000, weighted=True),
    from_arrays([], [], num_nodes=4),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_numbers_are_those_of_networkx(backend):
    for graph in GRAPHS:
        wanted = nx.core_number(plain(graph))
        assert dict(enumerate(core_numbers(graph, backend).tolist())) == wanted


def test_paths_are_peeled_node_by_node_and_stars_at_once():
    path = np.random.default_rng(0).permutation(3000)
    assert set(core_numbers(from_arrays(path[:-1], path[1:])).tolist()) == {1}
    # A clique, leaves that go at once, and tails that are as many as would not go one by one.
    clique = [(a, b) for a in range(6) for b in range(a)]
    tails = [(0, 10)] + [(n, n + 1) for n in range(10, 40)]
    star = [(1, 100 + n) for n in range(500)] + [(40, 700 + n) for n in range(200)]
    graph = from_arrays(*np.array(clique + tails + star).T)
    wanted = nx.core_number(plain(graph))
    assert dict(enumerate(core_numbers(graph).tolist())) == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_triangles_and_clustering_are_those_of_networkx(backend):
    for graph in GRAPHS:
        whole = plain(graph)
        found = triangles(graph, backend)
        assert dict(enumerate(found.counts.tolist())) == nx.triangles(whole)
        clustering = nx.clustering(whole)
        assert found.clustering == pytest.approx([clustering[n] for n in range(len(clustering))])
        assert found.total == sum(nx.triangles(whole).values()) / 3
        assert found.transitivity == pytest.approx(nx.transitivity(whole))


def test_common_neighbours_of_edges_and_of_pairs_are_those_of_networkx():
    for graph in GRAPHS:
        whole = plain(graph)
        found = common_neighbours(graph)
        pairs = list(zip(found.sources.tolist(), found.targets.tolist(), strict=True))
        assert {frozenset(p) for p in pairs} == {frozenset(e) for e in whole.edges()}
        wanted = [len(list(nx.common_neighbors(whole, s, t))) for s, t in pairs]
        assert found.common.tolist() == wanted
        ends = np.random.default_rng(0).integers(0, graph.num_nodes, (2, 40))
        ends = ends[:, ends[0] != ends[1]]
        asked = common_neighbours(graph, (ends[0], ends[1]))
        assert asked.common.tolist() == [
            len(list(nx.common_neighbors(whole, s, t))) for s, t in ends.T.tolist()
        ]


def test_the_top_pairs_share_most_and_come_first():
    graph = GRAPHS[-2]
    every, top = common_neighbours(graph), common_neighbours(graph, top=10)
    assert top.common.tolist() == sorted(every.common.tolist(), reverse=True)[:10]
    assert len(common_neighbours(graph, top=10**9).common) == len(every.common)


def test_pairs_of_no_nodes_are_refused():
    with pytest.raises(DataError, match="pairs name nodes 0 to 60; there are 0 to 59"):
        common_neighbours(random_graph(0), (np.array([0]), np.array([60])))
