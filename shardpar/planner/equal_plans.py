"""The fastest plan of equal stages in one program, for comparison with programs of stages.

Stages of one program are equal, so one strategy for each layer of the run is all there is to
choose, and one for each of the first and last layers. Programs of stages cost the host some time
for each of their actions, which a step of one program does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from shardpar.errors import PlanError
from shardpar.planner.cost import PlanCost, plan_cost
from shardpar.planner.pipeline import Problem, Shape, shapes
from shardpar.planner.simulate import simulate
from shardpar.planner.space import Space
from shardpar.spec.check import check
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.select import selector

DISPATCH_S = 0.58e-3
"""Host seconds for each action of a stage's program.

Measured by `benchmarks/pipelines.py`: 0.23 ms where stages have one device, 0.58 ms with two.
"""


def with_dispatch_s(plan: Plan, simulated_s: float) -> float:
    """A step's seconds where the host dispatches each action: no less than that takes it.

    >>> from shardpar.spec.mesh import Mesh
    >>> stages = tuple(Stage((d,), Mesh(), (LayerStrategy("all"),)) for d in range(2))
    >>> with_dispatch_s(Plan("here", 100, (Pipeline(100, 1, stages),)), simulated_s=0.1)
    0.232
    """
    actions = sum(
        2 * p.num_microbatches * len(p.stages)
        for p in plan.pipelines
        if p.schedule != "single_jit" and (len(plan.pipelines) > 1 or len(p.stages) > 1)
    )
    return max(simulated_s, actions * DISPATCH_S)


def best_equal(problem: Problem, cutoff_s: float = math.inf) -> tuple[float, Plan, PlanCost] | None:
    """(simulated step, plan, price) of the fastest single_jit plan.

    Args:
      problem: what is planned for.
      cutoff_s: plans that take as long are of no use.

    Returns:
      None if there is none, or none that takes less than `cutoff_s`.
    """
    best: tuple[float, Plan, PlanCost] | None = None
    for shape in shapes(problem.cluster, problem.workload, problem.options):
        stages = len(shape.groups)
        alike = len({problem.alike(devices) for devices in shape.groups}) == 1
        if stages == 1 or shape.num_microbatches % stages or not alike:
            continue
        if not problem.runs(shape):
            continue
        for pipeline in _pipelines(problem, shape, cutoff_s):
            plan = Plan(problem.cluster.name, problem.workload.global_batch, (pipeline,))
            try:
                check(plan, problem.graph)
            except PlanError:
                continue
            cost = plan_cost(plan, problem.graph, problem.cluster, problem.workload)
            limit = min(map(problem.limit, shape.groups))
            if cost.peak_bytes > limit or cost.step_s >= cutoff_s:
                continue
            cutoff_s = cost.step_s
            best = simulate(plan, cost).step_s, _with_peaks(plan, cost), cost
    return best


def _pipelines(problem: Problem, shape: Shape, cutoff_s: float) -> Iterator[Pipeline]:
    """Pipelines of a shape with each strategy of the run's layers that may be fast enough."""
    stages, count = len(shape.groups), shape.num_microbatches
    longest = max(range(len(problem.parts)), key=lambda i: problem.parts[i].end
                  - problem.parts[i].first)  # fmt: skip
    part = problem.parts[longest]
    layers = part.end - part.first
    if layers % stages or not 0 < longest < len(problem.parts) - 1:
        return
    space = problem.space(shape.groups[0], shape)
    assert space is not None
    ticks = count + stages - 1
    order = sorted(
        range(len(space.strategies[longest])),
        key=lambda i: space.runs[longest].choices[i].seconds,
    )
    for number in order:
        choice = space.runs[longest].choices[number]
        # What is done once a step is in the seconds of its micro-batches.
        if choice.seconds * layers / stages * min(ticks, count) >= cutoff_s:
            return
        for lean in (False, True):
            chosen = _chosen(space, longest, number, lean)
            yield _pipeline(problem, shape, space, chosen, layers // stages)


def _chosen(space: Space, run: int, number: int, lean: bool) -> list[LayerStrategy]:
    """A strategy for each part: the run's, and for the ends the fastest or the leanest."""
    border = space.runs[run].choices[number].border
    found = []
    for i, known in enumerate(space.strategies):
        choices = space.runs[i].choices
        best = min(
            range(len(known)),
            key=lambda n: (
                choices[n].border != border,
                choices[n].state_bytes if lean else choices[n].seconds,
            ),
        )
        found.append(known[number if i == run else best])
    return found


def _pipeline(
    problem: Problem, shape: Shape, space: Space, chosen: list[LayerStrategy], each: int
) -> Pipeline:
    names = [layer.name for layer in problem.graph.layers]
    strategy = [
        chosen[i] for i, part in enumerate(problem.parts) for _ in range(part.first, part.end)
    ]
    longest = max(problem.parts, key=lambda part: part.end - part.first)
    cuts = [0, *(longest.first + each * s for s in range(1, len(shape.groups))), len(names)]
    made = []
    for s, devices in enumerate(shape.groups):
        blocks: list[tuple[LayerStrategy, list[str]]] = []
        for i in range(cuts[s], cuts[s + 1]):
            if blocks and blocks[-1][0] == strategy[i]:
                blocks[-1][1].append(names[i])
            else:
                blocks.append((strategy[i], [names[i]]))
        entries = tuple(replace(one, layers=selector(run)) for one, run in blocks)
        made.append(Stage(devices, space.setting.mesh, entries))
    return Pipeline(shape.sequences, shape.microbatch, tuple(made), "single_jit")


def _with_peaks(plan: Plan, cost: PlanCost) -> Plan:
    (pipeline,) = plan.pipelines
    stages = tuple(
        replace(stage, peak_bytes=price.peak_bytes)
        for stage, price in zip(pipeline.stages, cost.stages, strict=True)
    )
    return replace(plan, pipelines=(replace(pipeline, stages=stages),))
