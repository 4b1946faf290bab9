"""Seconds and bytes of a pipeline whose equal stages go in lockstep in one program.

All stages compute on every tick, of which there are micro-batches + stages - 1, and wait for
the slowest and for what it hands on. The first and last layers are shared out over the stages,
which have copies of their parameters. Nothing is dispatched but the step.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from shardpar.planner.prices import LayerCost, StageCost, layer_cost
from shardpar.planner.setting import Setting, Workload
from shardpar.planner.traffic import arrival_s, border_s, weights
from shardpar.spec.cluster import Cluster, Link
from shardpar.spec.graph import LayerClass, LayerGraph
from shardpar.spec.lockstep import EqualStages, equal_stages, folded
from shardpar.spec.plan import LayerStrategy, Plan
from shardpar.spec.schedule import held
from shardpar.spec.select import strategies


def lockstep_cost(
    plan: Plan, graph: LayerGraph, cluster: Cluster, workload: Workload
) -> tuple[float, tuple[StageCost, ...]]:
    """Prices a checked plan of single_jit pipelines.

    A step of m micro-batches over s stages takes (m + s - 1) ticks, m times a stage's share of
    the first and last layers, and the update.

    Args:
      plan: its pipelines are equal.
      graph: the model.
      cluster: the machines.
      workload: dtype and optimizer.

    Returns:
      The step's seconds, and each stage of each pipeline.
    """
    one, ends = folded(plan), equal_stages(plan.pipelines[0], graph)
    settings = [
        Setting(
            cluster, stage.devices, stage.mesh, graph.batch, one.microbatch, one.num_microbatches,
            workload, 1, plan.tensor_dims,
        )
        for stage in one.stages
    ]  # fmt: skip
    chosen = {n: s for stage in one.stages for n, s in strategies(stage, graph).items()}
    every = cluster.link_among(tuple(d for stage in one.stages for d in stage.devices))
    costs = [
        _stage(number, ends, chosen, graph, setting, settings[number - 1].devices, every)
        for number, setting in enumerate(settings)
    ]
    # The first stage receives nothing, but waits for what the others do.
    tick_s = max(c.forward_s + c.backward_s for c in costs) + max(c.sent_s for c in costs)
    once_s = max(c.update_s + c.cross_s for c in costs)
    count, stages = one.num_microbatches, len(costs)
    ends_s = max(c.ends_s for c in costs)
    step_s = (count + stages - 1) * tick_s + count * ends_s + once_s
    return step_s, tuple(costs) * len(plan.pipelines)


def _stage(
    number: int,
    ends: EqualStages,
    chosen: dict[str, LayerStrategy],
    graph: LayerGraph,
    setting: Setting,
    source: tuple[int, ...],
    every: Link,
) -> StageCost:
    """A stage's own run of layers, and its share of the first and last ones."""
    classes = {layer.name: graph.class_of(layer) for layer in graph.layers}
    count, stages = setting.num_microbatches, len(ends.runs)
    overlap, run = setting.speed.overlap, ends.runs[number]
    known: dict[tuple[str, LayerStrategy], LayerCost] = {}

    def price(name: str) -> LayerCost:
        key = (classes[name].name, replace(chosen[name], layers=""))
        if key not in known:
            known[key] = layer_cost(classes[name], key[1], setting)
        return known[key]

    def moves(names: tuple[str, ...]) -> float:
        return math.fsum(
            border_s(classes[b], chosen[a], chosen[b], setting)
            for a, b in itertools.pairwise(names)
        )

    own = [(name, price(name)) for name in run]
    shared = [
        (name, _shared(price(name), classes[name], chosen[name], setting, stages, every))
        for name in (*ends.lead, *ends.tail)
    ]
    moves_s = moves(run)
    entry = classes[run[0]]
    link = setting.cluster.link_among((*source, *setting.devices))
    sent_s = arrival_s(entry, source, link, setting) if number else 0.0
    # What the first layers make goes to the first stage, and what the last stage makes to all.
    exchanged_s = 2 * arrival_s(entry, setting.devices, every, setting) * (stages - 1) / stages
    around = moves((*ends.lead, run[0])) + moves((ends.runs[-1][-1], *ends.tail))
    ends_s = math.fsum(c.microbatch_s(overlap) for _, c in shared) + around / stages + exchanged_s
    once_s = math.fsum(c.update_s + c.cross_s for _, c in (*own, *shared))
    forward = [c.forward_share() for _, c in own]
    ways = [
        math.fsum(c.microbatch_s(overlap) * share for (_, c), share in zip(own, of, strict=True))
        + moves_s / 2
        for of in (forward, [1 - share for share in forward])
    ]
    # What is fed in and what comes out is kept for all ticks, besides what layers keep.
    stream = _stream_bytes(entry, chosen[run[0]], setting)
    in_flight = held("single_jit", stages, number, count)
    state = math.fsum(c.state_bytes for _, c in (*own, *shared))
    saved = in_flight * (math.fsum(c.saved_bytes for _, c in own) + 2 * stream)
    saved += count / stages * math.fsum(price(name).saved_bytes for name in ends.lead)
    scratch = max(c.scratch_bytes for _, c in (*own, *shared))
    seconds = math.fsum(ways) + ends_s + sent_s + once_s / count
    return StageCost(
        step_s=seconds * count,
        microbatch_s=seconds,
        forward_s=ways[0],
        backward_s=ways[1],
        update_s=math.fsum(c.update_s for _, c in (*own, *shared)),
        cross_s=math.fsum(c.cross_s for _, c in (*own, *shared)),
        peak_bytes=state + saved + scratch,
        state_bytes=state,
        saved_bytes=saved,
        scratch_bytes=scratch,
        moves_s=moves_s,
        sent_s=sent_s,
        layers=(*shared[: len(ends.lead)], *own, *shared[len(ends.lead) :]),
        ends_s=ends_s,
    )


def _shared(
    cost: LayerCost,
    cls: LayerClass,
    strategy: LayerStrategy,
    setting: Setting,
    stages: int,
    every: Link,
) -> LayerCost:
    """A stage's share of a first or last layer, and the sum of its gradient over the stages."""
    summed = 2 * 4 * weights(cls, strategy, setting).updated * (stages - 1) / stages
    return replace(
        cost,
        forward_s=cost.forward_s / stages,
        backward_s=cost.backward_s / stages,
        tensor_s=cost.tensor_s / stages,
        gather_s=cost.gather_s / stages,
        sync_s=cost.sync_s / stages,
        cross_s=summed / every.bandwidth + 2 * (stages - 1) * every.latency_s if summed else 0.0,
    )


def _stream_bytes(cls: LayerClass, strategy: LayerStrategy, setting: Setting) -> float:
    """Bytes on one device of what goes from layer to layer, of a micro-batch."""
    shards = setting.mesh.size_of(strategy.data_axes(setting.mesh))
    if strategy.sequence_parallel:
        shards *= setting.mesh.size_of(strategy.tensor)
    return cls.input_bytes * setting.microbatch / setting.graph_batch / shards
