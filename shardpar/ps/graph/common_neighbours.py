"""Common neighbours of pairs of nodes, or of the ends of every edge.

Liben-Nowell and Kleinberg, The link prediction problem for social networks (CIKM 2003).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardpar.errors import DataError
from shardpar.ps.graph.graph import Graph, incoming, simple
from shardpar.ps.graph.triangles import edge_triangles

_ENTRIES_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of nodes and how many neighbours they share.

    Attributes:
      sources, targets: int64[pairs], indices of nodes.
      common: int64[pairs].
    """

    sources: np.ndarray
    targets: np.ndarray
    common: np.ndarray


def common_neighbours(
    graph: Graph,
    pairs: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    top: int | None = None,
) -> Pairs:
    """Counts the neighbours that two nodes share.

    Args:
      graph: self-loops, directions, weights and parallel edges do not count.
      pairs: indices of nodes, int[pairs] each; None takes the edges, each once.
      top: keep so many pairs, those that share most, in falling order; of equal ones, the first.

    Raises:
      DataError: a pair has an index that is no node.

    >>> from shardpar.ps.graph.graph import from_arrays
    >>> found = common_neighbours(from_arrays([0, 1, 2, 2], [1, 2, 0, 3]), top=3)
    >>> list(zip(found.sources.tolist(), found.targets.tolist(), found.common.tolist()))
    [(0, 1, 1), (0, 2, 1), (1, 2, 1)]
    """
    once = simple(graph)
    if pairs is None:
        sources, targets = once.sources.astype(np.int64), once.targets.astype(np.int64)
        common = edge_triangles(once)
    else:
        sources, targets = (np.asarray(ends, np.int64) for ends in pairs)
        both = np.concatenate([sources, targets])
        if both.size and not (both.min() >= 0 and both.max() < graph.num_nodes):
            raise DataError(
                f"pairs name nodes {both.min()} to {both.max()}; there are 0 to "
                f"{graph.num_nodes - 1}"
            )
        common = _of_pairs(once, sources, targets)
    if top is not None:
        best = np.argsort(-common, kind="stable")[:top]
        sources, targets, common = sources[best], targets[best], common[best]
    return Pairs(sources, targets, common)


def _of_pairs(graph: Graph, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    matrix = incoming(graph, directed=False, dtype=np.int32)
    matrix.data[:] = 1
    matrix.sort_indices()
    degree = np.diff(matrix.indptr)
    done = np.cumsum(degree[sources].astype(np.int64) + degree[targets])
    common = np.empty(len(sources), np.int64)
    start = 0
    while start < len(sources):
        before = int(done[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(done, before + _ENTRIES_AT_ONCE, "right")))
        block = slice(start, end)
        shared = matrix[sources[block]].multiply(matrix[targets[block]])
        common[block] = shared.sum(axis=1)
        start = end
    return common
