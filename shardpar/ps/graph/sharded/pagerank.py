"""PageRank by power iteration over edges that are split over devices (Page and others 1999).

Nodes of similar degree are rows of one rectangle of source indices, so a step is gathers and
sums along rows, without any scatter: scatters with duplicate indices are slow on accelerators.
Rectangles are Split over devices by rows; each step brings the ranks from Split to Replicate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardpar.errors import RunError
from shardpar.ps.graph.graph import Graph, incoming, ranges
from shardpar.ps.graph.pagerank import (
    PageRankOptions,
    Ranks,
    out_weight,
    restart_distribution,
)
from shardpar.ps.graph.sharded.edges import AXIS, padded, split_over

_WIDEST = 512


@dataclass(frozen=True)
class _Rectangles:
    """Sources of edges, by target.

    Attributes:
      sources: int32[rows, width] each, padded with the number of nodes; narrowest first.
      weights: float64, the same shapes; None if all are 1.
      place: int32[nodes], where a node's row is when those of all devices stand one after the
        other; one past the end for nodes without a row of their own.
      hub_rows, hubs: int32, rows that are parts of a node's, and which node's.
    """

    sources: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...] | None
    place: np.ndarray
    hub_rows: np.ndarray
    hubs: np.ndarray


def pagerank(
    graph: Graph,
    options: PageRankOptions | None = None,
    restart: np.ndarray | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Ranks:
    """PageRank as `shardpar.ps.graph.pagerank.pagerank` defines it, with the edges over devices.

    Args:
      graph: with at least one node; weights add up.
      options: damping and exactness.
      restart: float[nodes], where restarts lead.
      devices: to split over; None takes all.

    Raises:
      DataError: `restart` is no distribution over the nodes.
      RunError: `tol` was not reached; raise `max_iterations` or `tol`.
    """
    options = options or PageRankOptions()
    home = restart_distribution(graph, restart)
    split = split_over(devices)
    parts = _rectangles(graph, split.devices, options.directed)
    total = out_weight(graph, options.directed)
    share = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
    damping, goal = options.damping, options.tol * (1 - options.damping)

    def body(pieces: Any, whole: Any) -> Any:
        home, share, dangling, place, hub_rows, hubs = whole

        def step(ranks: Any) -> Any:
            given = jnp.append(ranks * share, 0.0)
            sums = [given.at[s].get(mode="promise_in_bounds") for s in pieces[0]]
            if pieces[1] is not None:
                sums = [g * w for g, w in zip(sums, pieces[1], strict=True)]
            mine = jnp.concatenate([g.sum(1) for g in sums])
            rows = jnp.append(jax.lax.all_gather(mine, AXIS, tiled=True), 0.0)
            moved = rows.at[place].get(mode="promise_in_bounds").at[hubs].add(rows[hub_rows])
            restarts = 1 - damping + damping * jnp.where(dangling, ranks, 0.0).sum()
            return damping * moved + restarts * home

        def goes_on(state: Any) -> Any:
            _, left, iterations = state
            return (left > goal) & (iterations < options.max_iterations)

        def again(state: Any) -> Any:
            ranks, _, iterations = state
            new = step(ranks)
            return new, jnp.abs(new - ranks).sum() * damping, iterations + 1

        return jax.lax.while_loop(goes_on, again, (home, jnp.float64(np.inf), jnp.int32(0)))

    with jax.enable_x64(True):
        whole = (home, share, total == 0, parts.place, parts.hub_rows, parts.hubs)
        ranks, left, iterations = split.run(body, (parts.sources, parts.weights), whole)
        ranks, left = np.asarray(ranks), float(left)
    error = left / (1 - damping)
    if left > goal:
        raise RunError(
            f"PageRank: the ranks are exact to {error:.1e} after {int(iterations)} iterations, "
            f"and tol is {options.tol:.1e}; write a larger tol or more max_iterations"
        )
    return Ranks(ranks / ranks.sum(), int(iterations), error)


def _rectangles(graph: Graph, devices: int, directed: bool) -> _Rectangles:
    matrix = incoming(graph, directed=directed)
    nodes, starts = graph.num_nodes, matrix.indptr.astype(np.int64)
    degree = np.diff(starts)
    pieces = -(-degree // _WIDEST)
    owner = np.repeat(np.arange(nodes), pieces)
    first = starts[owner] + ranges(np.zeros(nodes, np.int64), pieces) * _WIDEST
    length = np.minimum(starts[owner + 1] - first, _WIDEST)
    width = 2 ** np.ceil(np.log2(length)).astype(np.int64)
    widths = [w.item() for w in np.unique(width)] or [1]
    members = [np.flatnonzero(width == w) for w in widths]
    # Each device has the same number of rows of each width, and all of them one after the other.
    per_device = [max(1, -(-len(m) // devices)) for m in members]
    before = np.concatenate([[0], np.cumsum(per_device)])
    position = np.empty(len(owner), np.int64)
    sources, weights = [], []
    for member, rows, offset, size in zip(members, per_device, before, widths, strict=False):
        device, row = np.divmod(np.arange(len(member)), rows)
        position[member] = device * before[-1] + offset + row
        at = (
            np.repeat(np.arange(len(member)), length[member]),
            ranges(np.zeros(len(member), np.int64), length[member]),
        )
        edges = ranges(first[member], first[member] + length[member])
        for kept, values, fill in ((sources, matrix.indices, nodes), (weights, matrix.data, 0)):
            block = np.full((len(member), size), fill, values.dtype)
            block[at] = values[edges]
            kept.append(padded(block, rows * devices, fill))
    is_hub = pieces[owner] > 1
    place = np.full(nodes, devices * before[-1])
    place[owner[~is_hub]] = position[~is_hub]
    return _Rectangles(
        tuple(sources),
        None if graph.weights is None else tuple(weights),
        place,
        position[is_hub],
        owner[is_hub],
    )
