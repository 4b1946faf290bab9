"""How well vectors tell edges that were held out from pairs that are no edges: an AUC.

The protocol of Grover and Leskovec, "node2vec", 2016: edges are held out so that the rest stays
as connected as it was; scores are dot products, or a logistic regression over Hadamard products.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.special import expit

from shardpar.errors import ConfigError, DataError
from shardpar.ps.algorithms.walks import adjacency, checked_edges
from shardpar.ps.metrics import auc

Score = Literal["dot", "hadamard"]

_MOST_DRAWS = 100


@dataclass(frozen=True, eq=False)
class EdgeSplit:
    """Edges to learn from, and pairs to judge by.

    Attributes:
      nodes: how many there are.
      sources, targets: int[edges], to learn from.
      weights: float[edges], or None.
      held: int[pairs, 2], edges that were held out.
      absent: int[pairs, 2], pairs that are no edges.
    """

    nodes: int
    sources: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None
    held: np.ndarray
    absent: np.ndarray

    @property
    def digest(self) -> str:
        """Of the edges to learn from, so that another graph is noticed."""
        digest = hashlib.sha256(str(self.nodes).encode())
        for array in (self.sources, self.targets, self.weights):
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def split_edges(
    nodes: int,
    sources: Any,
    targets: Any,
    weights: Any = None,
    *,
    share: float = 0.2,
    seed: int = 0,
) -> EdgeSplit:
    """Holds out a share of the edges, and draws as many pairs that are no edges.

    A spanning forest stays, so that no node loses its last edge: of graphs that are almost
    trees fewer edges than the share are held out. Edges have no direction here; loops and
    repeats stay among those to learn from, unless their edge is held out.

    Raises:
      ConfigError: the share is not above 0 and below 1.
      DataError: no edge can be held out, or there are too few pairs that are no edges.

    >>> split = split_edges(4, [0, 1, 2, 3, 0], [1, 2, 3, 0, 2], share=0.4)
    >>> split.held.shape, split.absent.tolist()
    ((1, 2), [[1, 3]])
    """
    if not 0 < share < 1:
        raise ConfigError(f"the share of held-out edges is above 0 and below 1, not {share}")
    sources, targets, weights = checked_edges(nodes, sources, targets, weights)
    random = np.random.default_rng((seed, 2))
    low, high = np.minimum(sources, targets), np.maximum(sources, targets)
    keys = low.astype(np.int64) * nodes + high
    distinct = np.unique(keys[low != high])
    ends = (distinct // nodes, distinct % nodes)
    # Random costs make every spanning forest possible.
    costs = 1 + random.random(len(distinct))
    tree = minimum_spanning_tree(sparse.csr_array((costs, ends), shape=(nodes, nodes))).tocoo()
    free = np.setdiff1d(distinct, tree.row.astype(np.int64) * nodes + tree.col, assume_unique=True)
    count = min(len(free), max(1, round(share * len(distinct))))
    possible = nodes * (nodes - 1) // 2 - len(distinct)
    if not count:
        raise DataError(
            "no edge can be held out, for each is the only way between two parts of the graph"
        )
    count = min(count, possible)
    if not count:
        raise DataError("all pairs of nodes are edges; there is nothing to tell them from")
    out = random.choice(free, count, replace=False)
    stays = ~np.isin(keys, out)
    return EdgeSplit(
        nodes,
        sources[stays],
        targets[stays],
        None if weights is None else weights[stays],
        np.stack([out // nodes, out % nodes], axis=1),
        _absent(nodes, distinct, count, random),
    )


def _absent(nodes: int, edges: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Distinct pairs that are not among the sorted edges, int64[count, 2]."""
    found = np.zeros(0, np.int64)
    for _ in range(_MOST_DRAWS):
        if len(found) >= count:
            break
        one, two = random.integers(0, nodes, (2, 2 * count + 16))
        keys = np.minimum(one, two) * nodes + np.maximum(one, two)
        found = np.union1d(found, np.setdiff1d(keys[one != two], edges))
    if len(found) < count:
        one, two = np.triu_indices(nodes, 1)
        found = np.setdiff1d(one.astype(np.int64) * nodes + two, edges)
    chosen = random.choice(found, count, replace=False)
    return np.stack([chosen // nodes, chosen % nodes], axis=1)


def link_auc(vectors: np.ndarray, split: EdgeSplit, score: Score = "dot", seed: int = 0) -> float:
    """The chance that a held-out edge has a higher score than a pair that is none.

    Args:
      vectors: float[nodes, d].
      split: what to tell apart.
      score: "dot" of the vectors, or "hadamard", a logistic regression over their products,
        fitted on edges to learn from and other absent pairs.
      seed: of these other pairs.
    """
    if len(vectors) != split.nodes:
        raise DataError(f"there are {len(vectors)} vectors for {split.nodes} nodes")
    vectors = np.asarray(vectors, np.float64)
    edge, none = _products(vectors, split.held), _products(vectors, split.absent)
    if score == "dot":
        return _told_apart(edge.sum(1), none.sum(1))
    if score != "hadamard":
        raise ConfigError(f"scores are 'dot' or 'hadamard', not {score!r}")
    random = np.random.default_rng((seed, 3))
    graph = adjacency(split.nodes, split.sources, split.targets)
    most = min(len(split.sources), 100_000)
    chosen = random.choice(len(split.sources), most, replace=False)
    known = np.stack([split.sources[chosen], split.targets[chosen]], axis=1)
    others = random.integers(0, split.nodes, (2 * most, 2))
    others = others[~graph.has_edge(others[:, 0], others[:, 1])][:most]
    features = np.concatenate([_products(vectors, known), _products(vectors, others)])
    labels = np.repeat([1.0, 0.0], [len(known), len(others)])
    scale = features.std(0) + 1e-12
    weights = _logistic(features / scale, labels)
    return _told_apart(edge / scale @ weights, none / scale @ weights)


def _told_apart(edges: np.ndarray, none: np.ndarray) -> float:
    labels = np.repeat([1.0, 0.0], [len(edges), len(none)])
    return auc(labels, np.concatenate([edges, none]))


def _products(vectors: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return vectors[pairs[:, 0]] * vectors[pairs[:, 1]]


def _logistic(features: np.ndarray, labels: np.ndarray, penalty: float = 1.0) -> np.ndarray:
    """Weights of a logistic regression with an intercept that is left out of the outcome."""
    columns = np.concatenate([features, np.ones((len(features), 1))], axis=1)

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        scores = columns @ weights
        value = np.logaddexp(0, scores).sum() - labels @ scores
        gradient = columns.T @ (expit(scores) - labels)
        inner = np.append(weights[:-1], 0)
        return value + penalty / 2 * (inner @ inner), gradient + penalty * inner

    start = np.zeros(columns.shape[1])
    return minimize(objective, start, jac=True, method="L-BFGS-B").x[:-1]
