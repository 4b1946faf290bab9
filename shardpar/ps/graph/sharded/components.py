"""Weakly connected components over edges that are split over devices.

Shiloach and Vishkin (1982): every device hooks roots along its own edges, the lowest root wins
over all devices, and pointers jump to the roots; until no edge joins two trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardpar.ps.graph.components import Components, by_size
from shardpar.ps.graph.graph import Graph
from shardpar.ps.graph.sharded.edges import AXIS, padded, split_over


def components(graph: Graph, devices: Sequence[jax.Device] | None = None) -> Components:
    """Weak components as `shardpar.ps.graph.components.components` numbers them.

    Args:
      graph: directions do not count.
      devices: to split the edges over; None takes all.
    """
    split = split_over(devices)
    ends = tuple(padded(e, split.devices, 0) for e in (graph.sources, graph.targets))
    if graph.num_nodes == 0:
        return by_size(np.empty(0, np.int64))

    def body(mine: Any, parents: Any) -> Any:
        sources, targets = mine

        def flat(parents: Any) -> Any:
            def again(state: Any) -> Any:
                above = state[0][state[0]]
                return above, (above != state[0]).any()

            return jax.lax.while_loop(lambda s: s[1], again, (parents, jnp.bool_(True)))[0]

        def again(state: Any) -> Any:
            parents = state[0]
            one, other = parents[sources], parents[targets]
            high, low = jnp.maximum(one, other), jnp.minimum(one, other)
            hooked = jax.lax.pmin(parents.at[high].min(low), AXIS)
            return flat(hooked), (hooked != parents).any()

        return jax.lax.while_loop(lambda s: s[1], again, (parents, jnp.bool_(True)))[0]

    roots = split.run(body, ends, np.arange(graph.num_nodes, dtype=np.int32))
    return by_size(np.asarray(roots))
