"""Seconds and bytes of a layer under a strategy, and of a stage.

Compute is the larger of FLOPs over the matmul rate and bytes over the memory
bandwidth. Collectives cost bytes over the slowest link they cross plus a delay per
hop (ring algorithms; Galvatron, arXiv 2211.13878, prices them alike). Memory is
state, plus what the forward saves for the backward, plus the largest scratch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardpar.planner.profile import Rates
from shardpar.planner.setting import Setting
from shardpar.planner.traffic import activation_traffic, weights
from shardpar.spec.graph import DTYPE_BYTES, OUTSIDE, LayerClass
from shardpar.spec.plan import LayerStrategy


@dataclass(frozen=True)
class LayerCost:
    """One layer, one micro-batch, one device; `update_s` and `cross_s` once per step.

    Attributes:
      forward_s, backward_s: compute, recompute included in the backward.
      tensor_s: collectives of activations, forward and backward: of tensor parallelism and of
        split sequences.
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
      peak_bytes: state_bytes + saved_bytes + scratch_bytes; where a group of devices holds
        several stages, of all of them.
      saved_bytes: of all micro-batches in flight.
      moves_s: of microbatch_s, changes of layout between layers.
      sent_s: of microbatch_s, receiving activations from the stage before and sending gradients.
      layers: the cost of each layer, by name.
      ends_s: of microbatch_s, of a single_jit pipeline, the stage's share of the first and last
        layers; forward_s and backward_s are without it.
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
    ends_s: float = 0.0


def layer_cost(
    cls: LayerClass, strategy: LayerStrategy, setting: Setting, mine: float | None = None
) -> LayerCost:
    """Prices one layer of a class under a strategy, for one micro-batch on one device.

    Args:
      cls: the layer's.
      strategy: how it runs.
      setting: where, and how often.
      mine: elements of its parameters that the device updates where pipelines share optimizer
        state out; None, where the other pipelines are not known, counts a half: two share.
    """
    mesh, workload = setting.mesh, setting.workload
    # XLA is free in what lies outside all layers: nothing there is recomputed.
    recompute = "none" if cls.name == OUTSIDE else strategy.recompute
    speed = setting.speed
    data, tensor = strategy.data_axes(mesh), strategy.tensor
    shards, degree = mesh.size_of(data), mesh.size_of(tensor)
    share = setting.microbatch / setting.graph_batch / shards
    item = DTYPE_BYTES[workload.compute_dtype]

    held_by = weights(cls, strategy, setting)
    stored, computed, updated = held_by.stored, held_by.computed, held_by.updated
    # Weights are read whole by every micro-batch, however small; activations shrink with it.
    read = item * computed
    forward_s = _compute_s(cls.forward_flops, cls.forward_bytes, read, share / degree, speed)
    backward_s = _compute_s(cls.backward_flops, cls.backward_bytes, 2 * read, share / degree, speed)
    if recompute == "full":
        backward_s += forward_s
    elif recompute == "selective":
        # Matmul results are kept; what is computed again is bound by memory.
        backward_s += cls.forward_bytes * share / degree / speed.memory_bandwidth

    tensor_s = math.fsum(t.seconds(setting) for t in activation_traffic(cls, strategy, setting))
    gather_s, sync_s, update_s, cross_s = held_by.gather_s, held_by.sync_s, held_by.update_s, 0.0
    shares = setting.zero == "pipelines" and setting.pipelines > 1
    if not shares:
        mine = updated
    elif mine is None:
        mine = updated / 2
    # The optimizer reads and writes master weights, gradient and its own slots once.
    update_s += mine * 4 * (3 + 2 * workload.optimizer_slots) / speed.memory_bandwidth
    if shares:
        # Slices are cut out of the parameters, and the parameters put together again.
        update_s += 2 * 4 * (mine + stored) / speed.memory_bandwidth
    if setting.pipelines > 1:
        # Pipelines sum their gradients once a step, over the network, in float32.
        link = setting.cluster.inter_host
        # A reduction to slices and a gather of them send as much, in two goes.
        cross_s = 2 * updated * 4 / link.bandwidth + (2 if shares else 1) * link.latency_s

    accumulates = setting.num_microbatches > 1
    if accumulates:
        backward_s += updated * (item + 2 * 4) / speed.memory_bandwidth
    # Weights are cast once; a loop reads them from a stack, which is the cast itself
    # unless every micro-batch stacks anew.
    copies = 0.0 if workload.compute_dtype == "float32" else stored * item
    if workload.loops and cls.whole_bytes and (accumulates or not copies):
        copies += stored * item
    gradients = stored * item + (updated * 4 if accumulates else 0.0)
    # Some backends copy what the optimizer reads and writes (CPU_EXTRA_COPIES says why).
    copies += speed.extra_copies * mine * 4 * workload.optimizer_slots
    inner = share / degree
    gathers = strategy.gathers
    kept = cls.saved(recompute, gathers) - cls.input_bytes
    whole = cls.whole(recompute, gathers)
    saved = whole * share + (kept - whole) * inner
    # Of the weights, as much as this device computes with.
    weighed = computed / cls.num_parameters if computed else 1.0
    if workload.loops and recompute == "none" and not gathers:
        # A loop stacks what its body makes of weights, slices of them say, for the backward.
        saved += cls.views_bytes * weighed
    # A recomputed layer's scratch is what the layer would otherwise have kept.
    all_kept = cls.saved("none", gathers) - cls.input_bytes
    part = cls.whole("none", gathers) / all_kept if all_kept else 0.0
    # Where tensor axes split the rest, whole arrays are the peak, and those are alive alike
    # around the same products whether or not they are computed again.
    choices = (recompute, "full") if tensor else (recompute,)
    mixed = part * share + (1 - part) * inner
    scratch = max((cls.scratch(c) - cls.fixed(c)) * mixed for c in choices)
    # Besides the slices and copies it makes of weights there are gathered weights and gradients
    # yet to be scattered: both at once where collectives run beside compute, as they do on
    # accelerators, and one after the other under XLA:CPU, the backend with extra copies.
    at_once = 1 if speed.extra_copies else 2
    scratch += cls.fixed(recompute) * weighed + at_once * (computed - stored) * item
    if strategy.context and strategy.attention == "gather":
        # Keys and values are whole while the layer computes, and so are their gradients.
        keys = sum(p.key_bytes for p in cls.products or () if p.keys is not None)
        scratch += 2 * keys * inner * (mesh.size_of(strategy.context) - 1)
    entering = cls.input_bytes * (inner if strategy.sequence_parallel else share)
    if cls.name == OUTSIDE:
        # The loss comes last: what it is given and keeps is gone before any layer goes back.
        saved, entering, scratch = 0.0, 0.0, scratch + saved + entering
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
        optimizer_bytes=mine * 4 * workload.optimizer_slots,
        saved_bytes=saved + entering,
        scratch_bytes=scratch,
    )


def floor_s(cls: LayerClass, setting: Setting) -> float:
    """Seconds no strategy beats for a micro-batch: its arithmetic, shared by all devices."""
    share = setting.microbatch / setting.graph_batch / len(setting.devices)
    return _compute_s(cls.forward_flops, cls.forward_bytes, 0.0, share, setting.speed) + _compute_s(
        cls.backward_flops, cls.backward_bytes, 0.0, share, setting.speed
    )


def _compute_s(
    flops: float, num_bytes: float, weight_bytes: float, share: float, speed: Rates
) -> float:
    moved = max(num_bytes * share, weight_bytes)
    return max(flops * share / speed.flops, moved / speed.memory_bandwidth)
