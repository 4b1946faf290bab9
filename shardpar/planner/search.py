"""The front door of the planner: the fastest plan that fits, with its certified gap.

Every number of stages and every micro-batch size is a shape; each gets a bound that
costs little, and shapes are solved exactly in the order of their bounds until the
next bound is no better than the best plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from shardpar.planner.cost import PlanCost, plan_cost
from shardpar.planner.infeasible import nothing_fits
from shardpar.planner.options import SearchOptions
from shardpar.planner.pipeline import Found, Problem, best_pipeline, lower_bound, shapes
from shardpar.planner.pipelines import best_combination
from shardpar.planner.setting import Workload
from shardpar.planner.strategies import describe
from shardpar.planner.uniform import best_uniform
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import LayerGraph
from shardpar.spec.plan import Objective, Pipeline, Plan
from shardpar.spec.select import every_layer


@dataclass(frozen=True)
class Scored:
    """A plan's description and price."""

    description: str
    step_s: float
    peak_bytes: float


@dataclass(frozen=True)
class SearchResult:
    """What the search found.

    Attributes:
      plan: the best plan, with its prediction.
      cost: its price, term by term.
      description: the plan in one line.
      runners_up: the best plans of other shapes, and of one strategy for all layers.
      too_big: how many shapes (numbers of stages and micro-batches) do not fit in memory.
      shapes: how many shapes can run, memory aside.
      rejected: (rule broken, how many strategies) pairs.
      limit_bytes: memory a device may use.
    """

    plan: Plan
    cost: PlanCost
    description: str
    runners_up: tuple[Scored, ...]
    too_big: int
    shapes: int
    rejected: tuple[tuple[str, int], ...]
    limit_bytes: float


def search(
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
    options: SearchOptions = SearchOptions(),
) -> SearchResult:
    """Finds the fastest plan.

    Args:
      graph: the captured model.
      cluster: the machines; the plan uses all their devices.
      workload: batch, dtype and optimizer.
      options: pins, the share of memory to fill, and how exact to be.

    Returns:
      The plan with its predicted seconds and bytes per device. `search_s` is left
      0 for the caller to fill in: this function reads no clock.

    Raises:
      InfeasibleError: when no plan fits in memory; says how many bytes are
        missing and what would fit.
      PlanError: when the pins leave nothing to choose from.
    """
    problem = Problem(graph, cluster, workload, options)
    bounded = sorted(
        (
            (lower_bound(problem, shape), shape)
            for shape in shapes(cluster, workload, options)
            if problem.runs(shape)
        ),
        key=lambda entry: (entry[0], len(entry[1].groups), -entry[1].microbatch),
    )
    best: Found | None = None
    others: list[Found] = []
    floor = math.inf
    for bound_s, shape in bounded:
        if math.isinf(bound_s):
            break
        if best is not None and bound_s >= best.step_s * (1 - options.epsilon):
            floor = min(floor, bound_s)
            break
        found = best_pipeline(problem, shape)
        if found is None:
            continue
        floor = min(floor, found.lower_bound_s)
        others.append(found)
        if best is None or found.step_s < best.step_s:
            best = found
    pipelines: tuple[Pipeline, ...] = () if best is None else (best.pipeline,)
    step_s = math.inf if best is None else best.step_s
    if _unequal(cluster) and options.stages is None:
        combined = best_combination(problem, step_s if options.pipelines != 2 else math.inf)
        if combined is not None:
            pipelines, step_s = combined.pipelines, combined.step_s
            floor = min(floor, combined.lower_bound_s)
            best = None
        else:
            floor = min(floor, step_s * (1 - options.epsilon) * problem.slack)
    if not pipelines:
        raise nothing_fits(graph, cluster, workload, options)
    bound_s = min(floor, step_s)
    plan = Plan(cluster.name, workload.global_batch, pipelines, Objective(step_s, bound_s, 0.0))
    cost = plan_cost(plan, graph, cluster, workload)
    if not math.isclose(cost.step_s, step_s, rel_tol=1e-9):
        # On its own devices a group may cross other links than the one it was priced on.
        plan = replace(plan, objective=Objective(cost.step_s, min(bound_s, cost.step_s), 0.0))
    return SearchResult(
        plan,
        cost,
        _describe(plan, graph),
        tuple(_runners_up(problem, best, step_s, others)),
        sum(math.isinf(bound_s) for bound_s, _ in bounded),
        len(bounded),
        tuple(problem.rejected.most_common()),
        memory_limit(cluster, options),
    )


def _unequal(cluster: Cluster) -> bool:
    return len({hosts.kind for hosts in cluster.hosts}) > 1


def memory_limit(cluster: Cluster, options: SearchOptions) -> float:
    """Bytes a plan may use on the smallest device."""
    used = {hosts.kind for hosts in cluster.hosts}
    smallest = min(kind.memory_bytes for kind in cluster.kinds if kind.name in used)
    return smallest * options.memory_fraction


def _describe(plan: Plan, graph: LayerGraph) -> str:
    """A plan in one line."""
    pipelines = []
    for pipeline in plan.pipelines:
        texts = []
        for stage in pipeline.stages:
            entries = [
                describe(s, stage.mesh) + ("" if s.layers == every_layer(graph) else f" {s.layers}")
                for s in stage.layers
            ]
            texts.append("; ".join(entries))
        pipelines.append(" | ".join(texts) + f", micro-batch {pipeline.microbatch}")
    return " || ".join(pipelines)


def _runners_up(
    problem: Problem, best: Found | None, step_s: float, others: list[Found]
) -> Iterator[Scored]:
    uniform = best_uniform(problem)
    rest = [found for found in others if found is not best]
    if uniform is not None and uniform.step_s > step_s:
        rest.append(uniform)
    for found in sorted(rest, key=lambda f: f.step_s):
        pipeline = found.pipeline
        peak = max(stage.peak_bytes or 0.0 for stage in pipeline.stages)
        plan = Plan(problem.cluster.name, pipeline.sequences, (pipeline,))
        yield Scored(_describe(plan, problem.graph), found.step_s, peak)
