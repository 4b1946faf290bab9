"""PageRank in mixed precision, on one host.

Page, Brin, Motwani and Winograd, The PageRank citation ranking (1999); personalised as in
Haveliwala, Topic-sensitive PageRank (WWW 2002). Corrections are iterated in float32 and their
sum is checked in float64, as in iterative refinement (Wilkinson 1963): sparse products are bound
by memory traffic, and most of them need not be exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from shardpar.errors import DataError, RunError, UserError
from shardpar.ps.graph.graph import Graph, incoming

SMALLEST_TOL = 1e-13
"""Sums of ranks in float64 are no more exact than that."""
_INNER_GAIN = 1e-5
"""What float32 may gain before the residual is computed anew."""
_SAFETY = 0.7
"""Of the residual that is wanted: float32 is a little off."""


@dataclass(frozen=True)
class PageRankOptions:
    """What is to be computed, and how exactly.

    Attributes:
      directed: False follows edges both ways.
      damping: the share of steps that follow an edge; the others restart. 0 to below 1.
      tol: the sum of the absolute errors of all ranks may be so much.
      max_iterations: products with the graph's matrix before it is given up.
    """

    directed: bool = True
    damping: float = 0.85
    tol: float = 1e-9
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        if not 0 <= self.damping < 1:
            raise UserError(f"damping is {self.damping}; write a number from 0 to below 1")
        if not SMALLEST_TOL <= self.tol <= 2:
            raise UserError(f"tol is {self.tol}; write a number from {SMALLEST_TOL} to 2")
        if self.max_iterations < 1:
            raise UserError(f"max_iterations is {self.max_iterations}; write 1 or more")


@dataclass(frozen=True, eq=False)
class Ranks:
    """PageRank of every node.

    Attributes:
      ranks: float64[nodes], adding up to 1.
      iterations: products with the graph's matrix.
      error: an upper bound of the sum of the absolute errors of `ranks`.
    """

    ranks: np.ndarray
    iterations: int
    error: float


def pagerank(
    graph: Graph, options: PageRankOptions | None = None, restart: np.ndarray | None = None
) -> Ranks:
    """The share of time that a random surfer spends at each node.

    A step follows one of the node's edges, chosen by weight, or restarts; from a node without
    edges out, every step restarts. Parallel edges add up.

    Args:
      graph: with at least one node.
      options: damping and exactness.
      restart: float[nodes], how likely a restart leads to each node, up to a factor; None is
        all alike. This is what makes it personalised.

    Raises:
      DataError: `restart` is no distribution over the nodes.
      RunError: `tol` was not reached; raise `max_iterations` or `tol`.

    >>> from shardpar.ps.graph.graph import from_arrays
    >>> pagerank(from_arrays([0, 1, 2], [1, 2, 1])).ranks.round(4).tolist()
    [0.05, 0.4865, 0.4635]
    """
    options = options or PageRankOptions()
    home = restart_distribution(graph, restart)
    single = incoming(graph, directed=options.directed, dtype=np.float32)
    if graph.weights is None:
        ones = np.ones(single.nnz)
        double = sparse.csr_array((ones, single.indices, single.indptr), shape=single.shape)
    else:
        double = incoming(graph, directed=options.directed)
    if options.directed or graph.weights is not None:
        total = out_weight(graph, options.directed)
    else:
        total = np.diff(single.indptr).astype(np.float64)
    share = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
    walk = _Walk(double, share, np.flatnonzero(total == 0), home, options.damping)
    draft = _Walk(
        single, share.astype(np.float32), walk.dangling, home.astype(np.float32), options.damping
    )
    return (_by_power if options.directed else _by_gradients)(walk, draft, options)


@dataclass(frozen=True)
class _Walk:
    """One step of the surfer, in one precision.

    Attributes:
      matrix: [nodes, nodes], the weights of the edges into each node.
      share: [nodes], what one unit of weight out of a node gets of its rank.
      dangling: nodes without edges out.
      home: [nodes], where a restart leads.
    """

    matrix: Any
    share: np.ndarray
    dangling: np.ndarray
    home: np.ndarray
    damping: float

    def along_edges(self, ranks: np.ndarray) -> np.ndarray:
        """What follows an edge, and is not lost to a restart."""
        moved = self.matrix @ (ranks * self.share)
        moved *= self.damping
        return moved

    def step(self, ranks: np.ndarray, mass: float) -> np.ndarray:
        """The same with restarts, whatever makes them: what is missing of `mass` goes home."""
        moved = self.along_edges(ranks)
        moved += self.home * moved.dtype.type(mass - moved.sum(dtype=np.float64))
        return moved


def _by_power(walk: _Walk, draft: _Walk, options: PageRankOptions) -> Ranks:
    """The residual after k steps is the k-th power of the step times the first residual."""
    goal = options.tol * (1 - options.damping)
    ranks, iterations, best = walk.home.copy(), 0, np.inf
    while True:
        # Mass that float32 lost would decay by no more than the damping in each step.
        ranks /= ranks.sum()
        residual = walk.step(ranks, 1.0) - ranks
        iterations += 1
        left = _norm(residual)
        if left <= goal:
            return Ranks(ranks, iterations, left / (1 - options.damping))
        _check(left, best, iterations, options)
        best = left
        # Scaled to 1, so that nothing underflows.
        change = (residual / left).astype(np.float32)
        total, size = change.copy(), np.inf
        while iterations + 1 < options.max_iterations:
            change = draft.step(change, 0.0)
            iterations += 1
            total += change
            size, before = _norm(change), size
            if size <= max(_INNER_GAIN, _SAFETY * goal / left) or size >= before:
                break
        ranks += left * total


def _by_gradients(walk: _Walk, draft: _Walk, options: PageRankOptions) -> Ranks:
    """Conjugate gradients (Hestenes and Stiefel 1952), which undirected graphs allow.

    Where edges go both ways, I - damping x (matrix x share) is symmetric and positive in the
    inner product weighted by `share`. Nodes without edges then have no edges in either, and stand
    apart: up to a factor, their rank is that of the restart.
    """
    restarts = walk.home.copy()
    restarts[walk.dangling] = 0
    ranks = restarts / (1 - options.damping)
    mass = ranks.sum() + walk.home[walk.dangling].sum()
    goal = options.tol * (1 - options.damping) * mass
    iterations, best = 0, np.inf
    while True:
        residual = restarts + walk.along_edges(ranks) - ranks
        iterations += 1
        left = _norm(residual)
        if left <= goal:
            ranks[walk.dangling] = walk.home[walk.dangling]
            return Ranks(ranks / ranks.sum(), iterations, left / mass / (1 - options.damping))
        _check(left / mass, best, iterations, options)
        best = left / mass
        rest = (residual / left).astype(np.float32)
        way, total = rest.copy(), np.zeros_like(rest)
        size = _dot(rest, rest * draft.share)
        while iterations + 1 < options.max_iterations:
            ahead = way - draft.along_edges(way)
            iterations += 1
            length = np.float32(size / _dot(way * draft.share, ahead))
            total += length * way
            ahead *= length
            rest -= ahead
            new_size = _dot(rest, rest * draft.share)
            if _norm(rest) <= max(_INNER_GAIN, _SAFETY * goal / left) or new_size <= 0:
                break
            way *= np.float32(new_size / size)
            way += rest
            size = new_size
        ranks += left * total


def _check(left: float, best: float, iterations: int, options: PageRankOptions) -> None:
    if left < best and iterations < options.max_iterations:
        return
    raise RunError(
        f"PageRank: the ranks are exact to {left / (1 - options.damping):.1e} after "
        f"{iterations} iterations, and tol is {options.tol:.1e}; write a larger tol or "
        "more max_iterations"
    )


def restart_distribution(graph: Graph, restart: np.ndarray | None) -> np.ndarray:
    """float64[nodes] that add up to 1.

    Raises:
      DataError: there are no nodes, or `restart` is no distribution over them.
    """
    if graph.num_nodes == 0:
        raise DataError("the graph has no nodes; PageRank needs at least one")
    if restart is None:
        return np.full(graph.num_nodes, 1 / graph.num_nodes)
    home = np.asarray(restart, np.float64)
    if home.shape != (graph.num_nodes,):
        raise DataError(f"restart is {home.shape}; give one number for each node")
    if not (np.isfinite(home).all() and (home >= 0).all() and home.sum() > 0):
        raise DataError("restart has to be finite, not negative, and somewhere above 0")
    return home / home.sum()


def out_weight(graph: Graph, directed: bool) -> np.ndarray:
    """float64[nodes]: the weights of the edges out of each node, added up."""
    nodes = graph.num_nodes
    total = np.bincount(graph.sources, graph.weights, nodes).astype(np.float64)
    if not directed:
        away = graph.sources != graph.targets
        weights = None if graph.weights is None else graph.weights[away]
        total += np.bincount(graph.targets[away], weights, nodes)
    return total


def _norm(values: np.ndarray) -> float:
    return float(np.abs(values).sum(dtype=np.float64))


def _dot(one: np.ndarray, other: np.ndarray) -> float:
    # BLAS would wake all its threads for this.
    return float(np.einsum("i,i->", one, other))
