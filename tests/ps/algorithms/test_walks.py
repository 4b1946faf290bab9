"""Walks: every step goes along an edge, as often as the papers' formulas say."""

from __future__ import annotations

import networkx
import numpy as np
import pytest

from shardpar.errors import ConfigError, DataError
from shardpar.ps.algorithms.walks import WalkOptions, Walks, adjacency, walked

KARATE = np.array(networkx.karate_club_graph().edges()).T


def test_steps_go_along_edges_and_every_node_begins_as_often_as_asked():
    graph = adjacency(34, *KARATE)
    walks = np.concatenate(list(Walks(graph, WalkOptions(8, 3, p=0.5, q=2.0), seed=1)))
    assert walks.shape == (34 * 3, 8)
    assert (np.bincount(walks[:, 0], minlength=34) == 3).all()
    edges = {*zip(*KARATE, strict=True), *zip(*KARATE[::-1], strict=True)}
    assert {tuple(pair) for pair in np.stack([walks[:, :-1], walks[:, 1:]], -1).reshape(-1, 2)} <= {
        (int(a), int(b)) for a, b in edges
    }


def test_a_seed_gives_the_same_walks_each_time_and_another_seed_others():
    graph = adjacency(34, *KARATE)
    options = WalkOptions(5, 1, p=2.0)
    one, again, other = (np.concatenate(list(Walks(graph, options, seed))) for seed in (7, 7, 8))
    assert (one == again).all()
    assert (one != other).any()


def expected(graph: networkx.Graph, came: int, here: int, p: float, q: float) -> np.ndarray:
    """The formula of the node2vec paper, node by node."""
    out = np.zeros(graph.number_of_nodes())
    for there in graph[here]:
        weight = graph[here][there].get("weight", 1.0)
        bias = 1 / p if there == came else 1.0 if graph.has_edge(came, there) else 1 / q
        out[there] = weight * bias
    return out / out.sum()


@pytest.mark.parametrize(("p", "q"), [(0.25, 4.0), (4.0, 0.5), (1.0, 3.0), (3.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_second_order_steps_have_the_chances_of_the_paper(p, q, weighted):
    edges = [(0, 1), (0, 2), (1, 2), (1, 3), (1, 4), (2, 5), (3, 4)]
    weights = [1.0, 2.0, 0.5, 3.0, 1.0, 1.0, 2.0] if weighted else [1.0] * 7
    oracle = networkx.Graph()
    oracle.add_weighted_edges_from([(*e, w) for e, w in zip(edges, weights, strict=True)])
    graph = adjacency(6, *np.array(edges).T, weights)
    walks = walked(
        graph, np.zeros(200_000, np.int32), WalkOptions(3, p=p, q=q), np.random.default_rng(0)
    )
    for here in (1, 2):
        third = walks[walks[:, 1] == here, 2]
        share = np.bincount(third, minlength=6) / len(third)
        np.testing.assert_allclose(share, expected(oracle, 0, here, p, q), atol=0.006)


def test_first_steps_follow_the_weights_and_parallel_edges_add_up():
    graph = adjacency(3, [0, 0, 0], [1, 2, 2], [1.0, 1.0, 2.0])
    walks = walked(graph, np.zeros(50_000, np.int32), WalkOptions(2), np.random.default_rng(0))
    assert abs((walks[:, 1] == 2).mean() - 0.75) < 0.01


def test_directed_walks_end_where_there_is_no_way_out():
    graph = adjacency(4, [0, 1], [1, 2], directed=True)
    walks = np.concatenate(list(Walks(graph, WalkOptions(4, 1, directed=True))))
    assert sorted(walks.tolist()) == [[0, 1, 2, -1], [1, 2, -1, -1]]


@pytest.mark.parametrize(
    ("edges", "weights", "says"),
    [
        (([0, 3], [1, 1]), None, "the source of edge 1 is 3, but nodes are 0 to 2"),
        (([0, -1], [1, 1]), None, "the source of edge 1 is -1"),
        (([0.5], [1]), None, "sources are float64"),
        (([], []), None, "no edges"),
        (([0], [1, 2]), None, "one of each per edge"),
        (([0], [1]), [0.0], "the weight of edge 0 is 0.0"),
        (([0], [1]), [1.0, 2.0], "there are 1 edges but weights are"),
    ],
)
def test_edges_that_are_none_are_refused(edges, weights, says):
    with pytest.raises(DataError, match=says):
        adjacency(3, *edges, weights)


@pytest.mark.parametrize("wrong", [{"length": 1}, {"per_node": 0}, {"p": 0.0}, {"q": np.inf}])
def test_options_that_make_no_walk_are_refused(wrong):
    with pytest.raises(ConfigError):
        WalkOptions(**wrong)
