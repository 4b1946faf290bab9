"""Communities by label propagation, on one host.

Raghavan, Albert and Kumara, Near linear time algorithm to detect community structures (2007), in
the semi-synchronous form of Cordasco and Gargano (2010): not all nodes move at once, so labels do
not swap for ever. Here two halves move in turn and are drawn anew in every iteration, which needs
no colouring; the result depends on the seed, not on how nodes are spread over devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shardpar.errors import UserError
from shardpar.ps.graph.components import by_size
from shardpar.ps.graph.graph import Graph, incoming, ranges, simple
from shardpar.ps.graph.louvain import Communities, modularity


@dataclass(frozen=True)
class LabelOptions:
    """How labels are propagated.

    Attributes:
      max_iterations: moves of both halves, at most.
      seed: of the labels' order, which decides between equally good ones, and of the halves.
    """

    max_iterations: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_iterations < 1:
            raise UserError(f"max_iterations is {self.max_iterations}; write 1 or more")


def first_labels(num_nodes: int, seed: int) -> np.ndarray:
    """int32[nodes]: a label for each node, in random order."""
    return np.random.default_rng(seed).permutation(num_nodes).astype(np.int32)


def second_half(nodes: Any, iteration: Any, seed: int) -> Any:
    """bool[nodes]: which nodes move second in an iteration, by a hash.

    Args:
      nodes: uint32[nodes] of NumPy or JAX; so is the result.
      iteration: uint32.
      seed: of the hash.
    """
    mixed = nodes * np.uint32(0x9E3779B1) + np.uint32(seed % 2**32)
    mixed = (mixed ^ (mixed >> 16)) + iteration
    mixed = mixed * np.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x846CA68B)
    return ((mixed ^ (mixed >> 16)) & 1) == 1


def label_propagation(graph: Graph, options: LabelOptions | None = None) -> Communities:
    """Each node takes the label that weighs most among its neighbours, until none changes.

    It keeps its own label if none weighs more; of equally good other ones it takes the first in
    the labels' random order.

    Args:
      graph: directions and self-loops do not count. Of parallel edges weights add up; without
        weights they count once.
      options: seed and limit.

    >>> from shardpar.ps.graph.graph import from_arrays
    >>> two = from_arrays([0, 1, 2, 3, 4, 5], [1, 2, 0, 4, 5, 3])
    >>> label_propagation(two).labels.tolist()
    [0, 0, 0, 1, 1, 1]
    """
    options = options or LabelOptions()
    once = simple(graph)
    matrix = incoming(once, directed=False)
    starts, neighbours = matrix.indptr, matrix.indices
    labels = first_labels(once.num_nodes, options.seed)
    every = np.arange(once.num_nodes, dtype=np.uint32)
    active = np.diff(starts) > 0
    for iteration in range(options.max_iterations):
        if not active.any():
            break
        second = second_half(every, np.uint32(iteration), options.seed)
        for half in (False, True):
            nodes = np.flatnonzero(active & (second == half))
            active[nodes] = False
            edges = ranges(starts[nodes], starts[nodes + 1])
            rows = np.repeat(np.arange(len(nodes)), starts[nodes + 1] - starts[nodes])
            weights = None if once.weights is None else matrix.data[edges]
            best = _best(rows, labels[neighbours[edges]], weights, labels[nodes], once.num_nodes)
            changed = nodes[best != labels[nodes]]
            labels[nodes] = best
            active[neighbours[ranges(starts[changed], starts[changed + 1])]] = True
    return communities_of(once, labels)


def communities_of(graph: Graph, labels: np.ndarray) -> Communities:
    """The communities that labels say; `graph` as `graph.simple` makes it."""
    numbered = by_size(labels)
    return Communities(numbered.labels, numbered.sizes, modularity(graph, numbered.labels))


def _best(
    rows: np.ndarray, labels: np.ndarray, weights: np.ndarray | None, own: np.ndarray, nodes: int
) -> np.ndarray:
    """For each row, the label of most weight; every row has at least one."""
    if not rows.size:
        return own
    keys = rows * nodes + labels
    if weights is None:
        keys.sort()
    else:
        order = np.argsort(keys, kind="stable")
        keys, weights = keys[order], weights[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    if weights is None:
        weight = np.diff(np.concatenate([first, [len(keys)]]))
    else:
        weight = np.add.reduceat(weights, first)
    row, label = np.divmod(keys[first], nodes)
    row_start = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]]))
    most = np.maximum.reduceat(weight, row_start)
    good = weight == most[row]
    best = np.minimum.reduceat(np.where(good, label, nodes), row_start)
    keeps = np.logical_or.reduceat(good & (label == own[row]), row_start)
    return np.where(keeps, own, best).astype(own.dtype)
