"""What a layer's strategy sends: collectives and changes of layout, in bytes and seconds.

Collectives cost bytes over the slowest link they cross plus a delay per hop (ring
algorithms; Galvatron, arXiv 2211.13878, prices them alike).
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Literal

from shardpar.planner.setting import Setting, Workload, setting_of
from shardpar.spec.cluster import Cluster, Link
from shardpar.spec.graph import DTYPE_BYTES, OUTSIDE, LayerClass, LayerGraph, Parameter
from shardpar.spec.mesh import Axes, GroupLayout, Mesh
from shardpar.spec.parameters import compute_layout, optimizer_layout, parameter_layout
from shardpar.spec.plan import LayerStrategy, Plan
from shardpar.spec.select import strategies


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


def weights(cls: LayerClass, strategy: LayerStrategy, setting: Setting) -> Weights:
    """A layer's parameters here; computed once for strategies that lay them out alike."""
    key = (cls.name, strategy.tensor, strategy.fsdp, strategy.zero1)
    if key not in setting.known:
        setting.known[key] = _weights(cls, strategy, setting)
    found: Weights = setting.known[key]
    return found


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
    along = strategy.context + (strategy.tensor if strategy.sequence_parallel else ())
    return strategy.batch_axes(mesh), along


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
      kind: all-gather, reduce-scatter, all-reduce or all-to-all.
      axes: of the mesh it runs over.
      num_bytes: of the whole array that is gathered, scattered, reduced or split otherwise.
      times: how often per micro-batch; of the update, per step.
    """

    term: Literal["tensor", "gather", "sync", "update"]
    kind: Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]
    axes: Axes
    num_bytes: float
    times: float

    def seconds(self, setting: Setting) -> float:
        """Seconds of all its runs, by ring algorithms."""
        parts = setting.mesh.size_of(self.axes)
        if self.kind == "all-to-all":
            return self.times * _ring_s(self.num_bytes / parts, parts, setting.link(self.axes))
        turns = 2 if self.kind == "all-reduce" else 1
        return self.times * _ring_s(turns * self.num_bytes, parts, setting.link(self.axes))


def layer_traffic(
    cls: LayerClass, strategy: LayerStrategy, setting: Setting
) -> tuple[Traffic, ...]:
    """The collectives of one layer: of its activations, of weights and of gradients."""
    return (
        *activation_traffic(cls, strategy, setting),
        *weight_traffic(cls, strategy, setting),
    )


def activation_traffic(
    cls: LayerClass, strategy: LayerStrategy, setting: Setting
) -> tuple[Traffic, ...]:
    """The collectives of activations: of tensor parallelism and of split sequences."""
    return (
        *tensor_traffic(cls, strategy, setting),
        *context_traffic(cls, strategy, setting),
    )


def context_traffic(
    cls: LayerClass, strategy: LayerStrategy, setting: Setting
) -> tuple[Traffic, ...]:
    """The collectives of attention where the sequence is split."""
    products = [p for p in cls.products or () if p.keys is not None]
    if not strategy.context or not products:
        return ()
    mesh, axes = setting.mesh, strategy.context
    share = setting.microbatch / setting.graph_batch / mesh.size_of(strategy.batch_axes(mesh))
    share /= mesh.size_of(strategy.tensor)
    if strategy.attention == "heads":
        # There and back, for the values, for their gradients, and where they are not kept.
        again = 2 if strategy.recompute == "none" else 3
        moved = share * sum(p.moved_bytes for p in products)
        return (Traffic("tensor", "all-to-all", axes, moved, again),)
    keys = share * sum(p.key_bytes for p in products)
    return (
        Traffic("tensor", "all-gather", axes, keys, 2),
        Traffic("tensor", "reduce-scatter", axes, keys, 1),
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
    rows = _row_parallel(cls, setting)
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
                    split = t.kind in ("reduce-scatter", "all-to-all")
                    result = t.num_bytes / parts if split else t.num_bytes
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


def _ring_s(num_bytes: float, parts: int, link: Link) -> float:
    """Seconds of a ring all-gather or reduce-scatter of `num_bytes` over `parts` devices.

    An all-reduce moves twice the bytes: pass `2 * num_bytes`.
    """
    if parts <= 1:
        return 0.0
    return num_bytes * (parts - 1) / parts / link.bandwidth + (parts - 1) * link.latency_s


def _row_parallel(cls: LayerClass, setting: Setting) -> int:
    """How many of a layer's products tensor parallelism leaves partial sums."""
    key = (cls.name, "rows")
    if key not in setting.known:
        setting.known[key] = sum(
            _is_row_parallel(p, setting.tensor_dims) for p in (*cls.parameters, *cls.tied)
        )
    rows: int = setting.known[key]
    return rows


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
