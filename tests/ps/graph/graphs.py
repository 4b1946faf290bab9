"""Graphs to test on, and what networkx makes of them."""

from __future__ import annotations

import networkx as nx
import numpy as np

from shardpar.ps.graph.graph import Graph, from_arrays


def random_graph(
    seed: int, nodes: int = 60, edges: int = 200, *, weighted: bool = False, skewed: bool = True
) -> Graph:
    """With parallel edges, self-loops, hubs, and nodes without edges."""
    generator = np.random.default_rng(seed)
    power = 2 if skewed else 1
    ends = (generator.random((2, edges)) ** power * nodes * 0.9).astype(np.int64)
    weights = generator.integers(1, 5, edges) / 2 if weighted else None
    return from_arrays(ends[0], ends[1], weights, num_nodes=nodes)


def weights_of(graph: Graph) -> np.ndarray:
    return np.ones(graph.num_edges) if graph.weights is None else graph.weights


def multigraph(graph: Graph, *, directed: bool) -> nx.MultiDiGraph:
    """Every edge of its own; the other way round too, but for loops, if it is undirected."""
    made = nx.MultiDiGraph()
    made.add_nodes_from(range(graph.num_nodes))
    for s, t, w in zip(
        graph.sources.tolist(), graph.targets.tolist(), weights_of(graph).tolist(), strict=True
    ):
        made.add_edge(s, t, weight=w)
        if not directed and s != t:
            made.add_edge(t, s, weight=w)
    return made


def plain(graph: Graph) -> nx.Graph:
    """Undirected, without loops; only where edges have weights do parallel ones add up."""
    made = nx.Graph()
    made.add_nodes_from(range(graph.num_nodes))
    for s, t, w in zip(
        graph.sources.tolist(), graph.targets.tolist(), weights_of(graph).tolist(), strict=True
    ):
        if s != t:
            before = made.get_edge_data(s, t, {"weight": 0})["weight"]
            made.add_edge(s, t, weight=w if graph.weights is None else before + w)
    return made


def karate() -> Graph:
    graph = nx.karate_club_graph()
    ends = np.array(graph.edges())
    weights = [w for _, _, w in graph.edges(data="weight")]
    return from_arrays(ends[:, 0], ends[:, 1], weights)
