"""Triangles and clustering coefficients of the undirected graph.

Edges are directed from the node of lower degree to the higher, and each node looks up the pairs of
its neighbours: the forward algorithm (Schank and Wagner, WEA 2005), here over blocks of nodes.
Clustering is that of Watts and Strogatz (1998).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardpar.ps.graph.backends import BackendName
from shardpar.ps.graph.graph import Graph, ranges, simple
from shardpar.ps.graph.libraries import igraph_of, networkit_of

_TABLE_ENTRIES = 1 << 22
_MOST_TABLE_ENTRIES = 1 << 25
_PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Triangles:
    """What triangles there are.

    Attributes:
      counts: int64[nodes], triangles each node is in.
      clustering: float64[nodes], the share of pairs of its neighbours that are neighbours of
        each other; 0 for nodes with fewer than two.
      total: triangles in all.
      transitivity: the share of paths of two edges that a third one closes.
    """

    counts: np.ndarray
    clustering: np.ndarray
    total: int
    transitivity: float


def triangles(graph: Graph, backend: BackendName = "scipy") -> Triangles:
    """Counts the triangles at every node.

    Args:
      graph: self-loops, directions, weights and parallel edges do not count.
      backend: igraph, networkit or scipy; the counts are the same.

    >>> from shardpar.ps.graph.graph import from_arrays
    >>> found = triangles(from_arrays([0, 1, 2, 2], [1, 2, 0, 3]))
    >>> found.total, found.counts.tolist(), found.clustering.round(2).tolist()
    (1, [1, 1, 1, 0], [1.0, 1.0, 0.33, 0.0])
    """
    once = simple(graph)
    nodes = once.num_nodes
    degree = np.bincount(once.sources, minlength=nodes) + np.bincount(once.targets, minlength=nodes)
    pairs = degree * (degree - 1) // 2
    if backend == "scipy":
        closed = edge_triangles(once)
        twice = np.bincount(once.sources, closed, nodes) + np.bincount(once.targets, closed, nodes)
        counts = (twice / 2).round().astype(np.int64)
    else:
        share = _igraph(once) if backend == "igraph" else _networkit(once)
        counts = (share * pairs).round().astype(np.int64)
    clustering = np.divide(counts, pairs, out=np.zeros(nodes), where=pairs > 0)
    paths = int(pairs.sum())
    return Triangles(
        counts, clustering, int(counts.sum()) // 3, int(counts.sum()) / paths if paths else 0.0
    )


def edge_triangles(graph: Graph) -> np.ndarray:
    """How many triangles each edge is in: the common neighbours of its ends.

    Args:
      graph: as `graph.simple` makes it.

    Returns:
      int64[edges].
    """
    nodes, edges = graph.num_nodes, graph.num_edges
    degree = np.bincount(graph.sources, minlength=nodes)
    degree += np.bincount(graph.targets, minlength=nodes)
    rank = np.empty(nodes, np.int32)
    rank[np.argsort(degree, kind="stable")] = np.arange(nodes, dtype=np.int32)
    low, high = rank[graph.sources], rank[graph.targets]
    low, high = np.minimum(low, high), np.maximum(low, high)
    order = np.argsort(low.astype(np.int64) * nodes + high)
    low, high = low[order], high[order]
    row = np.searchsorted(low, np.arange(nodes + 1))
    into = np.argsort(high, kind="stable")
    column = np.searchsorted(high[into], np.arange(nodes + 1))
    # A triangle low < middle < high is found at its middle: the edges out of it are in a table,
    # and for every edge into it, the edges that come after that one in its row are looked up.
    after = row[1:][low] - np.arange(edges) - 1
    work = np.bincount(high, after, nodes).astype(np.int64)
    middles = np.flatnonzero((np.diff(row) > 0) & (work > 0))
    found = np.zeros(edges, np.int64)
    # A table that the cache holds; for many nodes a larger one, so that blocks are not too small.
    entries = max(_TABLE_ENTRIES, min(16 * nodes, _MOST_TABLE_ENTRIES))
    at_once = max(1, entries // max(nodes, 1))
    table = np.zeros(at_once * nodes, np.int32)
    for block in _blocks(work[middles], at_once):
        middle = middles[block]
        base = np.arange(len(middle)) * nodes
        out = ranges(row[middle], row[middle + 1])
        slots = np.repeat(base, row[middle + 1] - row[middle]) + high[out]
        table[slots] = out + 1
        first = into[ranges(column[middle], column[middle + 1])]
        second = ranges(first + 1, first + 1 + after[first])
        starts = np.repeat(base, column[middle + 1] - column[middle])
        third = table[np.repeat(starts, after[first]) + high[second]]
        closed = np.flatnonzero(third)
        if closed.size:
            third = third[closed] - 1
            begin, end = int(out[0]), int(out[-1]) + 1
            found[begin:end] += np.bincount(third - begin, minlength=end - begin)
            np.add.at(found, second[closed], 1)
            np.add.at(found, np.repeat(first, after[first])[closed], 1)
        table[slots] = 0
    result = np.empty(edges, np.int64)
    result[order] = found
    return result


def _blocks(work: np.ndarray, at_once: int) -> list[slice]:
    """Runs of at most `at_once` nodes, and of about so many pairs; one node may have more."""
    done = np.concatenate([[0], np.cumsum(work)])
    blocks, start = [], 0
    while start < len(work):
        enough = int(np.searchsorted(done, done[start] + _PAIRS_AT_ONCE, "right")) - 1
        end = min(max(enough, start + 1), start + at_once, len(work))
        blocks.append(slice(start, end))
        start = end
    return blocks


def _igraph(graph: Graph) -> np.ndarray:
    return np.asarray(igraph_of(graph).transitivity_local_undirected(mode="zero"))


def _networkit(graph: Graph) -> np.ndarray:
    import networkit

    found = networkit.centrality.LocalClusteringCoefficient(networkit_of(graph), True)
    found.run()
    return np.nan_to_num(np.asarray(found.scores()))
