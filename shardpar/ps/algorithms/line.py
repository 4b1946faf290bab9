"""LINE: vectors from edges alone, by first-order and second-order proximity.

Tang et al., "LINE: large-scale information network embedding", 2015. First order: the ends of
an edge lie together. Second order: nodes with the same neighbours do, by vectors of contexts
beside those of nodes. Edges are drawn by weight, so that all steps are of one size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from msgspec import Meta

from shardpar.ps.algorithms.alias import AliasTables, alias_tables
from shardpar.ps.algorithms.embeddings import NodeEmbeddings, Progress, quiet
from shardpar.ps.algorithms.keeping import NOTHING, Keeper
from shardpar.ps.algorithms.lookup_program import (
    Batch,
    Formula,
    Lookup,
    LookupProgram,
    Rows,
    trained,
)
from shardpar.ps.algorithms.walks import checked_edges
from shardpar.ps.initializers import Uniform, Zeros
from shardpar.ps.optimizers import RowWiseAdaGrad
from shardpar.ps.placement import Placement
from shardpar.ps.table import Table

TRAINS = "nodes"

Order = Literal["first", "second", "both"]
Positive = Annotated[int, Meta(ge=1)]
Rate = Annotated[float, Meta(gt=0.0)]


@dataclass(frozen=True)
class LineOptions:
    """Attributes of LINE.

    Attributes:
      dim: of the vectors; with both orders each has half of it.
      order: "first", "second", or "both", side by side, each of length 1.
      samples_per_edge: how often an edge of mean weight is drawn.
      negatives: of each edge.
      learning_rate: of row-wise AdaGrad. Gradients of a step are summed, not averaged.
      last_rate: the learning rate falls in a line to this share of itself.
      directed: an edge says something about its source only.
      power: negatives are drawn by degree to this power.
      batch_edges: of a step; None takes about the nodes, 256 to 4096.
      block: edges that share negatives.
      shared: negatives that a block shares.
    """

    dim: Positive = 128
    order: Order = "both"
    samples_per_edge: Rate = 100.0
    negatives: Positive = 5
    learning_rate: Rate = 0.05
    last_rate: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.004
    directed: bool = False
    power: Annotated[float, Meta(ge=0.0)] = 0.75
    batch_edges: Positive | None = None
    block: Positive = 32
    shared: Positive = 16

    def __post_init__(self) -> None:
        if self.order not in ("first", "second", "both"):
            raise ValueError(f"LINE is of order 'first', 'second' or 'both', not {self.order!r}")
        if self.dim < 1 or (self.order == "both" and self.dim % 2):
            raise ValueError(f"dim {self.dim} of LINE is not shared by both orders: make it even")
        for name in ("negatives", "block", "shared", "batch_edges"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} of LINE is at least 1, not {value}")
        if not self.samples_per_edge > 0:
            raise ValueError(f"samples_per_edge is above 0, not {self.samples_per_edge}")


def edge_loss(negatives: int) -> Formula:
    """The gradients of -log sigmoid(score) of edges and -log sigmoid(-score) of negatives.

    Args:
      negatives: how many draws the shared negatives of an edge stand for.

    Returns:
      A formula of the rows of "sources" [b, t, d], "targets" [b, t, d], "negatives" [b, k, d].
    """

    def formula(rows: Rows, _batch: Batch) -> tuple[Rows, jax.Array, jax.Array]:
        source, target, noise = rows
        weight = negatives / noise.shape[1]
        score = (source * target).sum(axis=-1)
        against = jnp.einsum("btd,bkd->btk", source, noise)
        slope = (jax.nn.sigmoid(score) - 1)[..., None]
        push = weight * jax.nn.sigmoid(against)
        gradients = (
            slope * target + jnp.einsum("btk,bkd->btd", push, noise),
            slope * source,
            jnp.einsum("btk,btd->bkd", push, source),
        )
        loss = jax.nn.softplus(-score).sum() + weight * jax.nn.softplus(against).sum()
        return gradients, loss, jnp.float32(score.size)

    return formula


def fit(
    options: LineOptions,
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

    Returns:
      The vectors, and the mean loss of an edge for each order.

    Raises:
      DataError: an edge names no node, or a weight is not positive.
    """
    edges = checked_edges(nodes, sources, targets, weights)
    devices = tuple(jax.devices() if devices is None else devices)
    orders = ("first", "second") if options.order == "both" else (options.order,)
    parts: list[np.ndarray] = []
    losses = []
    for part, order in enumerate(orders):
        over = keeper.finished(part)
        if over is not None:
            parts.append(over[0])
            losses.append(over[1])
            continue
        program, steps = _program(options, order, nodes, edges, devices, placement)
        before, all_steps = len(parts) * steps, len(orders) * steps

        def seen(
            done: int, _of: int, loss: float, before: int = before, of: int = all_steps
        ) -> None:
            progress(before + done, of, loss)

        random = np.random.default_rng((seed, 4, orders.index(order)))
        blocks = _blocks(options, nodes, devices)
        stream = _batches(options, nodes, edges, blocks, steps, random)
        states, (loss,) = trained(
            program, seed, [stream], steps, seen, keeper, part, batch_size=blocks * options.block
        )
        vectors = program.tables[0].whole(states[0])[0]
        if len(orders) == 2:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        keeper.finish(vectors, loss)
        parts.append(vectors)
        losses.append(loss)
    return NodeEmbeddings(np.concatenate(parts, axis=1), tuple(losses))


Edges = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _blocks(options: LineOptions, nodes: int, devices: Sequence[jax.Device]) -> int:
    edges = options.batch_edges or min(max(nodes, 256), 4096)
    return max(1, round(edges / (options.block * len(devices)))) * len(devices)


def _program(
    options: LineOptions,
    order: str,
    nodes: int,
    edges: Edges,
    devices: tuple[jax.Device, ...],
    placement: Placement | None,
) -> tuple[LookupProgram, int]:
    """The tables of one order, and how many steps they take."""
    dim = options.dim // (2 if options.order == "both" else 1)
    size = _blocks(options, nodes, devices) * options.block
    steps = max(1, round(options.samples_per_edge * len(edges[0]) / size))
    rule = RowWiseAdaGrad(options.learning_rate)
    tables = [Table(nodes, dim, rule, Uniform(0.5 / dim))]
    if order == "second":
        tables.append(Table(nodes, dim, rule, Zeros()))
    other = len(tables) - 1
    program = LookupProgram(
        tables,
        (Lookup(0, "sources"), Lookup(other, "targets"), Lookup(other, "negatives")),
        edge_loss(options.negatives),
        devices=devices,
        placement=placement,
        rate=optax.linear_schedule(1.0, options.last_rate, steps),
    )
    return program, steps


def _batches(
    options: LineOptions,
    nodes: int,
    edges: Edges,
    blocks: int,
    steps: int,
    random: np.random.Generator,
) -> Iterator[dict[str, np.ndarray]]:
    """Edges by weight, each in a direction of its own, and negatives by degree."""
    sources, targets, weights = edges
    degree = np.bincount(targets, weights, minlength=nodes).astype(np.float64)
    if not options.directed:
        degree += np.bincount(sources, weights, minlength=nodes)
    noise = _one_row(degree**options.power)
    by_weight = None if weights is None else _one_row(weights)
    shape = (blocks, options.block)
    count = blocks * options.block
    for _ in range(steps):
        if by_weight is None:
            drawn = random.integers(0, len(sources), count)
        else:
            drawn = by_weight.draw(np.zeros(count, np.int64), random)
        begin, end = sources[drawn], targets[drawn]
        if not options.directed:
            turned = random.random(count) < 0.5
            begin, end = np.where(turned, end, begin), np.where(turned, begin, end)
        negatives = noise.draw(np.zeros(blocks * options.shared, np.int64), random)
        yield {
            "sources": begin.reshape(shape).astype(np.int32),
            "targets": end.reshape(shape).astype(np.int32),
            "negatives": negatives.reshape(blocks, options.shared).astype(np.int32),
        }


def _one_row(weights: np.ndarray) -> AliasTables:
    return alias_tables(np.array([0, len(weights)]), weights)
