"""What to tell people when no plan fits: by how many bytes, and what would fit."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace

from shardpar.errors import InfeasibleError, PlanError
from shardpar.planner.options import SearchOptions
from shardpar.planner.pipeline import Problem, Shape, shapes
from shardpar.planner.setting import Workload
from shardpar.planner.stages import most_even
from shardpar.planner.strategies import describe
from shardpar.spec.cluster import Cluster, Hosts
from shardpar.spec.graph import LayerGraph
from shardpar.spec.schedule import held

GIB = 2**30
MOST_DEVICES = 1024


def nothing_fits(
    graph: LayerGraph, cluster: Cluster, workload: Workload, options: SearchOptions
) -> PlanError:
    """The error for a search that found no plan: an InfeasibleError, unless the pins are at fault.

    Its arguments are those that were given to the search.
    """
    problem = Problem(graph, cluster, workload, options)
    smallest = _smallest(problem)
    if smallest is None:
        return _nothing_to_choose(problem)
    shape, number, first, end, peak = smallest
    devices = shape.groups[number]
    limit = problem.limit(devices)
    missing = math.ceil(peak - limit)
    suggestion = _what_would_fit(peak, problem)
    text, state, saved, scratch = _leanest(problem, shape, number, first, end)
    where = f"the smallest plan ({text})" if len(shape.groups) == 1 else (
        f"the smallest plan has {len(shape.groups)} stages, and its largest ({text})"
    )  # fmt: skip
    return InfeasibleError(
        f"nothing fits: {where} needs {peak / GIB:.2f} GiB per device (state {state / GIB:.2f}, "
        f"activations {saved / GIB:.2f}, scratch {scratch / GIB:.2f}) and {limit / GIB:.2f} GiB "
        f"may be used on {cluster.name}: {missing / GIB:.2f} GiB ({missing} bytes) are missing; "
        f"{suggestion}",
        missing_bytes=missing,
        suggestion=suggestion,
    )


def _smallest(problem: Problem) -> tuple[Shape, int, int, int, float] | None:
    """(shape, stage, its first and end layer, bytes) of what comes closest to fitting."""
    best: tuple[float, Shape, int, int, int, float] | None = None
    for shape in shapes(problem.cluster, problem.workload, problem.options):
        tables = problem.least_bytes(shape)
        if tables is None:
            continue
        over = [
            table - problem.limit(devices)
            for table, devices in zip(tables, shape.groups, strict=True)
        ]
        short, cuts = most_even(over)
        if not cuts or (best is not None and short >= best[0]):
            continue
        parts = list(itertools.pairwise(cuts))
        number = max(range(len(parts)), key=lambda s: over[s][parts[s]])
        first, end = parts[number]
        best = short, shape, number, first, end, float(tables[number][first, end])
    return None if best is None else best[1:]


def _leanest(
    problem: Problem, shape: Shape, number: int, first: int, end: int
) -> tuple[str, float, float, float]:
    """A stage's leanest choice in words, and its bytes of state, activations and scratch."""
    space = problem.space(shape.groups[number], shape)
    assert space is not None
    in_flight = held("1f1b", len(shape.groups), number, shape.num_microbatches)
    picks = space.leanest(first, end, in_flight)
    counts = space.counts(first, end)
    chosen = [(counts[p], space.runs[p].choices[c]) for p, c in picks]
    texts = list(dict.fromkeys(
        describe(space.strategies[p][c], space.setting.mesh) for p, c in picks
    ))  # fmt: skip
    return (
        "; ".join(texts) + f", micro-batch {shape.microbatch}",
        sum(n * c.state_bytes for n, c in chosen),
        in_flight * sum(n * c.saved_bytes for n, c in chosen),
        max(c.scratch_bytes for _, c in chosen),
    )


def fits(problem: Problem) -> bool:
    """Whether any plan fits in memory, however slow."""
    smallest = _smallest(problem)
    return smallest is not None and smallest[4] <= problem.limit(smallest[0].groups[smallest[1]])


def _what_would_fit(peak_bytes: float, problem: Problem) -> str:
    options, cluster = problem.options, problem.cluster
    kept = ("file", "cluster", "memory_fraction", "epsilon", "rescore", "interleave", "schedule")
    unpinned = replace(
        options,
        **{f.name: None for f in fields(options) if f.name not in kept},  # type: ignore[arg-type]
    )
    if unpinned != options and fits(_changed(problem, cluster, unpinned)):
        return "it fits without the pins in section plan"
    how = " without the pins in section plan" if unpinned != options else ""
    for factor in (2, 4, 8, 16, 32):
        bigger = replace(
            cluster, hosts=tuple(Hosts(h.kind, h.devices, h.count * factor) for h in cluster.hosts),
            speeds=(),
        )  # fmt: skip
        if bigger.num_devices > MOST_DEVICES:
            break
        if fits(_changed(problem, bigger, unpinned)):
            return f"it would fit on {bigger.num_devices} such devices{how}"
    gib = math.ceil(10 * peak_bytes / options.memory_fraction / GIB) / 10
    return f"it would fit on devices with {gib} GiB each"


def _changed(problem: Problem, cluster: Cluster, options: SearchOptions) -> Problem:
    """The same problem on other machines or with other options."""
    return Problem(problem.graph, cluster, problem.workload, options)


def _nothing_to_choose(problem: Problem) -> PlanError:
    batch, cluster, options = problem.workload.global_batch, problem.cluster, problem.options
    if problem.stuck or problem.rejected:
        most = problem.stuck.most_common(1) or problem.rejected.most_common(3)
        reasons = "; ".join(reason for reason, _ in most)
        return PlanError(f"no candidate is legal: {reasons}")
    pins = {
        name: value
        for name in (
            "data",
            "fsdp",
            "tensor",
            "zero1",
            "microbatch",
            "recompute",
            "stages",
            "pipelines",
            "fix",
        )
        if (value := getattr(options, name)) is not None
    }
    text = ", ".join(f"plan.{k}={v}" for k, v in pins.items()) or "no pins"
    return PlanError(
        f"no way to lay {batch} sequences over {cluster.num_devices} devices with "
        f"{text}; data x fsdp x tensor must be {cluster.num_devices}, and train.global_batch a "
        "multiple of data x fsdp x microbatch"
    )
