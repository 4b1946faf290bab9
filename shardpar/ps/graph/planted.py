"""Graphs with an answer: nodes lie in groups, and most edges are inside these.

The planted partition of Condon and Karp, "Algorithms for graph partitioning on the planted
partition model", 2001, with a given number of edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardpar.errors import DataError
from shardpar.ps.graph.graph import Graph, from_arrays


@dataclass(frozen=True, eq=False)
class Planted:
    """Attributes of a generated graph.

    Attributes:
      graph: whose edges are drawn with replacement; loops are left out.
      groups: int64[nodes], the group of each.
    """

    graph: Graph
    groups: np.ndarray


def planted(nodes: int, groups: int, degree: int, across: float, seed: int) -> Planted:
    """Draws a graph.

    Args:
      nodes: how many.
      groups: node i is in group i modulo so many.
      degree: edges of a node, on average.
      across: share of edges whose end is drawn from all nodes, not from the group.
      seed: of the draws.

    Raises:
      DataError: a group would have less than two nodes.

    >>> made = planted(100, 10, 8, 0.0, seed=0)
    >>> bool((made.groups[made.graph.sources] == made.groups[made.graph.targets]).all())
    True
    """
    size = nodes // groups
    if size < 2:
        raise DataError(
            f"{nodes} nodes in {groups} groups leave {size} to a group; ask for at least "
            f"{2 * groups} nodes, or for fewer groups"
        )
    random = np.random.default_rng((seed, 5))
    group = np.arange(nodes) % groups
    sources = random.integers(0, nodes, nodes * degree // 2)
    inside = group[sources] + groups * random.integers(0, size, len(sources))
    anywhere = random.integers(0, nodes, len(sources))
    targets = np.where(random.random(len(sources)) < across, anywhere, inside)
    kept = sources != targets
    graph = from_arrays(sources[kept], targets[kept], num_nodes=nodes)
    return Planted(graph, group)
