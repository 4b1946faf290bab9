"""DeepWalk: uniform or weighted walks over a graph are the sentences of a skip-gram model.

Perozzi, Al-Rfou and Skiena, "DeepWalk: online learning of social representations", 2014; with
negative sampling in the place of its hierarchical softmax, as all its successors have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from shardpar.ps.algorithms import node2vec
from shardpar.ps.algorithms.embeddings import NodeEmbeddings, Progress, quiet
from shardpar.ps.algorithms.node2vec import Node2VecOptions
from shardpar.ps.algorithms.word2vec import Word2VecOptions
from shardpar.ps.placement import Placement


@dataclass(frozen=True)
class DeepWalkOptions:
    """Attributes of the walks and of the model.

    Attributes:
      length: nodes of a walk.
      walks_per_node: in each pass.
      directed: edges are walked from source to target only.
      model: of the vectors.

    >>> DeepWalkOptions(length=5).as_node2vec.walks
    WalkOptions(length=5, per_node=10, p=1.0, q=1.0, directed=False)
    """

    length: int = 40
    walks_per_node: int = 10
    directed: bool = False
    model: Word2VecOptions = field(default_factory=Word2VecOptions)

    @property
    def as_node2vec(self) -> Node2VecOptions:
        """Walks of first order are those of second order that do not care where they were."""
        return Node2VecOptions(
            self.length, self.walks_per_node, directed=self.directed, model=self.model
        )


def fit(
    options: DeepWalkOptions,
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
    return node2vec.fit(
        options.as_node2vec,
        nodes,
        sources,
        targets,
        weights,
        seed=seed,
        devices=devices,
        placement=placement,
        progress=progress,
    )
