"""Core numbers: the largest k such that a node is in a subgraph of degrees k or more.

Seidman, Network structure and minimum degree (1983). igraph and networkit peel node by node
(Batagelj and Zaversnik 2003); the NumPy form peels whole levels at once, as ParK does (Dasari,
Desh and Zubair, IEEE Big Data 2014).
"""

from __future__ import annotations

import numpy as np

from shardpar.ps.graph.backends import BackendName
from shardpar.ps.graph.graph import Graph, incoming, ranges, simple
from shardpar.ps.graph.libraries import igraph_of, networkit_of

_FEW = 32


def core_numbers(graph: Graph, backend: BackendName = "scipy") -> np.ndarray:
    """The core number of every node of the undirected graph.

    Args:
      graph: self-loops, directions, weights and parallel edges do not count.
      backend: igraph, networkit or scipy; the numbers are the same.

    Returns:
      int64[nodes].

    >>> from shardpar.ps.graph.graph import from_arrays
    >>> core_numbers(from_arrays([0, 1, 2, 2], [1, 2, 0, 3])).tolist()
    [2, 2, 2, 1]
    """
    once = simple(graph)
    if backend == "igraph":
        return np.asarray(igraph_of(once).coreness(), np.int64)
    if backend == "networkit":
        import networkit

        found = networkit.centrality.CoreDecomposition(networkit_of(once))
        found.run()
        return np.asarray(found.scores()).astype(np.int64)
    return _peeled(once)


def _peeled(graph: Graph) -> np.ndarray:
    matrix = incoming(graph, directed=False, dtype=np.int8)
    starts, neighbours = matrix.indptr, matrix.indices
    degree = np.diff(starts).astype(np.int64)
    core = np.zeros(graph.num_nodes, np.int64)
    left = np.arange(graph.num_nodes)
    level = 0
    while left.size:
        level = max(level, int(degree[left].min()))
        gone = left[degree[left] <= level]
        while gone.size:
            core[gone] = level
            if gone.size <= _FEW and int((starts[gone + 1] - starts[gone]).sum()) <= 4 * _FEW:
                gone = _one_by_one(gone, level, starts, neighbours, degree, core)
                continue
            degree[gone] = -1
            reached = neighbours[ranges(starts[gone], starts[gone + 1])]
            reached, count = np.unique(reached[degree[reached] >= 0], return_counts=True)
            degree[reached] -= count
            gone = reached[degree[reached] <= level]
        left = left[degree[left] >= 0]
    return core


def _one_by_one(
    gone: np.ndarray, level: int, starts: np.ndarray, neighbours: np.ndarray, degree: np.ndarray,
    core: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Peels on while only a few go at a time, as along a path; returns those that are many."""
    waiting = gone.tolist()
    degree[gone] = -1
    while waiting:
        if len(waiting) > 4 * _FEW:
            return np.array(waiting)
        node = waiting.pop()
        for other in neighbours[starts[node] : starts[node + 1]].tolist():
            rest = degree[other] - 1
            if rest < -1:
                continue
            degree[other] = rest
            if rest <= level:
                degree[other] = -1
                core[other] = level
                waiting.append(other)
    return np.array([], np.int64)
