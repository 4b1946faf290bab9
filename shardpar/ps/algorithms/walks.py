"""Random walks over a graph, many at once in NumPy: uniform, weighted, and of second order.

Second order as in Grover and Leskovec, "node2vec", 2016, by rejection instead of a table for
each edge (Yang et al., "KnightKing", 2019), so that memory stays that of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from shardpar.errors import ConfigError, DataError
from shardpar.ps.algorithms.alias import AliasTables, alias_tables

_WALKS_AT_ONCE = 1 << 14


@dataclass(frozen=True, eq=False)
class Adjacency:
    """A graph by rows: the neighbours of each node, sorted, parallel edges merged.

    Attributes:
      starts: int64[nodes + 1], where each node's neighbours begin.
      neighbours: int32[entries].
      weights: float64[entries], or None where all weigh the same.
    """

    starts: np.ndarray
    neighbours: np.ndarray
    weights: np.ndarray | None

    @property
    def num_nodes(self) -> int:
        """With and without edges."""
        return len(self.starts) - 1

    @cached_property
    def degrees(self) -> np.ndarray:
        """How many neighbours each node has, int64[nodes]."""
        return np.diff(self.starts)

    @cached_property
    def alias(self) -> AliasTables:
        """To draw a neighbour by weight."""
        assert self.weights is not None
        return alias_tables(self.starts, self.weights)

    @cached_property
    def _keys(self) -> np.ndarray:
        rows = np.repeat(np.arange(self.num_nodes), self.degrees)
        return rows * self.num_nodes + self.neighbours

    def has_edge(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Whether there is an edge from each source to its target, bool[n]."""
        if not len(self.neighbours):
            return np.zeros(len(sources), bool)
        wanted = sources.astype(np.int64) * self.num_nodes + targets
        at = np.searchsorted(self._keys, wanted)
        return self._keys[np.minimum(at, len(self._keys) - 1)] == wanted

    def draw(self, nodes: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A neighbour of each node, by weight; int32[n]. Every node must have one."""
        if self.weights is not None:
            return self.neighbours[self.alias.draw(nodes, random)]
        start = self.starts[nodes]
        spot = random.random(len(nodes)) * (self.starts[nodes + 1] - start)
        return self.neighbours[start + spot.astype(np.int64)]


def adjacency(
    nodes: int, sources: Any, targets: Any, weights: Any = None, *, directed: bool = False
) -> Adjacency:
    """The neighbours of each node, from a list of edges.

    Args:
      nodes: how many there are.
      sources: int[edges], 0 to nodes - 1: where edges begin.
      targets: int[edges]: where they end.
      weights: float[edges], positive; None for 1 each. Those of parallel edges are added.
      directed: edges are walked from source to target only.

    Raises:
      DataError: an edge names no node, or a weight is not positive.

    >>> adjacency(3, [0, 1], [1, 2]).degrees.tolist()
    [1, 2, 1]
    """
    sources, targets, weights = checked_edges(nodes, sources, targets, weights)
    values = np.ones(len(sources)) if weights is None else weights
    if not directed:
        loops = sources == targets
        other = (targets[~loops], sources[~loops], values[~loops])
        sources, targets, values = (
            np.concatenate(pair) for pair in zip((sources, targets, values), other, strict=True)
        )
    matrix = sparse.csr_array((values, (sources, targets)), shape=(nodes, nodes))
    matrix.sum_duplicates()
    matrix.sort_indices()
    even = matrix.data.size == 0 or bool((matrix.data == matrix.data[0]).all())
    return Adjacency(
        matrix.indptr.astype(np.int64),
        matrix.indices.astype(np.int32),
        None if even else matrix.data,
    )


def checked_edges(
    nodes: int, sources: Any, targets: Any, weights: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Edges as arrays, each fit to be used.

    Raises:
      DataError: there are none, an edge names no node, or a weight is not positive.
    """
    source, target = np.asarray(sources), np.asarray(targets)
    if source.ndim != 1 or source.shape != target.shape:
        raise DataError(
            f"sources are {source.shape} and targets {target.shape}; give one of each per edge"
        )
    if not source.size:
        raise DataError("the graph has no edges; give at least one source and its target")
    for name, ids in (("source", source), ("target", target)):
        if ids.dtype.kind not in "iu":
            raise DataError(f"{name}s are {ids.dtype}; give indices of nodes, integers from 0 on")
        bad = np.flatnonzero((ids < 0) | (ids >= nodes))
        if bad.size:
            raise DataError(
                f"the {name} of edge {bad[0]} is {ids[bad[0]]}, but nodes are 0 to {nodes - 1}"
            )
    if weights is None:
        return source, target, None
    weight = np.asarray(weights, np.float64)
    if weight.shape != source.shape:
        raise DataError(f"there are {source.size} edges but weights are {weight.shape}")
    bad = np.flatnonzero(~(np.isfinite(weight) & (weight > 0)))
    if bad.size:
        raise DataError(
            f"the weight of edge {bad[0]} is {weight[bad[0]]}; walks need positive weights: leave "
            "edges of weight 0 out"
        )
    return source, target, weight


@dataclass(frozen=True)
class WalkOptions:
    """How a graph is walked.

    Attributes:
      length: nodes of a walk; shorter where a node has no way out.
      per_node: walks that begin at each node, in each pass.
      p: the higher, the less a walk returns to where it came from.
      q: the higher, the more it stays among the neighbours of where it came from.
      directed: edges are walked from source to target only.
    """

    length: int = 40
    per_node: int = 10
    p: float = 1.0
    q: float = 1.0
    directed: bool = False

    def __post_init__(self) -> None:
        if self.length < 2 or self.per_node < 1:
            raise ConfigError(
                f"walks have length >= 2 and per_node >= 1, not {self.length} and {self.per_node}"
            )
        if not (0 < self.p < np.inf and 0 < self.q < np.inf):
            raise ConfigError(f"p and q are positive numbers, not {self.p} and {self.q}")


@dataclass(frozen=True, eq=False)
class Walks:
    """Walks as something to iterate over, again and again with the same outcome.

    Each item is int32[walks, length], -1 after a walk's end. Nodes without a way out begin none.

    >>> path = adjacency(2, [0], [1])
    >>> [sorted(walks.tolist()) for walks in Walks(path, WalkOptions(length=3, per_node=1))]
    [[[0, 1, 0], [1, 0, 1]]]
    """

    graph: Adjacency
    options: WalkOptions = WalkOptions()
    seed: int = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        random = np.random.default_rng(self.seed)
        begins = np.flatnonzero(self.graph.degrees).astype(np.int32)
        for _ in range(self.options.per_node):
            order = random.permutation(begins)
            for at in range(0, len(order), _WALKS_AT_ONCE):
                yield walked(self.graph, order[at : at + _WALKS_AT_ONCE], self.options, random)


def walked(
    graph: Adjacency, begins: np.ndarray, options: WalkOptions, random: np.random.Generator
) -> np.ndarray:
    """A walk from each of these nodes, int32[n, length], -1 after its end."""
    walks = np.full((options.length, len(begins)), -1, np.int32)
    walks[0] = begins
    going = np.flatnonzero(graph.degrees[begins])
    for step in range(1, options.length):
        here = walks[step - 1, going]
        if step == 1 or options.p == options.q == 1:
            there = graph.draw(here, random)
        else:
            there = _biased(graph, walks[step - 2, going], here, options, random)
        walks[step, going] = there
        if options.directed:
            going = going[graph.degrees[there] > 0]
    return np.ascontiguousarray(walks.T)


def _biased(
    graph: Adjacency,
    came: np.ndarray,
    here: np.ndarray,
    options: WalkOptions,
    random: np.random.Generator,
) -> np.ndarray:
    """The next node of each walk: drawn by weight until the bias of its kind accepts it."""
    back, near, far = 1 / options.p, 1.0, 1 / options.q
    highest, sure = max(back, near, far), min(near, far)
    there = np.empty_like(here)
    waiting = np.arange(len(here))
    while waiting.size:
        drawn = graph.draw(here[waiting], random)
        there[waiting] = drawn
        chance = random.random(len(waiting)) * highest
        returns = drawn == came[waiting]
        accepted = np.where(returns, chance < back, chance < sure)
        # Only where it matters is it looked up whether the two are neighbours.
        unsure = np.flatnonzero(~accepted & ~returns & (chance < max(near, far)))
        beside = graph.has_edge(came[waiting[unsure]], drawn[unsure])
        accepted[unsure] = chance[unsure] < np.where(beside, near, far)
        waiting = waiting[~accepted]
    return there
