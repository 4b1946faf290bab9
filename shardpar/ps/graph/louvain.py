"""Communities of high modularity, by igraph or networkit.

Blondel, Guillaume, Lambiotte and Lefebvre, Fast unfolding of communities in large networks (2008);
modularity is Newman and Girvan's (2004). networkit's is the parallel form of Staudt and
Meyerhenke (2016).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from shardpar.errors import UserError
from shardpar.ps.graph.backends import BackendName
from shardpar.ps.graph.components import by_size
from shardpar.ps.graph.graph import Graph, simple
from shardpar.ps.graph.libraries import igraph_of, networkit_of


@dataclass(frozen=True, eq=False)
class Communities:
    """A partition of the nodes.

    Attributes:
      labels: int32[nodes]; 0 is the largest community.
      sizes: int64[communities], falling.
      modularity: how many more edges are inside than by chance, as a share of all, -0.5 to 1.
    """

    labels: np.ndarray
    sizes: np.ndarray
    modularity: float


def louvain(
    graph: Graph, backend: BackendName = "igraph", *, resolution: float = 1.0, seed: int = 0
) -> Communities:
    """Communities by local moves of nodes, then of whole communities.

    It is a heuristic: backends, and seeds, find different partitions of much the same modularity.

    Args:
      graph: directions and self-loops do not count. Of parallel edges weights add up; without
        weights they count once.
      backend: igraph or networkit.
      resolution: above 1 for smaller communities.
      seed: igraph finds the same communities for the same seed.

    Raises:
      UserError: `resolution` is not a positive number.

    >>> from shardpar.ps.graph.graph import from_arrays
    >>> louvain(from_arrays([0, 1, 2, 3, 4, 5], [1, 2, 0, 4, 5, 3])).labels.tolist()
    [0, 0, 0, 1, 1, 1]
    """
    if not 0 < resolution < np.inf:
        raise UserError(f"resolution is {resolution}; write a number above 0")
    once = simple(graph)
    labels = (_igraph if backend == "igraph" else _networkit)(once, resolution, seed)
    numbered = by_size(labels)
    return Communities(
        numbered.labels, numbered.sizes, modularity(once, numbered.labels, resolution)
    )


def modularity(graph: Graph, labels: np.ndarray, resolution: float = 1.0) -> float:
    """The modularity of a partition; 0 for a graph without edges.

    Args:
      graph: undirected, as `graph.simple` makes it.
      labels: int[nodes].
      resolution: weighs what chance would give.
    """
    weights = np.ones(graph.num_edges) if graph.weights is None else graph.weights
    total = weights.sum()
    if total == 0:
        return 0.0
    inside = weights[labels[graph.sources] == labels[graph.targets]].sum() / total
    strength = np.bincount(labels[graph.sources], weights, int(labels.max()) + 1)
    strength += np.bincount(labels[graph.targets], weights, int(labels.max()) + 1)
    return float(inside - resolution * ((strength / (2 * total)) ** 2).sum())


def _igraph(graph: Graph, resolution: float, seed: int) -> np.ndarray:
    import igraph

    made = igraph_of(graph)
    # igraph has one generator for the whole process; this is the only way to seed it.
    igraph.set_random_number_generator(random.Random(seed))
    try:
        weights = None if graph.weights is None else "weight"
        found = made.community_multilevel(weights, resolution=resolution)
    finally:
        igraph.set_random_number_generator(random)
    return np.asarray(found.membership, np.int64)


def _networkit(graph: Graph, resolution: float, seed: int) -> np.ndarray:
    import networkit

    networkit.engineering.setSeed(seed, False)
    found = networkit.community.PLM(networkit_of(graph), refine=False, gamma=resolution)
    found.run()
    return np.asarray(found.getPartition().getVector(), np.int64)
