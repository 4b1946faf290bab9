"""Whether the groups of a pipeline should hold two stages each: interleaved 1F1B.

Half as long a wait to fill and drain the pipeline, for more activations at once and twice as
many transfers (Narayanan et al., arXiv 2104.04473). Plans that were found without it are tried
with it, and keep it where the simulator finds them faster.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from shardpar.errors import PlanError
from shardpar.planner.cost import PlanCost, plan_cost
from shardpar.planner.dealt import Dealt
from shardpar.planner.pipeline import Problem, shapes
from shardpar.planner.profile import rates
from shardpar.planner.simulate import simulate
from shardpar.planner.stages import most_even
from shardpar.spec.check import check
from shardpar.spec.plan import Pipeline, Plan, Stage

CHUNKS = 2


class Played(NamedTuple):
    """A plan, its price, and its step when simulated."""

    plan: Plan
    cost: PlanCost
    simulated_s: float


def with_interleaving(problem: Problem, played: Played) -> Played:
    """The plan with those of its pipelines interleaved that make it faster when simulated.

    Layers are dealt as evenly as can be over twice as many stages; a layer that changes its
    group does what the nearest layer of its class does there.
    """
    options = problem.options
    if not options.interleave or options.stages is not None or options.fix is not None:
        return played
    best, risen = played, True
    while risen:
        risen = False
        for number, pipeline in enumerate(best.plan.pipelines):
            # In a pipeline that does not end last there is nothing to win, nor to lose.
            other = _interleaved(problem, best.plan, pipeline)
            if other is None:
                continue
            pipelines = list(best.plan.pipelines)
            pipelines[number] = other
            tried = _played(problem, replace(best.plan, pipelines=tuple(pipelines)), number)
            if tried is not None and tried.simulated_s < best.simulated_s * (1 - 1e-9):
                best, risen = tried, True
    return best


def _interleaved(problem: Problem, plan: Plan, pipeline: Pipeline) -> Pipeline | None:
    groups, count = len(pipeline.stages), pipeline.num_microbatches
    fits = CHUNKS * groups <= len(problem.graph.layers) and count % groups == 0
    if pipeline.schedule != "1f1b" or groups < 2 or not fits:
        return None
    dealt = Dealt(
        pipeline, problem.graph, problem.cluster, problem.workload, problem.options,
        plan.tensor_dims,
    )  # fmt: skip
    tables = [p.seconds(count, len(plan.pipelines)) for p in dealt.prices(count > 1)]
    least, cuts = most_even(tables * CHUNKS)
    if math.isinf(least):
        return None
    stages = []
    for number, (first, end) in enumerate(itertools.pairwise(cuts)):
        own = pipeline.stages[number % groups]
        layers = dealt.entries(dealt.chosen[number % groups], first, end)
        stages.append(Stage(own.devices, own.mesh, layers))
    return replace(pipeline, stages=tuple(stages), schedule="interleaved")


def _played(problem: Problem, plan: Plan, number: int) -> Played | None:
    """A plan with its price, one pipeline's bytes written into it; None if it does not fit."""
    try:
        check(plan, problem.graph, problem.cluster)
    except PlanError:
        return None
    cost = plan_cost(plan, problem.graph, problem.cluster, problem.workload)
    first = sum(len(p.stages) for p in plan.pipelines[:number])
    stages = []
    for stage, price in zip(plan.pipelines[number].stages, cost.stages[first:], strict=False):
        if price.peak_bytes > problem.limit(stage.devices):
            return None
        stages.append(replace(stage, peak_bytes=price.peak_bytes))
    pipelines = list(plan.pipelines)
    pipelines[number] = replace(pipelines[number], stages=tuple(stages))
    plan = replace(plan, pipelines=tuple(pipelines))
    return Played(plan, cost, simulate(plan, cost).step_s)


def interleaved_bound_s(problem: Problem, several: bool) -> float:
    """Seconds by the formula that no plan with interleaved pipelines of two chunks beats.

    In a pipeline of S groups whose stages take T seconds a micro-batch in all, the busiest group
    takes at least T / S, and the others wait for at least half of what they hold: m micro-batches
    take (m - 1/2) T / S + T / 2 or more. T is no less than each layer's fastest strategy takes
    on the group that is best for it.

    Args:
      problem: what is planned for.
      several: whether plans of several pipelines are in question; for those the arithmetic,
        shared by all devices, is the bound.
    """
    if several:
        return _arithmetic_s(problem)
    bound_s = math.inf
    for shape in shapes(problem.cluster, problem.workload, problem.options):
        groups, count = len(shape.groups), shape.num_microbatches
        if groups < 2 or count % groups or CHUNKS * groups > len(problem.graph.layers):
            continue
        priced = [problem.priced(devices, shape) for devices in shape.groups]
        if any(p is None for p in priced):
            continue
        least = [p.least_s(count, shape.pipelines) for p in priced if p is not None]
        total = float(np.min(least, axis=0).sum())
        bound_s = min(bound_s, (count - 0.5) * total / groups + total / 2)
    return bound_s * (1 - 1e-12)


def _arithmetic_s(problem: Problem) -> float:
    graph, cluster, workload = problem.graph, problem.cluster, problem.workload
    flops = sum(
        graph.class_of(layer).forward_flops + graph.class_of(layer).backward_flops
        for layer in graph.layers
    )
    rate = math.fsum(
        rates(cluster, (device,), workload.compute_dtype).flops
        for device in range(cluster.num_devices)
    )
    return flops * workload.global_batch / graph.batch / rate * (1 - 1e-12)
