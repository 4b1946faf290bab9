"""Seconds and bytes of a layer under a strategy, and of a plan: the only place that prices.

Compute is the larger of FLOPs over the matmul rate and bytes over the memory
bandwidth. Collectives cost bytes over the slowest link they cross plus a delay per
hop (ring algorithms; Galvatron, arXiv 2211.13878, prices them alike). Memory is
state, plus what the forward saves for the backward, plus the largest scratch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardpar.planner.profile import Rates, link_of, rates
from shardpar.spec.cluster import Cluster, Link
from shardpar.spec.graph import DTYPE_BYTES, LayerClass, LayerGraph, Parameter
from shardpar.spec.mesh import GroupLayout
from shardpar.spec.parameters import compute_layout, optimizer_layout, parameter_layout
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.select import strategies


@dataclass(frozen=True)
class Workload:
    """What the costs depend on besides the model and the machines.

    Attributes:
      global_batch: sequences per optimizer step.
      compute_dtype: float dtype inside the model.
      optimizer_slots: arrays of a parameter's size the optimizer keeps: 2 for Adam.
      loops: whether long chains of equal layers run as one loop, which keeps a
        stacked copy of their parameters in the compute dtype.
    """

    global_batch: int
    compute_dtype: str = "float32"
    optimizer_slots: float = 2.0
    loops: bool = True


@dataclass(frozen=True)
class LayerCost:
    """One layer, one micro-batch, one device; `update_*` once per step.

    Attributes:
      forward_s, backward_s: compute, recompute included in the backward.
      tensor_s: collectives of tensor parallelism, forward and backward.
      gather_s: fsdp parameter gathers, forward and backward.
      sync_s: gradient reduction.
      update_s: the optimizer, with ZeRO-1's gather of new parameters.
      parameter_bytes, gradient_bytes, optimizer_bytes: at rest or through the step.
      saved_bytes: kept from the forward for the backward.
      scratch_bytes: alive only while this layer computes.
    """

    forward_s: float
    backward_s: float
    tensor_s: float
    gather_s: float
    sync_s: float
    update_s: float
    parameter_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    saved_bytes: float
    scratch_bytes: float

    def microbatch_s(self, overlap: float) -> float:
        """Seconds of one micro-batch, part of the traffic hidden behind compute."""
        compute = self.forward_s + self.backward_s
        traffic = self.gather_s + self.sync_s
        hidden = min(overlap * traffic, compute)
        return compute + self.tensor_s + traffic - hidden


@dataclass(frozen=True)
class StageCost:
    """A stage: seconds of one step, and bytes on its fullest device.

    Attributes:
      step_s: all micro-batches and the update.
      peak_bytes: state_bytes + saved_bytes + scratch_bytes.
      layers: the cost of each layer, by name.
    """

    step_s: float
    peak_bytes: float
    state_bytes: float
    saved_bytes: float
    scratch_bytes: float
    layers: tuple[tuple[str, LayerCost], ...]


@dataclass(frozen=True)
class PlanCost:
    """A plan: seconds of one step and peak bytes of its fullest device."""

    step_s: float
    peak_bytes: float
    stages: tuple[StageCost, ...]


def plan_cost(plan: Plan, graph: LayerGraph, cluster: Cluster, workload: Workload) -> PlanCost:
    """Prices a checked plan.

    This version prices stages of one pipeline as if run one after another.

    Args:
      plan: as checked by `spec.check`.
      graph: the model.
      cluster: the machines.
      workload: dtype and optimizer.
    """
    stages = [
        (pipeline, stage_cost(pipeline, stage, plan, graph, cluster, workload))
        for pipeline in plan.pipelines
        for stage in pipeline.stages
    ]
    seconds = [
        sum(cost.step_s for owner, cost in stages if owner is pipeline)
        for pipeline in plan.pipelines
    ]
    return PlanCost(
        max(seconds), max(cost.peak_bytes for _, cost in stages), tuple(cost for _, cost in stages)
    )


def stage_cost(
    pipeline: Pipeline,
    stage: Stage,
    plan: Plan,
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
) -> StageCost:
    """Prices one stage's layers."""
    chosen = strategies(stage, graph)
    speed = rates(cluster, stage.devices, workload.compute_dtype)
    priced: dict[tuple[str, LayerStrategy], LayerCost] = {}
    layers: list[tuple[str, LayerCost]] = []
    for layer in graph.layers:
        if layer.name not in chosen:
            continue
        key = (layer.class_name, chosen[layer.name])
        if key not in priced:
            priced[key] = layer_cost(
                graph.class_of(layer), chosen[layer.name], pipeline, stage, plan, graph, cluster,
                workload, speed,
            )  # fmt: skip
        layers.append((layer.name, priced[key]))
    costs = [cost for _, cost in layers]
    per_microbatch = sum(cost.microbatch_s(speed.overlap) for cost in costs)
    state = sum(c.parameter_bytes + c.optimizer_bytes + c.gradient_bytes for c in costs)
    saved = sum(c.saved_bytes for c in costs)
    scratch = max(c.scratch_bytes for c in costs)
    return StageCost(
        step_s=per_microbatch * pipeline.num_microbatches + sum(c.update_s for c in costs),
        peak_bytes=state + saved + scratch,
        state_bytes=state,
        saved_bytes=saved,
        scratch_bytes=scratch,
        layers=tuple(layers),
    )


def layer_cost(
    cls: LayerClass,
    strategy: LayerStrategy,
    pipeline: Pipeline,
    stage: Stage,
    plan: Plan,
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
    speed: Rates,
) -> LayerCost:
    """Prices one layer of a class under a strategy, for one micro-batch on one device."""
    mesh = stage.mesh
    data, tensor = strategy.data_axes(mesh), strategy.tensor
    shards, degree = mesh.size_of(data), mesh.size_of(tensor)
    share = pipeline.microbatch / graph.batch / shards
    item = DTYPE_BYTES[workload.compute_dtype]

    # Weights are read whole by every micro-batch, however small; activations shrink with it.
    weights = item * sum(
        _local(p, compute_layout(p, strategy, mesh, plan.tensor_dims)) for p in cls.parameters
    )
    forward_s = _compute_s(cls.forward_flops, cls.forward_bytes, weights, share / degree, speed)
    backward_s = _compute_s(
        cls.backward_flops, cls.backward_bytes, 2 * weights, share / degree, speed
    )
    if strategy.recompute == "full":
        backward_s += forward_s
    elif strategy.recompute == "selective":
        # Matmul results are kept; what is computed again is bound by memory.
        backward_s += cls.forward_bytes * share / degree / speed.memory_bandwidth

    border = sum(a.num_bytes for a in cls.outputs if a.batch_dim is not None) * share
    rows = sum(_is_row_parallel(p, plan) for p in (*cls.parameters, *cls.tied)) if tensor else 0
    tensor_s = 2 * rows * _ring_s(2 * border, degree, link_of(cluster, stage, tensor))
    if strategy.recompute == "full":
        tensor_s *= 1.5
    if strategy.sequence_parallel:
        # Gathered on entry, again for the backward, and once for the gradient at the exit.
        tensor_s += 3 * _ring_s(border, degree, link_of(cluster, stage, tensor))

    gather_s = sync_s = update_s = 0.0
    stored = computed = held = 0.0
    for parameter in cls.parameters:
        at_rest = _local(parameter, parameter_layout(parameter, strategy, mesh, plan.tensor_dims))
        in_use = _local(parameter, compute_layout(parameter, strategy, mesh, plan.tensor_dims))
        update = _local(parameter, optimizer_layout(parameter, strategy, mesh, plan.tensor_dims))
        stored, computed, held = stored + at_rest, computed + in_use, held + update
        if at_rest < in_use:
            fsdp_link = link_of(cluster, stage, strategy.fsdp)
            parts = mesh.size_of(strategy.fsdp)
            gather_s += 2 * _ring_s(in_use * item, parts, fsdp_link)
            sync_s += _ring_s(in_use * item, parts, fsdp_link)
        whole = tuple(a for a in data if not (at_rest < in_use and a in strategy.fsdp))
        sync_s += _ring_s(2 * at_rest * item, mesh.size_of(whole), link_of(cluster, stage, whole))
        if update < at_rest:
            link = link_of(cluster, stage, strategy.zero1)
            update_s += _ring_s(at_rest * 4, mesh.size_of(strategy.zero1), link)
    # The optimizer reads and writes master weights, gradient and its own slots once.
    update_s += held * 4 * (3 + 2 * workload.optimizer_slots) / speed.memory_bandwidth

    accumulates = pipeline.num_microbatches > 1
    if accumulates:
        backward_s += held * (item + 2 * 4) / speed.memory_bandwidth
    copies = 0.0 if workload.compute_dtype == "float32" else stored * item
    if workload.loops:
        copies += stored * item
    gradients = stored * item + (held * 4 if accumulates or item < 4 else 0.0)
    inner = share / degree
    kept = cls.saved(strategy.recompute) - cls.input_bytes
    entering = cls.input_bytes * (inner if strategy.sequence_parallel else share)
    return LayerCost(
        forward_s,
        backward_s,
        tensor_s,
        gather_s,
        sync_s,
        update_s,
        parameter_bytes=stored * 4 + copies,
        gradient_bytes=gradients,
        optimizer_bytes=held * 4 * workload.optimizer_slots,
        saved_bytes=kept * inner + entering,
        scratch_bytes=cls.temp_bytes * inner + 2 * max(0.0, computed - stored) * item,
    )


def _compute_s(
    flops: float, num_bytes: float, weight_bytes: float, share: float, speed: Rates
) -> float:
    moved = max(num_bytes * share, weight_bytes)
    return max(flops * share / speed.flops, moved / speed.memory_bandwidth)


def _ring_s(num_bytes: float, parts: int, link: Link) -> float:
    """Seconds of a ring all-gather or reduce-scatter of `num_bytes` over `parts` devices.

    An all-reduce moves twice the bytes: pass `2 * num_bytes`.
    """
    if parts <= 1:
        return 0.0
    return num_bytes * (parts - 1) / parts / link.bandwidth + (parts - 1) * link.latency_s


def _is_row_parallel(parameter: Parameter, plan: Plan) -> bool:
    """Whether tensor parallelism leaves this parameter's product a partial sum.

    Its split dim is contracted when a dim that is not split comes after it: "down"
    (mlp, embed) and "out" (heads, head_dim, embed), but not "up" (embed, mlp).
    """
    split = [i for i, name in enumerate(parameter.dims) if name in plan.tensor_dims]
    if not split or len(parameter.dims) < 2:
        return False
    return any(name == "embed" for name in parameter.dims[split[0] + 1 :])


def _local(parameter: Parameter, layout: GroupLayout) -> float:
    return float(math.prod(layout.shard_shape(parameter.shape)))
