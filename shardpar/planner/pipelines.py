"""Several pipelines of unequal shape over unequal devices, each with its share of the batch.

Devices of one kind are handed out in equal units; a plan's step is that of its slowest
pipeline. Seconds of (units, sequences) start as bounds that cost nothing and become tighter
only where the best combination uses them, so the combination that remains is optimal, and
the bounds say so. (Unequal pipelines: HSPMD, arXiv 2504.20490; shares by speed: Malleus,
arXiv 2410.13333.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from shardpar.planner.pipeline import Found, Problem
from shardpar.planner.stock import MOST_UNITS, Stock
from shardpar.planner.table import Item, Table
from shardpar.spec.plan import Pipeline


@dataclass(frozen=True)
class Combination:
    """Pipelines that together take the whole batch.

    Attributes:
      pipelines: on distinct devices.
      step_s: of the slowest.
      lower_bound_s: no combination in the searched space is faster.
      near: others, with their seconds, that are one pipeline's shape away from this one.
    """

    pipelines: tuple[Pipeline, ...]
    step_s: float
    lower_bound_s: float
    near: tuple[tuple[float, tuple[Pipeline, ...]], ...] = ()


def best_combination(
    problem: Problem,
    cutoff: float = math.inf,
    most_units: int = MOST_UNITS,
    near: int = 0,
    within: float = 0.0,
) -> Combination | None:
    """The best pipelines over a cluster with several kinds of devices.

    Args:
      problem: what is planned for.
      cutoff: combinations that take longer are of no interest.
      most_units: of each kind; more are finer and take longer.
      near: how many other combinations to look for, at most, for each pipeline of the best one.
      within: by which share of its seconds those may be slower.

    Returns:
      The combination, or None if none takes less than `cutoff`.
    """
    stock = Stock.of(problem.cluster, most_units)
    table = Table(problem, stock)
    best: tuple[list[Item], list[Found]] | None = None
    best_s = math.inf
    while True:
        chosen = table.fastest()
        bound_s = math.inf if chosen is None else chosen[0]
        reached = min(cutoff, best_s)
        if chosen is None or bound_s >= reached * (1 - problem.options.epsilon):
            if best is None:
                return None
            items, found = best
            others = tuple(_near(table, stock, items, found, near, best_s * (1 + within)))
            return Combination(
                _placed(stock, items, found), best_s, min(bound_s, table.limit, best_s), others
            )
        items = chosen[1]
        risen = [table.tighten(item, reached) for item in items]
        if any(risen):
            continue
        found = [f for item in items if (f := table.solve(item, reached)) is not None]
        step_s = max((f.step_s for f in found), default=math.inf)
        if len(found) == len(items) and step_s < best_s:
            best, best_s = (items, found), step_s


def _placed(stock: Stock, items: list[Item], found: list[Found]) -> tuple[Pipeline, ...]:
    return stock.placed([(units, f.pipeline) for (units, _), f in zip(items, found, strict=True)])


def _near(
    table: Table, stock: Stock, items: list[Item], found: list[Found], most: int, cutoff: float
) -> Iterator[tuple[float, tuple[Pipeline, ...]]]:
    """Combinations with one pipeline replaced by its next best shapes."""
    for at, item in enumerate(items if most else ()):
        for other in table.near(item, most, cutoff):
            changed = [*found[:at], other, *found[at + 1 :]]
            yield max(f.step_s for f in changed), _placed(stock, items, changed)
