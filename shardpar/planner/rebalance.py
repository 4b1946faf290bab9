"""A plan's layers and micro-batches dealt anew over its own groups of devices, for their speeds.

Malleus (arXiv 2410.13333) asks for the layers of each stage, then for the micro-batches of each
pipeline, as two integer programmes. Both are small enough to be exact by dynamic programmes:
layers are divided for every number of micro-batches, and the numbers chosen from those steps.
Malleus divides layers so that the slowest stage is fastest; here the planner's whole price of a
step, sum(t) + (m - 1) * max(t), is least, which is the same where m is large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shardpar.errors import InfeasibleError, PlanError
from shardpar.planner.cost import plan_cost
from shardpar.planner.dealt import Dealt
from shardpar.planner.options import SearchOptions
from shardpar.planner.setting import Workload
from shardpar.planner.stages import most_even
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import LayerGraph
from shardpar.spec.plan import Pipeline, Plan


def rebalanced(
    plan: Plan,
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
    options: SearchOptions = SearchOptions(),
) -> Plan:
    """The plan with the best layers per stage and micro-batches per pipeline on its groups.

    Groups of devices, meshes and sizes of micro-batches stay. A layer that comes to a stage takes
    the strategy of the nearest layer of its class that the stage had, or else of the nearest
    layer. A pipeline gets at least as many micro-batches as it has stages, or as it had if
    those were fewer, or none at all: then its devices stand by. Of an interleaved pipeline the
    layers stay too. A single_jit pipeline becomes a 1f1b one, as its stages are no longer equal.

    Args:
      plan: what runs now; its shares of the batch need not matter any more.
      graph: the model.
      cluster: the machines, with the speeds they have now.
      workload: batch, dtype and optimizer.
      options: the share of memory to fill.

    Raises:
      InfeasibleError: the layers do not fit in these groups, however they are divided.
      PlanError: no numbers of micro-batches add up to the batch.
    """
    dealt = [
        Dealt(_apart(pipeline), graph, cluster, workload, options, plan.tensor_dims, plan.zero)
        for pipeline in plan.pipelines
    ]
    batch = workload.global_batch
    shares = best_shares(dealt, batch)
    if shares is None:
        raise _nothing_fits(dealt, batch)
    active = sum(share > 0 for share in shares)
    pipelines = tuple(
        one.pipeline_of(share, active) for one, share in zip(dealt, shares, strict=True) if share
    )
    if len(pipelines) == 1 and plan.zero != "none":
        # It has nobody to share its state with, and must fit without.
        return rebalanced(replace(plan, zero="none"), graph, cluster, workload, options)
    found = replace(plan, global_batch=batch, pipelines=pipelines, objective=None)
    return with_peaks(found, graph, cluster, workload)


def _apart(pipeline: Pipeline) -> Pipeline:
    return replace(pipeline, schedule="1f1b") if pipeline.schedule == "single_jit" else pipeline


def with_peaks(plan: Plan, graph: LayerGraph, cluster: Cluster, workload: Workload) -> Plan:
    """The plan with the bytes that each stage is predicted to need."""
    costs = iter(plan_cost(plan, graph, cluster, workload).stages)
    pipelines = tuple(
        replace(p, stages=tuple(replace(s, peak_bytes=next(costs).peak_bytes) for s in p.stages))
        for p in plan.pipelines
    )
    return replace(plan, pipelines=pipelines)


def best_shares(dealt: Sequence[Dealt], batch: int) -> tuple[int, ...] | None:
    """Sequences for each pipeline, 0 for one that stands by, so that the slowest is fastest.

    None if there are none that fit and add up to the batch.
    """
    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    for at, one in enumerate(dealt):
        # A pipeline that takes the whole batch has no gradients to sum with others.
        alone = one.step_s(batch, 1)
        if alone < best[0]:
            best = alone, tuple(batch if i == at else 0 for i in range(len(dealt)))
    if len(dealt) > 1:
        tables = [
            [(0, 0.0), *((n, s) for n in one.shares(batch) if (s := one.step_s(n, 2)) < math.inf)]
            for one in dealt
        ]
        together = _least_of_slowest(tables, batch)
        if together[0] < best[0]:
            best = together
    return best[1] or None


def _least_of_slowest(
    tables: Sequence[Sequence[tuple[int, float]]], batch: int
) -> tuple[float, tuple[int, ...]]:
    """One (sequences, seconds) of each table: sequences add up, the most seconds are least.

    >>> _least_of_slowest([[(0, 0.0), (1, 2.0), (2, 4.0)], [(0, 0.0), (1, 1.0), (2, 2.0)]], 3)
    (2.0, (1, 2))
    """
    reached = np.full(batch + 1, np.inf)
    reached[0] = 0.0
    picks: list[np.ndarray] = []
    for table in tables:
        now, pick = np.full(batch + 1, np.inf), np.zeros(batch + 1, int)
        for sequences, seconds in table:
            if sequences > batch:
                continue
            value = np.maximum(reached[: batch + 1 - sequences], seconds)
            better = value < now[sequences:]
            now[sequences:][better] = value[better]
            pick[sequences:][better] = sequences
        reached = now
        picks.append(pick)
    if not np.isfinite(reached[batch]):
        return math.inf, ()
    shares, rest = [], batch
    for pick in reversed(picks):
        shares.append(int(pick[rest]))
        rest -= shares[-1]
    return float(reached[batch]), tuple(reversed(shares))


def _nothing_fits(dealt: Sequence[Dealt], batch: int) -> PlanError:
    short: list[tuple[float, int]] = []
    for number, one in enumerate(dealt):
        counts = [n // one.pipeline.microbatch for n in one.shares(batch)]
        if not counts:
            continue
        if one.pipeline.schedule == "interleaved":
            short.append((one.over_together(counts[0]), number))
        else:
            short.append((most_even(one.over(counts[0]))[0], number))
    missing, number = min(short, default=(0.0, 0))
    if not 0 < missing < math.inf:
        sizes = ", ".join(str(one.pipeline.microbatch) for one in dealt)
        return PlanError(
            f"no micro-batches of {sizes} sequences, at least one for each stage of a pipeline, "
            f"add up to {batch} in a way that fits; plan again with other micro-batches"
        )
    count, gib = math.ceil(missing), missing / 2**30
    suggestion = "plan again, so that layers may take other strategies and devices other groups"
    return InfeasibleError(
        f"no division of the layers over the plan's groups fits: with the most even one, pipeline "
        f"{number} is {gib:.2f} GiB ({count} bytes) per device above its limit; {suggestion}",
        missing_bytes=count,
        suggestion=suggestion,
    )
