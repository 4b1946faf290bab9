"""Connected components on one host: hooking and pointer jumping over whole arrays.

Shiloach and Vishkin, An O(log n) parallel connectivity algorithm (1982), with the sampling of
Sutton, Ben-Nun and Barak, Afforest (IPDPS 2018): a few edges find the giant component, and of the
others only those that leave it are looked at again. Strong components are scipy's (Pearce 2005).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csgraph

from shardpar.ps.graph.graph import Graph, incoming

_SAMPLED_PER_NODE = 1
_SAMPLING_ROUNDS = 2
_BLOCK = 1 << 15


@dataclass(frozen=True, eq=False)
class Components:
    """Which nodes hang together.

    Attributes:
      labels: int32[nodes]; 0 is the largest component, equal ones are in order of their first
        node.
      sizes: int64[components], falling.
    """

    labels: np.ndarray
    sizes: np.ndarray


def components(graph: Graph, *, strong: bool = False) -> Components:
    """The connected components.

    Args:
      graph: directed or not.
      strong: whether there has to be a way back along the edges' directions; without it,
        directions do not count.

    >>> from shardpar.ps.graph.graph import from_arrays
    >>> components(from_arrays([1, 2], [2, 3])).labels.tolist()
    [1, 0, 0, 0]
    """
    if strong:
        matrix = incoming(graph, directed=True, dtype=np.int8)
        # A weight below 1 is an edge too.
        matrix.data[:] = 1
        _, labels = csgraph.connected_components(matrix, directed=True, connection="strong")
        return by_size(labels)
    roots = _roots(graph)
    sizes = np.bincount(roots)
    # A root is the first node of its component.
    return _numbered(roots, sizes, np.flatnonzero(sizes))


def by_size(labels: np.ndarray) -> Components:
    """Numbers classes by size: 0 for the largest, equal ones in order of their first node.

    Args:
      labels: int[nodes], any numbers from 0 to below the number of nodes.
    """
    sizes = np.bincount(labels)
    first = np.zeros(len(sizes), np.int64)
    first[labels[::-1]] = np.arange(len(labels) - 1, -1, -1)
    used = np.flatnonzero(sizes)
    return _numbered(labels, sizes, used[np.argsort(first[used])])


def _numbered(labels: np.ndarray, sizes: np.ndarray, classes: np.ndarray) -> Components:
    """`classes`: the labels in use, in order of their first node."""
    order = classes[np.argsort(-sizes[classes], kind="stable")]
    number = np.empty(len(sizes), np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    return Components(number.take(labels), sizes[order])


def _roots(graph: Graph) -> np.ndarray:
    """int64[nodes]: the lowest node of each one's component."""
    sources, targets = graph.sources, graph.targets
    parents = np.arange(graph.num_nodes)
    every = len(sources) // max(_SAMPLED_PER_NODE * graph.num_nodes, 1)
    if every > 1:
        some, others = sources[::every].astype(np.intp), targets[::every].astype(np.intp)
        # The first round: every node is a root still.
        parents[np.maximum(some, others)] = np.minimum(some, others)
        parents = _hooked(_flat(parents), some, others, _SAMPLING_ROUNDS - 1)
        giant = np.bincount(parents[sources[:1024]]).argmax()
        leaving = _leaving(parents != giant, sources, targets)
        sources, targets = sources[leaving], targets[leaving]
    return _hooked(parents, sources.astype(np.intp), targets.astype(np.intp))


def _hooked(
    parents: np.ndarray, sources: np.ndarray, targets: np.ndarray, rounds: int | None = None
) -> np.ndarray:
    """Joins trees along edges, until none joins two or `rounds` are over."""
    while rounds is None or rounds > 0:
        one, other = parents.take(sources), parents.take(targets)
        apart = np.flatnonzero(one != other)
        if not apart.size:
            break
        if apart.size < len(sources):
            sources, targets = sources[apart], targets[apart]
            one, other = one[apart], other[apart]
        # Of several edges that hook the same root, any may win: the others come again.
        parents[np.maximum(one, other)] = np.minimum(one, other)
        parents = _flat(parents)
        rounds = None if rounds is None else rounds - 1
    return parents


def _flat(parents: np.ndarray) -> np.ndarray:
    while True:
        above = parents.take(parents)
        if (above == parents).all():
            return parents
        parents = above


def _leaving(outside: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The edges with an end outside; a block at a time, so that it stays in the cache."""
    found = [np.empty(0, np.intp)]
    for start in range(0, len(sources), _BLOCK):
        block = slice(start, start + _BLOCK)
        out = outside.take(sources[block])
        out |= outside.take(targets[block])
        found.append(np.flatnonzero(out) + start)
    return np.concatenate(found)
