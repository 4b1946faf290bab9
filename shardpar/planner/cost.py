"""Seconds and bytes of a layer under a strategy, and of a plan: the only place that prices.

Compute is the larger of FLOPs over the matmul rate and bytes over the memory
bandwidth. Collectives cost bytes over the slowest link they cross plus a delay per
hop (ring algorithms; Galvatron, arXiv 2211.13878, prices them alike). Memory is
state, plus what the forward saves for the backward, plus the largest scratch.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Literal

from shardpar.planner.profile import Rates, link_over, rates
from shardpar.spec.cluster import Cluster, Link
from shardpar.spec.graph import DTYPE_BYTES, OUTSIDE, LayerClass, LayerGraph, Parameter
from shardpar.spec.mesh import Axes, GroupLayout, Mesh
from shardpar.spec.parameters import compute_layout, optimizer_layout, parameter_layout
from shardpar.spec.plan import TENSOR_DIMS, LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.schedule import held
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
    """One layer, one micro-batch, one device; `update_s` and `cross_s` once per step.

    Attributes:
      forward_s, backward_s: compute, recompute included in the backward.
      tensor_s: collectives of tensor parallelism, forward and backward.
      gather_s: fsdp parameter gathers, forward and backward.
      sync_s: gradient reduction.
      update_s: the optimizer, with ZeRO-1's gather of new parameters.
      cross_s: summing the gradient with the other pipelines' copies of the layer.
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
    cross_s: float
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

    def forward_share(self) -> float:
        """The forward's part of a micro-batch, between 0 and 1."""
        all_s = self.forward_s + self.backward_s + self.tensor_s + self.gather_s + self.sync_s
        return (self.forward_s + (self.tensor_s + self.gather_s) / 2) / all_s if all_s else 0.5

    def seconds(self, overlap: float, microbatches: int) -> float:
        """Seconds of one micro-batch with its part of what is done once a step."""
        return self.microbatch_s(overlap) + (self.update_s + self.cross_s) / microbatches

    @property
    def state_bytes(self) -> float:
        """Bytes held through the step."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class StageCost:
    """A stage: seconds of one step, and bytes on its fullest device.

    Attributes:
      step_s: all micro-batches and the update: what its devices are busy for.
      microbatch_s: one micro-batch, with its part of the update.
      forward_s, backward_s: one micro-batch one way, without update and arrival.
      update_s, cross_s: once a step, as in LayerCost.
      peak_bytes: state_bytes + saved_bytes + scratch_bytes.
      saved_bytes: of all micro-batches in flight.
      moves_s: of microbatch_s, changes of layout between layers.
      sent_s: of microbatch_s, receiving activations from the stage before and sending gradients.
      layers: the cost of each layer, by name.
    """

    step_s: float
    microbatch_s: float
    forward_s: float
    backward_s: float
    update_s: float
    cross_s: float
    peak_bytes: float
    state_bytes: float
    saved_bytes: float
    scratch_bytes: float
    moves_s: float
    sent_s: float
    layers: tuple[tuple[str, LayerCost], ...]


@dataclass(frozen=True)
class PlanCost:
    """A plan: seconds of one step and peak bytes of its fullest device."""

    step_s: float
    peak_bytes: float
    stages: tuple[StageCost, ...]


@dataclass(frozen=True)
class Weights:
    """A layer's parameters on one device, and what moving them costs; recompute has no part in it.

    Attributes:
      stored, computed, updated: elements at rest, while the layer computes, in the optimizer.
      gather_s, sync_s, update_s: as in LayerCost, traffic alone.
    """

    stored: float
    computed: float
    updated: float
    gather_s: float
    sync_s: float
    update_s: float


@dataclass(frozen=True)
class Setting:
    """Where a layer runs and how often: all that its price depends on besides class and strategy.

    Attributes:
      cluster, devices, mesh: the stage's machines.
      graph_batch: sequences the layer graph's figures are for.
      microbatch: sequences of one micro-batch over all data shards.
      num_microbatches: of one step.
      pipelines: how many pipelines hold a copy of the layer and sum its gradient.
      tensor_dims: logical dims that tensor parallelism splits.
      workload: dtype and optimizer.
    """

    cluster: Cluster
    devices: tuple[int, ...]
    mesh: Mesh
    graph_batch: int
    microbatch: int
    num_microbatches: int
    workload: Workload
    pipelines: int = 1
    tensor_dims: tuple[str, ...] = TENSOR_DIMS

    @functools.cached_property
    def speed(self) -> Rates:
        """Rates of the group."""
        return rates(self.cluster, self.devices, self.workload.compute_dtype)

    @functools.cached_property
    def _weights(self) -> dict[object, Weights]:
        return {}

    def weights(self, cls: LayerClass, strategy: LayerStrategy) -> Weights:
        """A layer's parameters here; equal for strategies that lay them out alike."""
        key = (cls.name, strategy.tensor, strategy.fsdp, strategy.zero1)
        if key not in self._weights:
            self._weights[key] = _weights(cls, strategy, self)
        return self._weights[key]

    @functools.cached_property
    def _links(self) -> dict[Axes, Link]:
        return {}

    def link(self, axes: Axes) -> Link:
        """The slowest link a collective over these axes crosses."""
        if axes not in self._links:
            self._links[axes] = link_over(self.cluster, self.devices, self.mesh, axes)
        return self._links[axes]


def _weights(cls: LayerClass, strategy: LayerStrategy, setting: Setting) -> Weights:
    stored = computed = updated = 0.0
    for parameter in cls.parameters:
        at_rest, in_use, update = _pieces(
            parameter, strategy.tensor, strategy.fsdp, strategy.zero1, setting.mesh,
            setting.tensor_dims,
        )  # fmt: skip
        stored, computed, updated = stored + at_rest, computed + in_use, updated + update
    moved_s = dict.fromkeys(("gather", "sync", "update"), 0.0)
    for traffic in weight_traffic(cls, strategy, setting):
        moved_s[traffic.term] += traffic.seconds(setting)
    return Weights(stored, computed, updated, moved_s["gather"], moved_s["sync"], moved_s["update"])


def plan_cost(plan: Plan, graph: LayerGraph, cluster: Cluster, workload: Workload) -> PlanCost:
    """Prices a checked plan.

    A pipeline of stages that take t seconds a micro-batch is priced as
    sum(t) + (m - 1) * max(t) for m micro-batches; the slowest pipeline is the plan's step.

    Args:
      plan: as checked by `spec.check`.
      graph: the model.
      cluster: the machines.
      workload: dtype and optimizer.
    """
    steps_s: list[float] = []
    stages: list[StageCost] = []
    for pipeline in plan.pipelines:
        costs = []
        for number in range(len(pipeline.stages)):
            setting = setting_of(plan, pipeline, pipeline.stages[number], graph, cluster, workload)
            costs.append(stage_cost(pipeline, number, graph, setting))
        times = [cost.microbatch_s for cost in costs]
        steps_s.append(math.fsum(times) + (pipeline.num_microbatches - 1) * max(times))
        stages += costs
    return PlanCost(max(steps_s), max(cost.peak_bytes for cost in stages), tuple(stages))


def setting_of(
    plan: Plan,
    pipeline: Pipeline,
    stage: Stage,
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
) -> Setting:
    """The setting of a stage's layers."""
    return Setting(
        cluster, stage.devices, stage.mesh, graph.batch, pipeline.microbatch,
        pipeline.num_microbatches, workload, len(plan.pipelines), plan.tensor_dims,
    )  # fmt: skip


def stage_cost(pipeline: Pipeline, number: int, graph: LayerGraph, setting: Setting) -> StageCost:
    """Prices one stage of a pipeline."""
    stage = pipeline.stages[number]
    chosen = strategies(stage, graph)
    speed, count = setting.speed, pipeline.num_microbatches
    priced: dict[tuple[str, LayerStrategy], LayerCost] = {}
    layers: list[tuple[str, LayerCost]] = []
    moves_s = 0.0
    before: LayerStrategy | None = None
    for layer in graph.layers:
        if layer.name not in chosen:
            continue
        strategy = chosen[layer.name]
        cls, key = graph.class_of(layer), (layer.class_name, strategy)
        if key not in priced:
            priced[key] = layer_cost(cls, strategy, setting)
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
    in_flight = held(pipeline.schedule, len(pipeline.stages), number, count)
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


def border_s(
    cls: LayerClass, before: LayerStrategy, after: LayerStrategy, setting: Setting
) -> float:
    """Seconds to bring a layer's input from its neighbour's layout to its own, and back.

    The way back is the gradient's. Zero where both lay activations out alike.
    """
    mesh = setting.mesh
    a, b = border_axes(before, mesh), border_axes(after, mesh)
    if a == b:
        return 0.0
    there, back = _moved_shares(mesh, a, b)
    differing = tuple(
        x for x in mesh.names if (x in a[0]) != (x in b[0]) or (x in a[1]) != (x in b[1])
    )
    link = setting.link(differing)
    size = _stream_bytes(cls) * setting.microbatch / setting.graph_batch
    return (there + back) * size / link.bandwidth + 2 * link.latency_s


def border_axes(strategy: LayerStrategy, mesh: Mesh) -> tuple[Axes, Axes]:
    """The axes that split the batch, and the sequence, of activations between layers."""
    return strategy.data_axes(mesh), strategy.tensor if strategy.sequence_parallel else ()


def arrival_s(cls: LayerClass, source: tuple[int, ...], link: Link, setting: Setting) -> float:
    """Seconds to receive a micro-batch's activations from the stage before, and send gradients.

    All pairs of devices share the bytes.

    Args:
      cls: the stage's first layer.
      source: devices of the stage before.
      link: the slowest between the two groups.
      setting: of the stage.
    """
    size = _stream_bytes(cls) * setting.microbatch / setting.graph_batch
    pairs = min(len(source), len(setting.devices))
    return 2 * (size / pairs / link.bandwidth + link.latency_s)


def layer_cost(cls: LayerClass, strategy: LayerStrategy, setting: Setting) -> LayerCost:
    """Prices one layer of a class under a strategy, for one micro-batch on one device."""
    mesh, workload = setting.mesh, setting.workload
    # XLA is free in what lies outside all layers: nothing there is recomputed.
    recompute = "none" if cls.name == OUTSIDE else strategy.recompute
    speed = setting.speed
    data, tensor = strategy.data_axes(mesh), strategy.tensor
    shards, degree = mesh.size_of(data), mesh.size_of(tensor)
    share = setting.microbatch / setting.graph_batch / shards
    item = DTYPE_BYTES[workload.compute_dtype]

    held = setting.weights(cls, strategy)
    stored, computed, updated = held.stored, held.computed, held.updated
    # Weights are read whole by every micro-batch, however small; activations shrink with it.
    weights = item * computed
    forward_s = _compute_s(cls.forward_flops, cls.forward_bytes, weights, share / degree, speed)
    backward_s = _compute_s(
        cls.backward_flops, cls.backward_bytes, 2 * weights, share / degree, speed
    )
    if recompute == "full":
        backward_s += forward_s
    elif recompute == "selective":
        # Matmul results are kept; what is computed again is bound by memory.
        backward_s += cls.forward_bytes * share / degree / speed.memory_bandwidth

    tensor_s = math.fsum(t.seconds(setting) for t in tensor_traffic(cls, strategy, setting))
    gather_s, sync_s, update_s, cross_s = held.gather_s, held.sync_s, held.update_s, 0.0
    # The optimizer reads and writes master weights, gradient and its own slots once.
    update_s += updated * 4 * (3 + 2 * workload.optimizer_slots) / speed.memory_bandwidth
    if setting.pipelines > 1:
        # Pipelines sum their gradients once a step, over the network, in float32.
        link = setting.cluster.inter_host
        cross_s = 2 * updated * 4 / link.bandwidth + link.latency_s

    accumulates = setting.num_microbatches > 1
    if accumulates:
        backward_s += updated * (item + 2 * 4) / speed.memory_bandwidth
    # Weights are cast once; a loop reads them from a stack, which is the cast itself
    # unless every micro-batch stacks anew.
    copies = 0.0 if workload.compute_dtype == "float32" else stored * item
    if workload.loops and cls.whole_bytes and (accumulates or not copies):
        copies += stored * item
    gradients = stored * item + (updated * 4 if accumulates else 0.0)
    copies += speed.extra_copies * (stored * item + updated * 4)
    inner = share / degree
    gathers = bool(strategy.fsdp) or strategy.sequence_parallel
    kept = cls.saved(recompute, gathers) - cls.input_bytes
    whole = cls.whole(recompute, gathers)
    saved = whole * share + (kept - whole) * inner
    # A recomputed layer's scratch is what the layer would otherwise have kept.
    all_kept = cls.saved("none", gathers) - cls.input_bytes
    part = cls.whole("none", gathers) / all_kept if all_kept else 0.0
    scratch = cls.scratch(recompute) * (part * share + (1 - part) * inner)
    if cls.name == OUTSIDE:
        # The loss comes last, so what it keeps is gone before any layer's backward begins.
        saved, scratch = 0.0, scratch + saved
    entering = cls.input_bytes * (inner if strategy.sequence_parallel else share)
    return LayerCost(
        forward_s,
        backward_s,
        tensor_s,
        gather_s,
        sync_s,
        update_s,
        cross_s,
        parameter_bytes=stored * 4 + copies,
        gradient_bytes=gradients,
        optimizer_bytes=updated * 4 * workload.optimizer_slots,
        saved_bytes=saved + entering,
        scratch_bytes=scratch + 2 * max(0.0, computed - stored) * item,
    )


@functools.lru_cache(maxsize=65536)
def _pieces(
    parameter: Parameter, tensor: Axes, fsdp: Axes, zero1: Axes, mesh: Mesh, dims: tuple[str, ...]
) -> tuple[float, float, float]:
    """Elements of a parameter that one device holds at rest, in use, and in its optimizer."""
    strategy = LayerStrategy("", tensor, fsdp, zero1)
    return (
        _local(parameter, parameter_layout(parameter, strategy, mesh, dims)),
        _local(parameter, compute_layout(parameter, strategy, mesh, dims)),
        _local(parameter, optimizer_layout(parameter, strategy, mesh, dims)),
    )


@dataclass(frozen=True)
class Traffic:
    """One collective of a layer on one device.

    Attributes:
      term: which of a layer's seconds it is part of: tensor, gather, sync or update.
      kind: all-gather, reduce-scatter or all-reduce.
      axes: of the mesh it runs over.
      num_bytes: of the whole array that is gathered, scattered or reduced.
      times: how often per micro-batch; of the update, per step.
    """

    term: Literal["tensor", "gather", "sync", "update"]
    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]
    axes: Axes
    num_bytes: float
    times: float

    def seconds(self, setting: Setting) -> float:
        """Seconds of all its runs, by ring algorithms."""
        parts = setting.mesh.size_of(self.axes)
        turns = 2 if self.kind == "all-reduce" else 1
        return self.times * _ring_s(turns * self.num_bytes, parts, setting.link(self.axes))


def layer_traffic(
    cls: LayerClass, strategy: LayerStrategy, setting: Setting
) -> tuple[Traffic, ...]:
    """The collectives of one layer: of tensor parallelism, of weights and of gradients."""
    return (
        *tensor_traffic(cls, strategy, setting),
        *weight_traffic(cls, strategy, setting),
    )


def tensor_traffic(
    cls: LayerClass, strategy: LayerStrategy, setting: Setting
) -> tuple[Traffic, ...]:
    """The collectives of activations that tensor and sequence parallelism need."""
    mesh, tensor = setting.mesh, strategy.tensor
    if not tensor:
        return ()
    share = setting.microbatch / setting.graph_batch / mesh.size_of(strategy.data_axes(mesh))
    border = sum(a.num_bytes for a in cls.outputs if a.batch_dim is not None) * share
    rows = sum(_is_row_parallel(p, setting.tensor_dims) for p in (*cls.parameters, *cls.tied))
    again = 3 if strategy.recompute == "full" and cls.name != OUTSIDE else 2
    found = [Traffic("tensor", "all-reduce", tensor, border, again * rows)]
    if strategy.sequence_parallel:
        # Gathered on entry, again for the backward, and once for the gradient at the exit.
        found.append(Traffic("tensor", "all-gather", tensor, border, 3))
    return tuple(t for t in found if t.times and t.num_bytes)


def weight_traffic(
    cls: LayerClass, strategy: LayerStrategy, setting: Setting
) -> tuple[Traffic, ...]:
    """The collectives of a layer's parameters and gradients."""
    mesh = setting.mesh
    item = DTYPE_BYTES[setting.workload.compute_dtype]
    found: list[Traffic] = []
    for parameter in cls.parameters:
        at_rest, in_use, update = _pieces(
            parameter, strategy.tensor, strategy.fsdp, strategy.zero1, mesh, setting.tensor_dims
        )
        rest = strategy.data_axes(mesh)
        if at_rest < in_use:
            found.append(Traffic("gather", "all-gather", strategy.fsdp, in_use * item, 2))
            found.append(Traffic("sync", "reduce-scatter", strategy.fsdp, in_use * item, 1))
            rest = tuple(a for a in rest if a not in strategy.fsdp)
        if update < at_rest:
            found.append(Traffic("sync", "reduce-scatter", strategy.zero1, at_rest * item, 1))
            found.append(Traffic("update", "all-gather", strategy.zero1, at_rest * 4, 1))
            rest = tuple(a for a in rest if a not in strategy.zero1)
        found.append(Traffic("sync", "all-reduce", rest, update * item, 1))
    return tuple(t for t in found if t.num_bytes and mesh.size_of(t.axes) > 1)


def predicted_collectives(
    plan: Plan, graph: LayerGraph, cluster: Cluster, workload: Workload
) -> tuple[tuple[str, int, float, float], ...]:
    """(kind, group size, count, bytes of results on one device) of a step, most bytes first.

    Moves between layouts and between stages are left out.
    """
    totals: dict[tuple[str, int], list[float]] = {}
    for pipeline in plan.pipelines:
        for stage in pipeline.stages:
            setting = setting_of(plan, pipeline, stage, graph, cluster, workload)
            chosen = strategies(stage, graph)
            for layer in graph.layers:
                if layer.name not in chosen:
                    continue
                for t in layer_traffic(graph.class_of(layer), chosen[layer.name], setting):
                    parts = stage.mesh.size_of(t.axes)
                    times = t.times * (1 if t.term == "update" else pipeline.num_microbatches)
                    result = t.num_bytes / parts if t.kind == "reduce-scatter" else t.num_bytes
                    entry = totals.setdefault((t.kind, parts), [0.0, 0.0])
                    entry[0] += times
                    entry[1] += times * result
    found = [(kind, parts, n, size) for (kind, parts), (n, size) in totals.items()]
    return tuple(sorted(found, key=lambda c: (-c[3], c[0], c[1])))


def _stream_bytes(cls: LayerClass) -> float:
    """Bytes of the largest activation that enters a layer: the stream between layers."""
    return float(max((a.num_bytes for a in cls.inputs if a.batch_dim is not None), default=0))


@functools.lru_cache(maxsize=4096)
def _moved_shares(mesh: Mesh, a: tuple[Axes, Axes], b: tuple[Axes, Axes]) -> tuple[float, float]:
    """Shares of an activation the worst device lacks when going from a to b, and back."""

    def intervals(axes: Axes) -> list[tuple[float, float]]:
        parts = mesh.size_of(axes)
        found = []
        for place in itertools.product(*(range(size) for size in mesh.sizes)):
            at = dict(zip(mesh.names, place, strict=True))
            index = 0
            for axis in axes:
                index = index * mesh.size_of((axis,)) + at[axis]
            found.append((index / parts, (index + 1) / parts))
        return found

    boxes = [(intervals(x[0]), intervals(x[1])) for x in (a, b)]

    def lacking(source: int, target: int) -> float:
        worst = 0.0
        for d in range(mesh.num_devices):
            have = want = 1.0
            for dim in range(2):
                low, high = boxes[source][dim][d]
                first, last = boxes[target][dim][d]
                want *= last - first
                have *= max(0.0, min(high, last) - max(low, first))
            worst = max(worst, want - have)
        return worst

    return lacking(0, 1), lacking(1, 0)


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


def _is_row_parallel(parameter: Parameter, tensor_dims: tuple[str, ...]) -> bool:
    """Whether tensor parallelism leaves this parameter's product a partial sum.

    Its split dim is contracted when a dim that is not split comes after it: "down"
    (mlp, embed) and "out" (heads, head_dim, embed), but not "up" (embed, mlp).
    """
    split = [i for i, name in enumerate(parameter.dims) if name in tensor_dims]
    if not split or len(parameter.dims) < 2:
        return False
    return any(name == "embed" for name in parameter.dims[split[0] + 1 :])


def _local(parameter: Parameter, layout: GroupLayout) -> float:
    return float(math.prod(layout.shard_shape(parameter.shape)))
