"""Graphs with an answer: nodes in groups, most edges inside these."""

from __future__ import annotations

import numpy as np


def planted(nodes: int, groups: int, degree: int, across: float, seed: int):
    """Sources, targets and each node's group; `across` of the edges end anywhere."""
    random = np.random.default_rng(seed)
    group = np.arange(nodes) % groups
    sources = random.integers(0, nodes, nodes * degree // 2)
    size = nodes // groups
    inside = group[sources] + groups * random.integers(0, size, len(sources))
    anywhere = random.integers(0, nodes, len(sources))
    targets = np.where(random.random(len(sources)) < across, anywhere, inside)
    kept = sources != targets
    return sources[kept], targets[kept], group
