"""K-means: centres are a table, points are shared by the devices; Lloyd's steps or mini-batches.

Lloyd, "Least squares quantization in PCM", 1982; beginnings by k-means++ (Arthur, Vassilvitskii,
2007), greedy as in its section 5; mini-batches as in Sculley, "Web-scale k-means clustering", 2010.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from typing_extensions import override

from shardpar.errors import ConfigError, DataError
from shardpar.lowering.shardings import grid_sharding
from shardpar.ps.algorithms.embeddings import Progress, quiet
from shardpar.ps.exchange import COLUMNS, ROWS
from shardpar.ps.optimizers import RowOptimizer, Slots
from shardpar.ps.placement import Placement
from shardpar.ps.table import PlacedTable, Table, TableState, device_grid

_POINTS_AT_ONCE = 4096
_POINTS_TO_BEGIN_WITH = 50_000


@dataclass(frozen=True)
class RunningMean(RowOptimizer):
    """A row is the mean of what was given to it.

    The gradient has one column more than the row: the sum of the given, and last their weight.

    Attributes:
      forget: the row is the mean of this step's alone; one that is given nothing stays.
    """

    forget: bool = False

    @override
    def slots(self, dim: int) -> tuple[tuple[int, float], ...]:
        return ((1, 0.0),)

    @override
    def update(
        self, rows: jax.Array, slots: Slots, gradient: jax.Array, step: jax.Array, rate: jax.Array
    ) -> tuple[jax.Array, Slots]:
        sums, weight = gradient[:, :-1], gradient[:, -1:]
        total = weight if self.forget else slots[0] + weight
        moved = (sums - weight * rows) / jnp.where(total == 0, 1, total)
        return rows + moved, (total,)


@dataclass(frozen=True)
class KMeansOptions:
    """Attributes of k-means.

    Attributes:
      clusters: how many.
      iterations: at most, with all points; with mini-batches, passes over the points.
      tolerance: it ends when all centres together moved by less than this share of the points'
        mean variance, squared; 0 goes on until nothing moves. Of no meaning with mini-batches.
      batch: points of a mini-batch; None takes all points in each iteration.
    """

    clusters: int
    iterations: int = 100
    tolerance: float = 1e-4
    batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("clusters", "iterations", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} of k-means is at least 1, not {value}")
        if self.tolerance < 0:
            raise ConfigError(f"tolerance is not negative, not {self.tolerance}")


@dataclass(frozen=True, eq=False)
class Clusters:
    """What was found.

    Attributes:
      centres: float32[clusters, d].
      labels: int32[points], the nearest centre of each.
      inertia: the sum of squared distances to these.
      iterations: how many there were.
    """

    centres: np.ndarray
    labels: np.ndarray
    inertia: float
    iterations: int


def fit(
    options: KMeansOptions,
    points: Any,
    *,
    begin: np.ndarray | None = None,
    seed: int = 0,
    devices: Sequence[jax.Device] | None = None,
    progress: Progress = quiet,
) -> Clusters:
    """Finds centres.

    Args:
      options: of the algorithm.
      points: float[n, d], finite.
      begin: float[clusters, d], the first centres; None takes some by k-means++.
      seed: of everything random.
      devices: None takes all.
      progress: called after each iteration with the mean squared distance.

    Raises:
      DataError: a value is not finite, or there are fewer points than clusters.

    >>> import jax
    >>> points = np.array([[0.0], [1.0], [10.0], [11.0]])
    >>> found = fit(KMeansOptions(2), points, devices=jax.devices()[:1])
    >>> sorted(found.centres[:, 0].tolist()), found.inertia
    ([0.5, 10.5], 1.0)
    """
    points = np.asarray(points, np.float32)
    if points.ndim != 2 or len(points) < options.clusters:
        raise DataError(
            f"points are {list(points.shape)}; give [n, d] with at least {options.clusters} of "
            "them, one for each cluster"
        )
    bad = np.argwhere(~np.isfinite(points))
    if len(bad):
        raise DataError(f"point {bad[0, 0]} has {points[tuple(bad[0])]} in column {bad[0, 1]}")
    random = np.random.default_rng((seed, 6))
    # Distances from the mean lose least to rounding.
    mean = points.mean(axis=0, dtype=np.float64).astype(np.float32)
    points = points - mean
    first = first_centres(points, options.clusters, random) if begin is None else begin - mean
    if first.shape != (options.clusters, points.shape[1]):
        raise DataError(
            f"the first centres are {list(first.shape)}, not {[options.clusters, points.shape[1]]}"
        )
    devices = tuple(jax.devices() if devices is None else devices)
    table = Table(options.clusters, points.shape[1], RunningMean(options.batch is None))
    placed = PlacedTable(table, Placement(rows=len(devices)), device_grid(devices, len(devices), 1))
    nothing = np.zeros((options.clusters, 1), np.float32)
    state = placed.placed([first.astype(np.float32), nothing], 0)
    iterate = _lloyd if options.batch is None else _mini_batches
    state, iterations = iterate(options, placed, state, points, random, progress)
    labels, inertia = [], 0.0
    nearest = _program(placed, moves=False)
    size = -(-min(len(points), 1 << 20) // len(devices)) * len(devices)
    for part, weights in _parts(points, size):
        found, distance = nearest(state, part, weights)
        labels.append(np.asarray(found))
        inertia += float(distance)
    return Clusters(
        placed.whole(state)[0] + mean, np.concatenate(labels)[: len(points)], inertia, iterations
    )


def first_centres(points: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Points far from each other: each drawn by its squared distance to those before.

    Of several drawn, the one is taken that leaves the least distance; from at most 50,000
    points.
    """
    if len(points) > _POINTS_TO_BEGIN_WITH:
        most = max(_POINTS_TO_BEGIN_WITH, count)
        points = points[random.choice(len(points), most, replace=False)]
    norms = np.einsum("nd,nd->n", points, points)
    tries = 2 + int(np.log(count))
    chosen = [int(random.integers(len(points)))]
    distance = _distances(points, norms, points[chosen])[:, 0]
    while len(chosen) < count:
        total = np.cumsum(distance, dtype=np.float64)
        drawn = np.searchsorted(total, random.random(tries) * total[-1])
        drawn = np.minimum(drawn, len(points) - 1)
        left = np.minimum(_distances(points, norms, points[drawn]), distance[:, None])
        best = int(left.sum(axis=0).argmin())
        chosen.append(int(drawn[best]))
        distance = left[:, best]
    return points[chosen]


def _distances(points: np.ndarray, norms: np.ndarray, centres: np.ndarray) -> np.ndarray:
    squares = norms[:, None] - 2 * points @ centres.T + (centres * centres).sum(axis=1)
    return np.maximum(squares, 0)


def _lloyd(
    options: KMeansOptions,
    placed: PlacedTable,
    state: TableState,
    points: np.ndarray,
    _random: np.random.Generator,
    progress: Progress,
) -> tuple[TableState, int]:
    """All points in each iteration, on the devices from the first on."""
    step = _program(placed, moves=True)
    devices = placed.mesh.size
    ((part, weights),) = _parts(points, -(-len(points) // devices) * devices)
    split = grid_sharding(placed.mesh, ((ROWS, COLUMNS),), 1)
    part, weights = jax.device_put((part, weights), split)
    # Centres that rest still go back and forth in their last bits.
    rounding = (2 * float(np.finfo(np.float32).eps)) ** 2 * float((points**2).mean(axis=0).sum())
    enough = max(options.tolerance * float(points.var(axis=0).mean()), rounding * placed.table.rows)
    for iteration in range(1, options.iterations + 1):
        state, distance, moved = step(state, part, weights)
        progress(iteration, options.iterations, float(distance) / len(points))
        if float(moved) <= enough:
            return state, iteration
    return state, options.iterations


def _mini_batches(
    options: KMeansOptions,
    placed: PlacedTable,
    state: TableState,
    points: np.ndarray,
    random: np.random.Generator,
    progress: Progress,
) -> tuple[TableState, int]:
    """Points in an order drawn for each pass; a centre is the mean of all it ever got."""
    assert options.batch is not None
    step = _program(placed, moves=True)
    size = -(-min(options.batch, len(points)) // placed.mesh.size) * placed.mesh.size
    for iteration in range(1, options.iterations + 1):
        total = jnp.float32(0)
        for part, weights in _parts(points[random.permutation(len(points))], size):
            state, distance, _ = step(state, part, weights)
            total += distance
        progress(iteration, options.iterations, float(total) / len(points))
    return state, options.iterations


def _parts(points: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Points so many at a time, with weight 1, and fillings of weight 0."""
    for at in range(0, len(points), size):
        part = points[at : at + size]
        missing = size - len(part)
        weights = np.append(np.ones(len(part), np.float32), np.zeros(missing, np.float32))
        yield np.concatenate([part, np.zeros((missing, part.shape[1]), np.float32)]), weights


def _program(placed: PlacedTable, *, moves: bool) -> Callable[..., Any]:
    """From the table, points and weights: a step of the centres, or the labels of points.

    The centres of all devices go to each (Split to Replicate), the sums that each device has
    of its points to the centres' owners (Partial to Split).
    """
    rule = placed.table.optimizer

    def local(state: TableState, points: jax.Array, weights: jax.Array) -> Any:
        centres = lax.all_gather(state.rows, ROWS, tiled=True)
        there = jnp.asarray(placed.stored_ids())
        norms = jnp.where(there >= 0, (centres * centres).sum(axis=1), jnp.inf)
        labels, distances, sums = _assigned(points, weights, centres, norms, sums=moves)
        total = lax.psum(distances, (ROWS, COLUMNS))
        if not moves:
            return there[labels], total
        own = lax.psum_scatter(sums, ROWS, tiled=True)
        step = state.step + 1
        rows, slots = rule.update(state.rows, state.slots, own, step, jnp.float32(1))
        moved = lax.psum(((rows - state.rows) ** 2).sum(), (ROWS, COLUMNS))
        return TableState(rows, slots, step, state.scratch, state.key), total, moved

    whole = grid_sharding(placed.mesh, (), 0).spec
    split = grid_sharding(placed.mesh, ((ROWS, COLUMNS),), 1).spec
    state = jax.tree.map(lambda sharding: sharding.spec, placed.shardings)
    mapped = jax.shard_map(
        local,
        mesh=placed.mesh,
        in_specs=(state, split, split),
        out_specs=(state, whole, whole) if moves else (split, whole),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=(0,) if moves else ())


def _assigned(
    points: jax.Array, weights: jax.Array, centres: jax.Array, norms: jax.Array, *, sums: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each point's nearest centre, the sum of squared distances, and each centre's points.

    Some thousand points at a time, so that no array of all points and all centres is made.
    """
    count, dim = points.shape
    at_once = min(count, _POINTS_AT_ONCE)
    missing = -count % at_once
    points = jnp.pad(points, ((0, missing), (0, 0))).reshape(-1, at_once, dim)
    weights = jnp.pad(weights, (0, missing)).reshape(-1, at_once)

    def some(carry: tuple[jax.Array, jax.Array], part: Any) -> Any:
        distances, total = carry
        point, weight = part
        scores = norms - 2 * point @ centres.T
        label = scores.argmin(axis=1)
        # From the difference: squares that are taken apart cancel, and leave few bits.
        least = ((point - centres[label]) ** 2).sum(axis=1)
        if sums:
            with_weight = jnp.concatenate([point, jnp.ones_like(weight)[:, None]], axis=1)
            total = total.at[label].add(with_weight * weight[:, None])
        return (distances + (least * weight).sum(), total), label.astype(jnp.int32)

    start = (jnp.float32(0), jnp.zeros((centres.shape[0], dim + 1), jnp.float32))
    (distances, total), labels = lax.scan(some, start, (points, weights))
    return labels.reshape(-1)[:count], distances, total
