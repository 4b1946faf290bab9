"""Which layers each stage of a pipeline gets: exact for the stated objective, with a bound.

A step of a pipeline with m micro-batches is priced as sum(t) + (m - 1) * max(t), with t
the seconds of each stage (Alpa, arXiv 2201.12023). For any cap on max(t) the fastest
division is a dynamic programme over layers; caps are lowered until none can win.
Seconds of a stage start as lower bounds that cost nothing and are replaced by exact
ones only where the best division uses them, so few stages are ever solved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

Exact = Callable[[int, int, int], float]
"""Exact seconds of (stage, first layer, end layer): inf where nothing fits."""


@dataclass(frozen=True)
class Division:
    """Layers for the stages of one pipeline.

    Attributes:
      cuts: stage s has the layers cuts[s] to cuts[s + 1].
      step_s: of the objective.
      lower_bound_s: no division is faster.
    """

    cuts: tuple[int, ...]
    step_s: float
    lower_bound_s: float


@dataclass
class StageSeconds:
    """Seconds of every stage for every range of layers: bounds, made exact on demand.

    Attributes:
      lower: per stage, [layers + 1, layers + 1]: from layer i to j; inf where nothing fits.
      exact: the function that solves one stage.
    """

    lower: list[np.ndarray]
    exact: Exact
    known: set[tuple[int, int, int]] = field(default_factory=set)

    def solve(self, stage: int, first: int, end: int) -> float:
        """Exact seconds of one stage, remembered."""
        key = (stage, first, end)
        if key not in self.known:
            self.known.add(key)
            self.lower[stage][first, end] = self.exact(stage, first, end)
        return float(self.lower[stage][first, end])


def divide(
    table: StageSeconds, microbatches: int, epsilon: float = 0.0, cutoff: float = math.inf
) -> Division | None:
    """The fastest division of all layers over all stages, in order, each with at least one.

    Args:
      table: seconds; its bounds are made exact along the way.
      microbatches: m of the objective.
      epsilon: stop when a division is within this fraction of the bound.
      cutoff: divisions that take longer are of no interest.

    Returns:
      The division; None if none takes less than `cutoff`. Its bound is then at least `cutoff`.

    >>> seconds = np.array([[0, 1.0, 2.0, 3.0], [9, 0, 1.0, 2.0], [9, 9, 0, 1.0], [9, 9, 9, 0]])
    >>> table = StageSeconds([seconds.copy(), seconds.copy()], lambda s, i, j: float(j - i))
    >>> divide(table, microbatches=4).cuts
    (0, 1, 3)
    """
    best: Division | None = None
    while True:
        reached = min(cutoff, best.step_s if best else math.inf)
        bound_s, cuts = relaxed(table.lower, microbatches, slack=epsilon / 2)
        if not cuts or bound_s >= reached * (1 - epsilon):
            if best is None:
                return None
            return Division(best.cuts, best.step_s, min(bound_s, best.step_s))
        times = [
            table.solve(stage, first, end)
            for stage, (first, end) in enumerate(itertools.pairwise(cuts))
        ]
        step_s = math.fsum(times) + (microbatches - 1) * max(times)
        if step_s < reached:
            best = Division(cuts, step_s, bound_s)


def relaxed(
    lower: Sequence[np.ndarray], microbatches: int, cutoff: float = math.inf, slack: float = 0.0
) -> tuple[float, tuple[int, ...]]:
    """A bound on every division for these seconds as they stand, and the best division found.

    Divisions with a smaller slowest stage are asked for one after another, until what
    the smallest possible one could save no longer helps, or helps by less than `slack`.

    Args:
      lower: as in StageSeconds.
      microbatches: m of the objective.
      cutoff: divisions that take longer are of no interest.
      slack: how far below the best division the bound may be, as a share; 0 is exact.

    Returns:
      (bound, division); without slack the division's step is the bound. (inf, ()) if
      none takes less than `cutoff`; with slack, maybe (a bound near it, ()).
    """
    least, best_cuts = most_even(lower)
    if not math.isfinite(least):
        return math.inf, ()
    # Where the slowest stage decides, the most even division is nearly the best: it spares
    # all caps under which even the smallest sum would be too much.
    best = _step_s(lower, best_cuts, microbatches)
    if best >= cutoff:
        best, best_cuts = math.inf, ()
    cap = math.inf
    while True:
        total, cuts = _fastest_below(lower, cap)
        if not cuts:
            return best, best_cuts
        rest_s = total + (microbatches - 1) * least
        reached = min(best, cutoff)
        if rest_s >= reached * (1 - slack):
            return (best if rest_s >= reached else rest_s), best_cuts
        slowest = max(lower[s][part] for s, part in enumerate(itertools.pairwise(cuts)))
        step_s = _step_s(lower, cuts, microbatches)
        if step_s < reached:
            best = reached = step_s
            best_cuts = cuts
        if microbatches == 1 or slowest <= least:
            return best, best_cuts
        cap = min(float(slowest), (reached - total) / (microbatches - 1))


def _step_s(lower: Sequence[np.ndarray], cuts: Sequence[int], microbatches: int) -> float:
    times = [float(lower[s][part]) for s, part in enumerate(itertools.pairwise(cuts))]
    return math.fsum(times) + (microbatches - 1) * max(times)


def _fastest_below(lower: Sequence[np.ndarray], cap: float) -> tuple[float, tuple[int, ...]]:
    """The division with the smallest sum whose stages all take less than `cap`."""
    below = lower if math.isinf(cap) else [np.where(t < cap, t, np.inf) for t in lower]
    return _best_cuts(below, np.add, 0.0)


def most_even(costs: Sequence[np.ndarray]) -> tuple[float, tuple[int, ...]]:
    """The division whose costliest stage costs least, and that cost; (inf, ()) if there is none."""
    return _best_cuts(costs, np.maximum, -np.inf)


def _best_cuts(
    costs: Sequence[np.ndarray], joined: np.ufunc, nothing: float
) -> tuple[float, tuple[int, ...]]:
    """The division of least cost, a dynamic programme over stages, and that cost.

    Args:
      costs: per stage, [layers + 1, layers + 1]: from layer i to j.
      joined: of the costs of the stages so far and the next one.
      nothing: the cost of no stage.
    """
    layers = costs[0].shape[0] - 1
    reach = np.full(layers + 1, np.inf)
    reach[0] = nothing
    reached = [reach]
    for stage in costs:
        reach = joined(reach[:, None], stage).min(axis=0)
        reached.append(reach)
    if not np.isfinite(reach[layers]):
        return math.inf, ()
    cuts = [layers]
    for before, stage in zip(reversed(reached[:-1]), reversed(costs), strict=True):
        cuts.append(int(joined(before, stage[:, cuts[-1]]).argmin()))
    return float(reach[layers]), tuple(reversed(cuts))
