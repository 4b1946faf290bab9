"""DeepWalk: uniform or weighted walks over a graph are the sentences of a skip-gram model.

Perozzi, Al-Rfou and Skiena, "DeepWalk: online learning of social representations", 2014; with
negative sampling in the place of its hierarchical softmax, as all its successors have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
from msgspec import Meta

from shardpar.ps.algorithms import node2vec
from shardpar.ps.algorithms.embeddings import NodeEmbeddings, Progress, quiet
from shardpar.ps.algorithms.keeping import NOTHING, Keeper
from shardpar.ps.algorithms.node2vec import Node2VecOptions
from shardpar.ps.placement import Placement

TRAINS = "nodes"

Positive = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True)
class DeepWalkOptions:
    """Attributes of the walks and of the model.

    Attributes:
      length: nodes of a walk.
      walks_per_node: in each pass.
      directed: edges are walked from source to target only.
      dim, window, negatives, passes: of the skip-gram model, as in node2vec.
      learning_rate, batch_tokens: of its steps, as in node2vec.

    >>> as_node2vec(DeepWalkOptions(length=5)).length
    5
    """

    length: Annotated[int, Meta(ge=2)] = 40
    walks_per_node: Positive = 10
    directed: bool = False
    dim: Positive = 128
    window: Positive = 5
    negatives: Positive = 5
    passes: Positive = 1
    learning_rate: Annotated[float, Meta(gt=0.0)] = 0.05
    batch_tokens: Positive | None = None


def as_node2vec(options: DeepWalkOptions) -> Node2VecOptions:
    """Walks of first order are those of second order that do not care where they were."""
    return Node2VecOptions(**vars(options), p=1.0, q=1.0)


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
    keeper: Keeper = NOTHING,
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
      progress: called now and then with steps done, of how many, and the loss of late.
      keeper: saves now and then, and knows where to go on.

    Raises:
      DataError: an edge names no node, or a weight is not positive.
    """
    return node2vec.fit(
        as_node2vec(options),
        nodes,
        sources,
        targets,
        weights,
        seed=seed,
        devices=devices,
        placement=placement,
        progress=progress,
        keeper=keeper,
    )
