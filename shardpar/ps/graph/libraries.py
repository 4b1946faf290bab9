"""Hands a graph to igraph and networkit, the extra `graph`."""

from __future__ import annotations

from typing import Any

import numpy as np

from shardpar.ps.graph.graph import Graph


def igraph_of(graph: Graph) -> Any:
    """The undirected graph in igraph; weights are the edge attribute `weight`.

    Args:
      graph: each edge once.
    """
    import igraph

    ends = np.stack([graph.sources, graph.targets], axis=1)
    made = igraph.Graph(graph.num_nodes, ends)
    if graph.weights is not None:
        made.es["weight"] = graph.weights
    return made


def networkit_of(graph: Graph) -> Any:
    """The undirected graph in networkit.

    Args:
      graph: each edge once.
    """
    import networkit

    ends = (graph.sources.astype(np.uint64), graph.targets.astype(np.uint64))
    if graph.weights is None:
        return networkit.GraphFromCoo(ends, n=graph.num_nodes, directed=False, weighted=False)
    return networkit.GraphFromCoo(
        (graph.weights, ends), n=graph.num_nodes, directed=False, weighted=True
    )
