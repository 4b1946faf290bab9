"""node2vec: walks that remember where they came from are the sentences of a skip-gram model.

Grover and Leskovec, "node2vec: scalable feature learning for networks", 2016. With p = q = 1
it is DeepWalk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from shardpar.ps.algorithms import word2vec
from shardpar.ps.algorithms.embeddings import NodeEmbeddings, Progress, quiet
from shardpar.ps.algorithms.walks import WalkOptions, Walks, adjacency
from shardpar.ps.algorithms.word2vec import Word2VecOptions
from shardpar.ps.placement import Placement


@dataclass(frozen=True)
class Node2VecOptions:
    """Attributes of the walks and of the model.

    Attributes:
      length: nodes of a walk.
      walks_per_node: in each pass.
      p: the higher, the less a walk returns to where it came from.
      q: the higher, the more it stays near where it came from.
      directed: edges are walked from source to target only.
      model: of the vectors.

    >>> Node2VecOptions(length=5, p=4.0).walks
    WalkOptions(length=5, per_node=10, p=4.0, q=1.0, directed=False)
    """

    length: int = 40
    walks_per_node: int = 10
    p: float = 1.0
    q: float = 1.0
    directed: bool = False
    model: Word2VecOptions = field(default_factory=Word2VecOptions)

    @property
    def walks(self) -> WalkOptions:
        """Of second order."""
        return WalkOptions(self.length, self.walks_per_node, self.p, self.q, self.directed)


def fit(
    options: Node2VecOptions,
    nodes: int,
    sources: Any,
    targets: Any,
    weights: Any = None,
    *,
    seed: int = 0,
    devices: Sequence[jax.Device] | None = None,
    placement: Placement | None = None,
    progress: Progress = quiet,
) -> NodeEmbeddings:
    """Learns a vector for each node.

    Args:
      options: of the algorithm.
      nodes: how many there are.
      sources: int[edges], 0 to nodes - 1: where edges begin.
      targets: int[edges]: where they end.
      weights: float[edges], positive; None for 1 each.
      seed: of everything random.
      devices: None takes all.
      placement: of the tables; None deals their rows over all devices.
      progress: called now and then with tokens done, of how many, and the loss of late.

    Raises:
      DataError: an edge names no node, or a weight is not positive.
    """
    graph = adjacency(nodes, sources, targets, weights, directed=options.directed)
    walks = Walks(graph, options.walks, seed)
    return word2vec.fit(
        options.model,
        nodes,
        walks,
        seed=seed,
        devices=devices,
        placement=placement,
        progress=progress,
    )
