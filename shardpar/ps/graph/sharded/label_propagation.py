"""Semi-synchronous label propagation over edges that are split over devices.

The same moves as on one host (Cordasco and Gargano 2010): each device sorts its own edges by
target and label, and tells the others the labels of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardpar.ps.graph.graph import Graph, simple
from shardpar.ps.graph.label_propagation import (
    LabelOptions,
    communities_of,
    first_labels,
    second_half,
)
from shardpar.ps.graph.louvain import Communities
from shardpar.ps.graph.sharded.edges import AXIS, rows_of, split_over


def label_propagation(
    graph: Graph,
    options: LabelOptions | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Communities:
    """Communities as `shardpar.ps.graph.label_propagation.label_propagation` finds them.

    Args:
      graph: directions and self-loops do not count. Of parallel edges weights add up; without
        weights they count once.
      options: seed and limit.
      devices: to split the edges over; None takes all.
    """
    options = options or LabelOptions()
    once = simple(graph)
    split = split_over(devices)
    rows = rows_of(once, split.devices, directed=False)
    begun = first_labels(once.num_nodes, options.seed)
    if once.num_edges == 0:
        return communities_of(once, begun)
    nodes = once.num_nodes

    def body(mine: Any, begun: Any) -> Any:
        sources, targets, weights = mine
        every = jnp.arange(nodes, dtype=jnp.uint32)
        weights = jnp.ones(sources.shape, jnp.float64) if weights is None else weights

        def best(labels: Any) -> Any:
            """int32[nodes]: the label for each of this device's rows; -1 for other nodes."""
            rows, label, weight = jax.lax.sort((targets, labels[sources], weights), num_keys=2)
            new = jnp.append(True, (rows[1:] != rows[:-1]) | (label[1:] != label[:-1]))
            run = jnp.cumsum(new) - 1
            edges = len(rows)
            total = jax.ops.segment_sum(weight, run, edges, indices_are_sorted=True)[run]
            most = jax.ops.segment_max(total, rows, nodes + 1, indices_are_sorted=True)
            good = total == most[rows]
            own = jnp.append(labels, -1)[rows]
            first = jax.ops.segment_min(jnp.where(good, label, nodes), rows, nodes + 1)[:nodes]
            keeps = jax.ops.segment_max((good & (label == own)).astype(jnp.int32), rows, nodes + 1)
            mine = jnp.where(first < nodes, first, -1)
            return jnp.where(keeps[:nodes] > 0, labels, mine)

        def move(labels: Any, moving: Any) -> Any:
            found = jax.lax.pmax(best(labels), AXIS)
            return jnp.where((found >= 0) & moving, found, labels)

        def again(state: Any) -> Any:
            labels, _, iteration = state
            second = second_half(every, iteration, options.seed)
            new = move(move(labels, ~second), second)
            return new, (new != labels).any(), iteration + jnp.uint32(1)

        def goes_on(state: Any) -> Any:
            return state[1] & (state[2] < options.max_iterations)

        return jax.lax.while_loop(goes_on, again, (begun, jnp.bool_(True), jnp.uint32(0)))[0]

    with jax.enable_x64(True):
        labels = np.asarray(split.run(body, (rows.sources, rows.targets, rows.weights), begun))
    return communities_of(once, labels)
