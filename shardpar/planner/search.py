"""The front door of the planner: the fastest plan that fits, with its certified gap.

Every number of stages and every micro-batch size is a shape; each gets a bound that
costs little, and shapes are solved exactly in the order of their bounds until the
next bound is no better than the best plan. The best few are played event by event.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from shardpar.errors import PlanError
from shardpar.planner.cost import PlanCost, plan_cost
from shardpar.planner.equal_plans import best_equal, with_dispatch_s
from shardpar.planner.infeasible import nothing_fits
from shardpar.planner.interleave import Played, interleaved_bound_s, with_interleaving
from shardpar.planner.options import SearchOptions
from shardpar.planner.pipeline import Found, Problem, Shape, best_pipeline, lower_bound, shapes
from shardpar.planner.pipelines import best_combination
from shardpar.planner.rebalance import with_peaks
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import simulate
from shardpar.planner.strategies import describe
from shardpar.planner.uniform import best_uniform
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import LayerGraph
from shardpar.spec.plan import Objective, Pipeline, Plan, Zero
from shardpar.spec.select import every_layer

RESCORE_WITHIN = 0.1
"""Plans slower by this share, by the formula, may still be taken if the simulator says so."""

WORTH_SHARING = 1e-3
"""Pipelines share optimizer state out if that saves this part of a step; it binds them together."""


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
      simulated_s: its step, played event by event.
      description: the plan in one line.
      runners_up: the best plans of other shapes, and of one strategy for all layers.
      too_big: how many shapes (numbers of stages and micro-batches) do not fit in memory.
      shapes: how many shapes can run, memory aside.
      rejected: (rule broken, how many strategies) pairs.
      limit_bytes: memory a device may use.
    """

    plan: Plan
    cost: PlanCost
    simulated_s: float
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
    _check_zero(problem)
    bounded = sorted(
        (
            (lower_bound(problem, shape), shape)
            for shape in shapes(cluster, workload, options)
            if problem.runs(shape)
        ),
        key=lambda entry: (entry[0], len(entry[1].groups), -entry[1].microbatch),
    )
    best_s = floor = math.inf
    solved: list[Found] = []
    unsolved = deque(bounded)
    while unsolved and math.isfinite(unsolved[0][0]):
        if unsolved[0][0] >= best_s * (1 - options.epsilon):
            floor = min(floor, unsolved[0][0])
            break
        found = best_pipeline(problem, unsolved.popleft()[1])
        if found is not None:
            floor, best_s = min(floor, found.lower_bound_s), min(best_s, found.step_s)
            solved.append(found)
    combined: list[Candidate] = []
    if _unequal(cluster) and options.stages is None:
        most, cutoff = options.rescore - 1, best_s if options.pipelines != 2 else math.inf
        chosen = best_combination(problem, cutoff, near=most, within=RESCORE_WITHIN)
        if chosen is None:
            floor = min(floor, best_s * (1 - options.epsilon) * problem.slack)
        else:
            combined = [Candidate(chosen.step_s, chosen.pipelines)]
            combined += [Candidate(*near) for near in chosen.near]
            floor, best_s = min(floor, chosen.lower_bound_s), chosen.step_s
            if options.pipelines == 2:
                # A single pipeline was only there for want of several.
                floor, solved, unsolved = chosen.lower_bound_s, [], deque()
        shared = _sharing(problem)
        if shared is not None:
            if options.zero == "pipelines":
                combined, solved, unsolved, floor, best_s = [], [], deque(), math.inf, math.inf
            # What is left to gain is memory traffic of the update, unless memory is short.
            cutoff = best_s * (1 - WORTH_SHARING)
            chosen = best_combination(shared, cutoff, near=most, within=RESCORE_WITHIN)
            if chosen is None:
                floor = min(floor, cutoff * (1 - options.epsilon) * shared.slack)
            else:
                combined += [
                    Candidate(step_s, pipelines, "pipelines")
                    for step_s, pipelines in ((chosen.step_s, chosen.pipelines), *chosen.near)
                ]
                floor, best_s = min(floor, chosen.lower_bound_s), chosen.step_s
    if math.isinf(best_s) and options.zero == "pipelines":
        raise PlanError(
            "no plan fits in which several pipelines keep the optimizer state once between them; "
            "leave zero out, so that single pipelines and fsdp may be chosen"
        )
    if math.isinf(best_s):
        raise nothing_fits(graph, cluster, workload, options)
    solved += _next_best(problem, unsolved, best_s, options.rescore - 1)
    alone = list(map(_alone, solved))
    chosen_plan = _rescored(problem, [*combined, *alone], best_s)
    step_s, plan, cost, simulated_s = _or_equal_stages(problem, chosen_plan)
    if any(pipeline.schedule == "interleaved" for pipeline in plan.pipelines):
        # Of a larger space than the one that was searched, the bound is less close.
        floor = min(floor, interleaved_bound_s(problem, _unequal(cluster)))
    plan = replace(plan, objective=Objective(step_s, min(floor, step_s), 0.0))
    others = [
        c for c in [*combined, *alone] if (c.pipelines, c.zero) != (plan.pipelines, plan.zero)
    ]
    return SearchResult(
        plan,
        cost,
        simulated_s,
        _describe(plan, graph),
        tuple(_runners_up(problem, step_s, others)),
        sum(math.isinf(bound_s) for bound_s, _ in bounded),
        len(bounded),
        tuple(problem.rejected.most_common()),
        memory_limit(cluster, options),
    )


class Candidate(NamedTuple):
    """Pipelines that make up a plan, and its step by the formula."""

    step_s: float
    pipelines: tuple[Pipeline, ...]
    zero: Zero = "none"


def _alone(found: Found) -> Candidate:
    return Candidate(found.step_s, (found.pipeline,))


def _sharing(problem: Problem) -> Problem | None:
    """The same with optimizer state kept once over pipelines; None if that is out of question."""
    options = problem.options
    if options.zero == "none" or options.pipelines == 1 or not problem.workload.elementwise:
        return None
    several = replace(options, pipelines=2)
    return Problem(problem.graph, problem.cluster, problem.workload, several, "pipelines")


def _check_zero(problem: Problem) -> None:
    options = problem.options
    if options.zero != "pipelines":
        return
    several = _unequal(problem.cluster) and options.stages is None and options.pipelines != 1
    if not several:
        raise PlanError(
            "zero is pinned to pipelines, which needs several of them, and those are planned over "
            "unequal devices only, without stages pinned or pipelines=1; leave zero out, or use "
            "zero1 or fsdp"
        )
    if not problem.workload.elementwise:
        raise PlanError(
            "zero is pinned to pipelines, but the optimizer reads other elements of a parameter "
            "to update one; leave zero out, or use a rule such as adamw"
        )


def _next_best(
    problem: Problem, unsolved: Iterable[tuple[float, Shape]], best_s: float, most: int
) -> Iterator[Found]:
    """Pipelines of several stages, a little slower by the formula, that the simulator may prefer.

    What one stage takes is the formula's step exactly, so shapes of one stage are left out.
    """
    cutoff = best_s * (1 + RESCORE_WITHIN)
    staged = (entry for entry in unsolved if len(entry[1].groups) > 1 and entry[0] < cutoff)
    for _, shape in itertools.islice(staged, most):
        found = best_pipeline(problem, shape, cutoff)
        if found is not None:
            yield found


def _rescored(
    problem: Problem, candidates: list[Candidate], best_s: float
) -> tuple[float, Plan, PlanCost, float]:
    """(step by the formula, plan, price, simulated step) of the candidate whose last is the least.

    Only of those that are hardly slower by the formula; of equals, the faster by the formula. One
    stage takes as long when simulated, so among plans of one stage the formula decides.
    """
    workload, cluster = problem.workload, problem.cluster
    best: tuple[float, Plan, PlanCost, float] | None = None
    ordered = sorted(candidates, key=lambda c: c.step_s)
    for step_s, pipelines, zero in ordered[: problem.options.rescore]:
        if step_s > best_s * (1 + RESCORE_WITHIN):
            break
        plan = Plan(cluster.name, workload.global_batch, pipelines, zero=zero)
        cost = plan_cost(plan, problem.graph, cluster, workload)
        if zero == "pipelines":
            # Each was priced as if two shared; here it is known who does.
            plan = with_peaks(plan, problem.graph, cluster, workload)
            if not _fits(problem, plan):
                continue
        if not math.isclose(cost.step_s, step_s, rel_tol=1e-9):
            # On its own devices a group may cross other links than the one it was priced on.
            step_s = cost.step_s
        played = Played(plan, cost, simulate(plan, cost).step_s)
        if problem.options.rescore > 1 and zero == "none":
            played = with_interleaving(problem, played)
            step_s = step_s if played.plan is plan else played.cost.step_s
        if best is None or played.simulated_s < best[3] * (1 - 1e-9):
            best = step_s, *played
    if best is None:
        raise nothing_fits(problem.graph, cluster, workload, problem.options)
    return best


def _fits(problem: Problem, plan: Plan) -> bool:
    return all(
        (stage.peak_bytes or 0.0) <= problem.limit(stage.devices)
        for pipeline in plan.pipelines
        for stage in pipeline.stages
    )


def _or_equal_stages(
    problem: Problem, found: tuple[float, Plan, PlanCost, float]
) -> tuple[float, Plan, PlanCost, float]:
    """The best plan of equal stages in one program instead, where it is asked for or faster."""
    schedule, (_, plan, _, simulated_s) = problem.options.schedule, found
    if schedule == "1f1b":
        return found
    wanted = schedule == "single_jit"
    equal = best_equal(problem, math.inf if wanted else with_dispatch_s(plan, simulated_s))
    if equal is None and wanted:
        raise PlanError(
            "plan.schedule is single_jit, but no plan of equal stages in one program fits these "
            "devices and this batch: the layers that repeat and the micro-batches must be "
            "multiples of the stages; write plan.schedule=fastest, or plan.stages=N"
        )
    if equal is None:
        return found
    simulated_s, plan, cost = equal
    return cost.step_s, plan, cost, simulated_s


def _unequal(cluster: Cluster) -> bool:
    return len({cluster.kind_of(device).name for device in range(cluster.num_devices)}) > 1


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
        turns = ", interleaved" if pipeline.schedule == "interleaved" else ""
        pipelines.append(" | ".join(texts) + f", micro-batch {pipeline.microbatch}{turns}")
    shared = ["optimizer state once over pipelines"] if plan.zero == "pipelines" else []
    return " || ".join([*pipelines, *shared])


def _runners_up(problem: Problem, step_s: float, others: list[Candidate]) -> Iterator[Scored]:
    uniform = best_uniform(problem)
    rest = list(others)
    if uniform is not None and uniform.step_s > step_s:
        rest.append(Candidate(uniform.step_s, (uniform.pipeline,)))
    for other in sorted(rest, key=lambda c: c.step_s):
        stages = [stage for pipeline in other.pipelines for stage in pipeline.stages]
        plan = Plan(
            problem.cluster.name, problem.workload.global_batch, other.pipelines, zero=other.zero
        )
        peak = max(stage.peak_bytes or 0.0 for stage in stages)
        yield Scored(_describe(plan, problem.graph), other.step_s, peak)
