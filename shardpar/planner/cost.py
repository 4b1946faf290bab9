"""Seconds and bytes of a plan: the only place that adds up the prices of layers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shardpar.planner.lockstep import lockstep_cost
from shardpar.planner.prices import LayerCost, StageCost, layer_cost
from shardpar.planner.setting import Setting, Workload, setting_of
from shardpar.planner.traffic import arrival_s, border_s
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import LayerGraph
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan
from shardpar.spec.schedule import held
from shardpar.spec.select import strategies
from shardpar.spec.zero import holdings


@dataclass(frozen=True)
class PlanCost:
    """A plan: seconds of one step and peak bytes of its fullest device."""

    step_s: float
    peak_bytes: float
    stages: tuple[StageCost, ...]


def plan_cost(plan: Plan, graph: LayerGraph, cluster: Cluster, workload: Workload) -> PlanCost:
    """Prices a checked plan.

    A pipeline of stages that take t seconds a micro-batch is priced as
    sum(t) + (m - 1) * max(t) for m micro-batches; the slowest pipeline is the plan's step.
    Where groups hold several stages, the group that is busy longest does all its stages m
    times, and waits for one stage of each other group.

    Args:
      plan: as checked by `spec.check`.
      graph: the model.
      cluster: the machines.
      workload: dtype and optimizer.
    """
    if any(pipeline.schedule == "single_jit" for pipeline in plan.pipelines):
        step_s, of_stages = lockstep_cost(plan, graph, cluster, workload)
        return PlanCost(step_s, max(cost.peak_bytes for cost in of_stages), of_stages)
    steps_s: list[float] = []
    stages: list[StageCost] = []
    slices = _slices(plan, graph)
    for pipeline in plan.pipelines:
        costs = []
        for number in range(len(pipeline.stages)):
            setting = setting_of(plan, pipeline, pipeline.stages[number], graph, cluster, workload)
            costs.append(stage_cost(pipeline, number, graph, setting, slices))
        steps_s.append(pipeline_s(pipeline, [cost.microbatch_s for cost in costs]))
        stages += _together(pipeline, costs)
    return PlanCost(max(steps_s), max(cost.peak_bytes for cost in stages), tuple(stages))


def pipeline_s(pipeline: Pipeline, times: Sequence[float]) -> float:
    """A pipeline's step by the formula of `plan_cost`, from its stages' seconds a micro-batch."""
    groups = pipeline.num_groups
    busy = [math.fsum(times[g::groups]) for g in range(groups)]
    longest = max(range(groups), key=busy.__getitem__)
    waits = [max(times[g::groups]) for g in range(groups) if g != longest]
    # Added up as the search does, so that a plan's step is not a bit below its certified bound.
    return math.fsum([busy[longest], *waits]) + (pipeline.num_microbatches - 1) * busy[longest]


def fill_s(pipeline: Pipeline, costs: Sequence[StageCost]) -> float:
    """Seconds of a step in which a pipeline's busiest group of devices waits."""
    if pipeline.schedule == "single_jit":
        ticks = [c.forward_s + c.backward_s + c.sent_s for c in costs]
        return (len(costs) - 1) * max(ticks)
    return math.fsum(c.microbatch_s for c in costs) - max(c.microbatch_s for c in costs)


def _together(pipeline: Pipeline, costs: list[StageCost]) -> list[StageCost]:
    """The stages of a group share its memory: each has the peak of all of them."""
    groups = pipeline.num_groups
    if pipeline.chunks == 1:
        return costs
    peaks = [
        math.fsum(c.state_bytes + c.saved_bytes for c in costs[g::groups])
        + max(c.scratch_bytes for c in costs[g::groups])
        for g in range(groups)
    ]
    return [replace(cost, peak_bytes=peaks[s % groups]) for s, cost in enumerate(costs)]


def _slices(plan: Plan, graph: LayerGraph) -> Mapping[tuple[int, str], float]:
    """Elements of a layer's parameters that a device updates, by device and layer.

    Only where pipelines share optimizer state out: elsewhere a layer's strategy says it.
    """
    if plan.zero == "none":
        return {}
    layer_of = {name: layer.name for name, layer, _ in graph.parameters}
    found: dict[tuple[int, str], float] = defaultdict(float)
    for name, holding in holdings(plan, graph).items():
        for pieces in holding.in_optimizer.pieces(holding.parameter.shape):
            for piece in pieces:
                found[piece.device, layer_of[name]] += math.prod(piece.shape)
    return found


def stage_cost(
    pipeline: Pipeline,
    number: int,
    graph: LayerGraph,
    setting: Setting,
    slices: Mapping[tuple[int, str], float] = {},
) -> StageCost:
    """Prices one stage of a pipeline.

    Args:
      pipeline: that the stage is of.
      number: the stage's.
      graph: the model.
      setting: of the stage.
      slices: elements of a layer's parameters that a device updates, where the layer's
        strategy does not say it.
    """
    stage = pipeline.stages[number]
    chosen = strategies(stage, graph)
    speed, count = setting.speed, pipeline.num_microbatches
    priced: dict[tuple[str, LayerStrategy, float | None], LayerCost] = {}
    layers: list[tuple[str, LayerCost]] = []
    moves_s = 0.0
    before: LayerStrategy | None = None
    for layer in graph.layers:
        if layer.name not in chosen:
            continue
        strategy = chosen[layer.name]
        # The tied reader of a parameter has a slice of it that is not in its own layers' bytes.
        mine = slices.get((setting.devices[0], layer.name)) if slices else None
        cls, key = graph.class_of(layer), (layer.class_name, strategy, mine)
        if key not in priced:
            priced[key] = layer_cost(cls, strategy, setting, mine)
        layers.append((layer.name, priced[key]))
        if before is not None:
            moves_s += border_s(cls, before, strategy, setting)
        before = strategy
    costs = [cost for _, cost in layers]
    sent_s = 0.0
    if number > 0:
        source = pipeline.stages[number - 1].devices
        first = next(graph.class_of(x) for x in graph.layers if x.name == layers[0][0])
        link = setting.cluster.link_among((*source, *setting.devices))
        sent_s = arrival_s(first, source, link, setting)
    groups = pipeline.num_groups
    in_flight = held(
        pipeline.schedule, groups, number % groups, count, pipeline.chunks, number // groups
    )
    state = math.fsum(c.state_bytes for c in costs)
    saved = in_flight * math.fsum(c.saved_bytes for c in costs)
    scratch = max(c.scratch_bytes for c in costs)
    seconds = math.fsum(c.seconds(speed.overlap, count) for c in costs) + moves_s + sent_s
    return StageCost(
        step_s=seconds * count,
        microbatch_s=seconds,
        forward_s=math.fsum(c.microbatch_s(speed.overlap) * c.forward_share() for c in costs)
        + moves_s / 2,
        backward_s=math.fsum(c.microbatch_s(speed.overlap) * (1 - c.forward_share()) for c in costs)
        + moves_s / 2,
        update_s=math.fsum(c.update_s for c in costs),
        cross_s=math.fsum(c.cross_s for c in costs),
        peak_bytes=state + saved + scratch,
        state_bytes=state,
        saved_bytes=saved,
        scratch_bytes=scratch,
        moves_s=moves_s,
        sent_s=sent_s,
        layers=tuple(layers),
    )
