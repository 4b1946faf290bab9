"""The front door of the planner: the fastest uniform plan that fits in memory.

The space is small enough to price every member, so the answer is exact for the
cost model's objective and its gap is zero.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from shardpar.errors import InfeasibleError, PlanError
from shardpar.planner.cost import PlanCost, Workload, plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.strategies import Candidate, candidates
from shardpar.spec.check import check
from shardpar.spec.cluster import Cluster, Hosts
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import Objective, Pipeline, Plan, Stage

GIB = 2**30


@dataclass(frozen=True)
class Scored:
    """A candidate's description and price."""

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
      runners_up: the next best plans that fit.
      too_big: how many candidates did not fit in memory.
      rejected: (rule broken, how many candidates) pairs.
      limit_bytes: memory a device may use.
    """

    plan: Plan
    cost: PlanCost
    description: str
    runners_up: tuple[Scored, ...]
    too_big: int
    rejected: tuple[tuple[str, int], ...]
    limit_bytes: float


@dataclass(frozen=True)
class _Survey:
    fitting: tuple[tuple[Candidate, Plan, PlanCost], ...]
    too_big: tuple[tuple[Candidate, Plan, PlanCost], ...]
    rejected: Counter[str]
    limit_bytes: float


def search(
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
    options: SearchOptions = SearchOptions(),
) -> SearchResult:
    """Finds the fastest plan in which every layer has the same strategy.

    Args:
      graph: the captured model.
      cluster: the machines; the plan uses all their devices.
      workload: batch, dtype and optimizer.
      options: pins and the share of memory to fill.

    Returns:
      The plan with its predicted seconds and bytes per device. `search_s` is left
      0 for the caller to fill in: this function reads no clock.

    Raises:
      InfeasibleError: when no candidate fits in memory; says how many bytes are
        missing and what would fit.
      PlanError: when the pins leave nothing to choose from.
    """
    survey = _survey(graph, cluster, workload, options)
    if not survey.fitting:
        raise _infeasible(survey, graph, cluster, workload, options)
    ranked = sorted(
        survey.fitting,
        key=lambda found: (found[2].step_s, -found[0].microbatch, found[2].peak_bytes),
    )
    candidate, plan, cost = ranked[0]
    mesh = plan.pipelines[0].stages[0].mesh
    stage = replace(plan.pipelines[0].stages[0], peak_bytes=cost.peak_bytes)
    plan = replace(
        plan,
        pipelines=(replace(plan.pipelines[0], stages=(stage,)),),
        objective=Objective(cost.step_s, cost.step_s, 0.0),
    )
    return SearchResult(
        plan,
        cost,
        candidate.describe(mesh),
        tuple(
            Scored(c.describe(mesh), price.step_s, price.peak_bytes) for c, _, price in ranked[1:6]
        ),
        len(survey.too_big),
        tuple(survey.rejected.most_common()),
        survey.limit_bytes,
    )


def memory_limit(cluster: Cluster, options: SearchOptions) -> float:
    """Bytes a plan may use on the smallest device."""
    used = {hosts.kind for hosts in cluster.hosts}
    smallest = min(kind.memory_bytes for kind in cluster.kinds if kind.name in used)
    return smallest * options.memory_fraction


def _survey(
    graph: LayerGraph, cluster: Cluster, workload: Workload, options: SearchOptions
) -> _Survey:
    devices = tuple(range(cluster.num_devices))
    mesh = Mesh.factored(len(devices))
    limit = memory_limit(cluster, options)
    fitting: list[tuple[Candidate, Plan, PlanCost]] = []
    too_big: list[tuple[Candidate, Plan, PlanCost]] = []
    rejected: Counter[str] = Counter()
    for candidate in candidates(graph, mesh, workload.global_batch, options):
        plan = Plan(
            cluster.name,
            workload.global_batch,
            (
                Pipeline(
                    workload.global_batch,
                    candidate.microbatch,
                    (Stage(devices, mesh, (candidate.strategy,)),),
                ),
            ),
        )
        try:
            check(plan, graph, cluster)
        except PlanError as error:
            rejected[str(error)] += 1
            continue
        cost = plan_cost(plan, graph, cluster, workload)
        (fitting if cost.peak_bytes <= limit else too_big).append((candidate, plan, cost))
    return _Survey(tuple(fitting), tuple(too_big), rejected, limit)


def _infeasible(
    survey: _Survey,
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
    options: SearchOptions,
) -> PlanError:
    if not survey.too_big:
        return _nothing_to_choose(survey, cluster, workload, options)
    candidate, plan, cost = min(survey.too_big, key=lambda found: found[2].peak_bytes)
    mesh = plan.pipelines[0].stages[0].mesh
    missing = math.ceil(cost.peak_bytes - survey.limit_bytes)
    stage = cost.stages[0]
    suggestion = _what_would_fit(cost.peak_bytes, graph, cluster, workload, options)
    return InfeasibleError(
        f"nothing fits: the smallest plan ({candidate.describe(mesh)}) needs "
        f"{cost.peak_bytes / GIB:.2f} GiB per device (state {stage.state_bytes / GIB:.2f}, "
        f"activations {stage.saved_bytes / GIB:.2f}, scratch {stage.scratch_bytes / GIB:.2f}) and "
        f"{survey.limit_bytes / GIB:.2f} GiB may be used on {cluster.name}: "
        f"{missing / GIB:.2f} GiB ({missing} bytes) are missing; {suggestion}",
        missing_bytes=missing,
        suggestion=suggestion,
    )


def _what_would_fit(
    peak_bytes: float,
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
    options: SearchOptions,
) -> str:
    unpinned = replace(
        options, data=None, fsdp=None, tensor=None, recompute=None, microbatch=None,
        sequence_parallel=None,
    )  # fmt: skip
    if unpinned != options and _survey(graph, cluster, workload, unpinned).fitting:
        return "it fits without the pins in section plan"
    how = " without the pins in section plan" if unpinned != options else ""
    for factor in (2, 4, 8, 16, 32):
        bigger = replace(
            cluster, hosts=tuple(Hosts(h.kind, h.devices, h.count * factor) for h in cluster.hosts)
        )
        if bigger.num_devices > 1024:
            break
        if _survey(graph, bigger, workload, unpinned).fitting:
            return f"it would fit on {bigger.num_devices} such devices{how}"
    gib = math.ceil(10 * peak_bytes / options.memory_fraction / GIB) / 10
    return f"it would fit on devices with {gib} GiB each"


def _nothing_to_choose(
    survey: _Survey, cluster: Cluster, workload: Workload, options: SearchOptions
) -> PlanError:
    if survey.rejected:
        reasons = "; ".join(reason for reason, _ in survey.rejected.most_common(3))
        return PlanError(f"no candidate is legal: {reasons}")
    pins = {
        name: value
        for name in ("data", "fsdp", "tensor", "microbatch", "recompute")
        if (value := getattr(options, name)) is not None
    }
    text = ", ".join(f"plan.{k}={v}" for k, v in pins.items()) or "no pins"
    return PlanError(
        f"no way to lay {workload.global_batch} sequences over {cluster.num_devices} devices with "
        f"{text}; data x fsdp x tensor must be {cluster.num_devices}, and train.global_batch a "
        "multiple of data x fsdp x microbatch"
    )
