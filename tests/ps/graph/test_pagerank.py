"""PageRank against a dense solve and networkx, on one host and over devices."""

from __future__ import annotations

import jax
import networkx as nx
import numpy as np
import pytest

from shardpar.errors import DataError, RunError, UserError
from shardpar.ps.graph.graph import from_arrays
from shardpar.ps.graph.pagerank import PageRankOptions, pagerank
from shardpar.ps.graph.sharded import pagerank as sharded
from tests.ps.graph.graphs import multigraph, random_graph, weights_of


def by_solving(graph, options, restart=None):
    """The stationary distribution, from the full matrix."""
    nodes = graph.num_nodes
    home = np.full(nodes, 1 / nodes) if restart is None else restart / restart.sum()
    matrix = np.zeros((nodes, nodes))
    for s, t, w in zip(graph.sources, graph.targets, weights_of(graph), strict=True):
        matrix[t, s] += w
        if not options.directed and s != t:
            matrix[s, t] += w
    out = matrix.sum(0)
    walk = np.where(out > 0, matrix / np.where(out > 0, out, 1), home[:, None])
    return np.linalg.solve(np.eye(nodes) - options.damping * walk, (1 - options.damping) * home)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("personalised", [False, True])
def test_ranks_are_the_stationary_distribution(weighted, directed, personalised):
    for seed in range(5):
        graph = random_graph(seed, weighted=weighted)
        restart = np.random.default_rng(seed).random(60) ** 8 if personalised else None
        for damping, tol in ((0.85, 1e-12), (0.99, 1e-9), (0.0, 1e-9), (0.85, 1e-3)):
            options = PageRankOptions(directed, damping, tol, max_iterations=5000)
            found = pagerank(graph, options, restart)
            wanted = by_solving(graph, options, restart)
            assert np.abs(found.ranks - wanted).sum() <= found.error + 1e-14
            assert found.error <= tol
            assert found.ranks.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("directed", [False, True])
def test_ranks_are_those_of_networkx(directed):
    graph = random_graph(7, weighted=True)
    options = PageRankOptions(directed=directed, tol=1e-12)
    wanted = nx.pagerank(multigraph(graph, directed=directed), tol=1e-14, max_iter=1000)
    assert pagerank(graph, options).ranks == pytest.approx(
        [wanted[node] for node in range(graph.num_nodes)], abs=1e-12
    )


@pytest.mark.parametrize(("weighted", "directed"), [(False, True), (True, False)])
def test_four_devices_rank_as_one_and_as_the_host(weighted, directed):
    # One node has more edges than fit in one row.
    hub = random_graph(3, nodes=900, edges=3000, weighted=weighted)
    fan = np.arange(1, 801)
    graph = from_arrays(
        np.concatenate([hub.sources, fan]),
        np.concatenate([hub.targets, np.zeros(800, int)]),
        np.concatenate([hub.weights, np.ones(800)]) if weighted else None,
        num_nodes=900,
    )
    options = PageRankOptions(directed=directed, tol=1e-11)
    restart = np.random.default_rng(0).random(900)
    wanted = by_solving(graph, options, restart)
    four = sharded.pagerank(graph, options, restart, jax.devices()[:4])
    one = sharded.pagerank(graph, options, restart, jax.devices()[:1])
    assert np.abs(four.ranks - wanted).sum() <= four.error + 1e-14
    assert np.abs(four.ranks - one.ranks).sum() < 1e-14
    assert np.abs(pagerank(graph, options, restart).ranks - wanted).sum() <= options.tol
    assert four.error <= options.tol


def test_graphs_without_edges_rank_as_they_restart():
    graph = from_arrays([], [], num_nodes=3)
    assert pagerank(graph).ranks == pytest.approx([1 / 3] * 3)
    restart = np.array([0, 2, 2])
    for directed in (False, True):
        options = PageRankOptions(directed=directed)
        assert pagerank(graph, options, restart).ranks.tolist() == [0, 0.5, 0.5]
        found = sharded.pagerank(graph, options, restart, jax.devices()[:2])
        assert found.ranks.tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("run", [pagerank, sharded.pagerank])
def test_ranks_that_are_not_exact_enough_are_an_error(run, directed):
    options = PageRankOptions(directed=directed, max_iterations=3)
    with pytest.raises(RunError, match=r"exact to .* after 3 iterations, and tol is 1.0e-09"):
        run(random_graph(0), options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 1.0}, "damping is 1.0; write a number from 0 to below 1"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"tol": 0.0}, "tol is 0.0; write a number from 1e-13 to 2"),
        ({"max_iterations": 0}, "max_iterations is 0; write 1 or more"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        PageRankOptions(**options)


@pytest.mark.parametrize("restart", [[1.0], [0, 0, 0], [1, -1, 1], [np.nan, 1, 1]])
def test_a_restart_has_to_be_a_distribution(restart):
    with pytest.raises(DataError, match="restart"):
        pagerank(from_arrays([0], [2]), restart=np.array(restart, float))
    with pytest.raises(DataError, match="no nodes"):
        pagerank(from_arrays([], []))
