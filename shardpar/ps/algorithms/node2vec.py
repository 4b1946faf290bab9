"""node2vec: walks that remember where they came from are the sentences of a skip-gram model.

Grover and Leskovec, "node2vec: scalable feature learning for networks", 2016. With p = q = 1
it is DeepWalk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
from msgspec import Meta

from shardpar.ps.algorithms import word2vec
from shardpar.ps.algorithms.embeddings import NodeEmbeddings, Progress, quiet
from shardpar.ps.algorithms.keeping import NOTHING, Keeper
from shardpar.ps.algorithms.walks import WalkOptions, Walks, adjacency
from shardpar.ps.algorithms.word2vec import Word2VecOptions
from shardpar.ps.optimizers import RowWiseAdaGrad
from shardpar.ps.placement import Placement

TRAINS = "nodes"

Positive = Annotated[int, Meta(ge=1)]
Odds = Annotated[float, Meta(gt=0.0)]


@dataclass(frozen=True)
class Node2VecOptions:
    """Attributes of the walks and of the model.

    Attributes:
      length: nodes of a walk.
      walks_per_node: in each pass.
      p: the higher, the less a walk returns to where it came from.
      q: the higher, the more it stays near where it came from.
      directed: edges are walked from source to target only.
      dim: of the vectors.
      window: nodes on either side in a walk that are a node's contexts, at most.
      negatives: of each pair.
      passes: over the walks, which are new in each.
      learning_rate: of row-wise AdaGrad, at the beginning; it falls in a line.
      batch_tokens: nodes of a step; None takes about as many as there are, 256 to 4096.

    >>> walks_of(Node2VecOptions(length=5, p=4.0))
    WalkOptions(length=5, per_node=10, p=4.0, q=1.0, directed=False)
    """

    length: Annotated[int, Meta(ge=2)] = 40
    walks_per_node: Positive = 10
    p: Odds = 1.0
    q: Odds = 1.0
    directed: bool = False
    dim: Positive = 128
    window: Positive = 5
    negatives: Positive = 5
    passes: Positive = 1
    learning_rate: Odds = 0.05
    batch_tokens: Positive | None = None


def walks_of(options: Node2VecOptions) -> WalkOptions:
    """The walks, of second order."""
    return WalkOptions(
        options.length, options.walks_per_node, options.p, options.q, options.directed
    )


def skip_gram_of(options: Node2VecOptions) -> Word2VecOptions:
    """The model that learns from the walks."""
    return Word2VecOptions(
        dim=options.dim,
        window=options.window,
        negatives=options.negatives,
        passes=options.passes,
        optimizer=RowWiseAdaGrad(options.learning_rate),
        batch_tokens=options.batch_tokens,
    )


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
    graph = adjacency(nodes, sources, targets, weights, directed=options.directed)
    walks = Walks(graph, walks_of(options), seed)
    return word2vec.fit(
        skip_gram_of(options),
        nodes,
        walks,
        seed=seed,
        devices=devices,
        placement=placement,
        progress=progress,
        keeper=keeper,
    )
