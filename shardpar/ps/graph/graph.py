"""A graph as its edge list: the value that is read once and that every algorithm takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from shardpar.errors import DataError

MAX_NODES = 2**31 - 1
"""Nodes are counted in 32 bits."""


@dataclass(frozen=True, eq=False)
class Graph:
    """Edges between nodes 0 … num_nodes - 1; its arrays cannot be written to.

    Attributes:
      num_nodes: how many nodes, with and without edges.
      sources, targets: int32[edges], where each edge begins and ends.
      weights: float64[edges], not negative; None where every edge weighs 1.
      names: int64[nodes], or object[nodes] of str: what the file calls each node.

    >>> graph = from_arrays([0, 1], [1, 2])
    >>> graph.num_nodes, graph.num_edges
    (3, 2)
    """

    num_nodes: int
    sources: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None
    names: np.ndarray

    def __post_init__(self) -> None:
        for field in ("sources", "targets", "weights", "names"):
            array = getattr(self, field)
            if array is not None:
                view = array.view()
                view.flags.writeable = False
                object.__setattr__(self, field, view)

    @property
    def num_edges(self) -> int:
        """How many edges are in the list; parallel ones each count."""
        return len(self.sources)

    def indices_of(self, names: Iterable[Any]) -> np.ndarray:
        """Where these nodes are.

        Args:
          names: as in the file; text is read as a number where the names are numbers.

        Returns:
          int64[names].

        Raises:
          DataError: there is no such node.
        """
        wanted = list(names)
        if self.names.dtype.kind == "i":
            wanted = [_as_int(name) for name in wanted]
            called = np.array(wanted, np.int64)
        else:
            called = np.array([str(name) for name in wanted], object)
        order = np.argsort(self.names, kind="stable")
        at = np.searchsorted(self.names, called, sorter=order)
        inside = np.minimum(at, self.num_nodes - 1)
        missing = np.flatnonzero(self.names[order[inside]] != called)
        if missing.size:
            name, near = called[missing[0]], self.names[order[inside[missing[0]]]]
            raise DataError(f"there is no node {name!s}; there is {near!s}, for example")
        return order[inside]


def _as_int(name: Any) -> int:
    try:
        number = int(name)
    except ValueError:
        raise DataError(f"there is no node {name!s}: the nodes are integers") from None
    if not -(2**63) <= number < 2**63:
        raise DataError(f"there is no node {name!s}: the nodes are integers of 64 bits")
    return number


def from_arrays(
    sources: Any, targets: Any, weights: Any = None, *, num_nodes: int | None = None,
    names: Any = None,
) -> Graph:  # fmt: skip
    """A graph from arrays of node indices.

    Args:
      sources: int[edges], from 0 on: where edges begin.
      targets: int[edges]: where they end.
      weights: float[edges], not negative and finite.
      num_nodes: one more than the highest index if not given.
      names: [nodes]; 0, 1, 2, … if not given.

    Raises:
      DataError: lengths differ, an index is out of range, or a weight is not a weight.

    >>> from_arrays([0], [1], [-1.0])
    Traceback (most recent call last):
    ...
    shardpar.errors.DataError: the weight of edge 0 is -1.0; weights are finite and not negative
    """
    source, target = np.asarray(sources), np.asarray(targets)
    if source.ndim != 1 or source.shape != target.shape:
        raise DataError(
            f"sources are {source.shape} and targets {target.shape}; give one of each per edge"
        )
    if source.size and (source.dtype.kind not in "iu" or target.dtype.kind not in "iu"):
        raise DataError(
            f"nodes are {source.dtype} and {target.dtype}; give indices, integers from 0 on"
        )
    low = min((int(a.min()) for a in (source, target) if a.size), default=0)
    high = max((int(a.max()) for a in (source, target) if a.size), default=-1)
    nodes = high + 1 if num_nodes is None else num_nodes
    if low < 0 or high >= nodes or nodes > MAX_NODES:
        raise DataError(
            f"node indices run from {low} to {high}; with {nodes} nodes they run from 0 to "
            f"{nodes - 1}, and there can be at most {MAX_NODES} nodes"
        )
    weight = None if weights is None else np.asarray(weights, np.float64)
    if weight is not None:
        if weight.shape != source.shape:
            raise DataError(f"{weight.shape} weights for {source.shape} edges; give one per edge")
        wrong = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
        if wrong.size:
            raise DataError(
                f"the weight of edge {wrong[0]} is {weight[wrong[0]]}; weights are finite and "
                "not negative"
            )
    called = np.arange(nodes) if names is None else np.asarray(names)
    if called.shape != (nodes,):
        raise DataError(f"{called.shape} names for {nodes} nodes; give one per node")
    return Graph(nodes, source.astype(np.int32), target.astype(np.int32), weight, called)


def incoming(graph: Graph, *, directed: bool, dtype: Any = np.float64) -> sparse.csr_array:
    """The matrix whose row t holds the weights of the edges into t, by source.

    Args:
      graph: parallel edges stay apart, which sums over a row do not see.
      directed: False takes each edge both ways, a self-loop once.
      dtype: of the weights.

    Returns:
      [nodes, nodes].
    """
    sources, targets, weights = graph.sources, graph.targets, graph.weights
    if not directed:
        away = sources != targets
        if away.all():
            away = slice(None)  # type: ignore[assignment]
        sources, targets = (
            np.concatenate([sources, targets[away]]),
            np.concatenate([targets, sources[away]]),
        )
        weights = None if weights is None else np.concatenate([weights, weights[away]])
    data = np.ones(len(sources), dtype) if weights is None else weights.astype(dtype)
    matrix = sparse.coo_array((data, (targets, sources)), shape=(graph.num_nodes,) * 2)
    # Says that there is nothing to add up, which would sort every row.
    matrix.has_canonical_format = True
    return matrix.tocsr()


def simple(graph: Graph) -> Graph:
    """The undirected graph without self-loops, each edge once and from the lower to the higher.

    Args:
      graph: weights of parallel edges, either way, are added up; without weights they are one.

    >>> once = simple(from_arrays([0, 1, 1, 2], [1, 0, 1, 1]))
    >>> once.sources.tolist(), once.targets.tolist()
    ([0, 1], [1, 2])
    """
    low = np.minimum(graph.sources, graph.targets)
    high = np.maximum(graph.sources, graph.targets)
    keys = low.astype(np.int64) * graph.num_nodes + high
    away = low != high
    if not away.all():
        keys = keys[away]
    weights = None if graph.weights is None else graph.weights[away]
    if weights is None:
        if not (keys[1:] > keys[:-1]).all():
            keys = np.unique(keys)
    else:
        keys, edge = np.unique(keys, return_inverse=True)
        weights = np.bincount(edge, weights, len(keys))
    source, target = np.divmod(keys, max(graph.num_nodes, 1))
    return Graph(
        graph.num_nodes, source.astype(np.int32), target.astype(np.int32), weights, graph.names
    )


def ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The numbers of all ranges, one range after the other.

    Args:
      starts: int[ranges], the first number of each.
      ends: int[ranges], one more than the last of each.

    >>> ranges(np.array([3, 7]), np.array([5, 10])).tolist()
    [3, 4, 7, 8, 9]
    """
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
