"""What changing from one plan to another moves: bytes of state, and seconds on the links.

Parameters and optimizer state lie as their strategies say, a copy in each pipeline. A piece
crosses if its device does not have it yet; where several devices have it, senders are chosen as
for any reshard (HotSPa's fused batched send-receive, SOSP'24). What only lost devices had is
read from a checkpoint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from shardpar.planner.setting import Workload
from shardpar.spec.cluster import Cluster
from shardpar.spec.exchange import Demand, Have, Want, demands
from shardpar.spec.graph import DTYPE_BYTES, LayerGraph, Parameter
from shardpar.spec.layout import Group
from shardpar.spec.mesh import GroupLayout
from shardpar.spec.parameters import optimizer_layout, parameter_layout
from shardpar.spec.plan import Plan
from shardpar.spec.routing import Routing, route
from shardpar.spec.select import strategies


@dataclass(frozen=True)
class Moving:
    """What a change of plan moves.

    Attributes:
      moved_bytes: from device to device, all of them together.
      restored_bytes: that no device has any more, and come from a checkpoint.
      move_s: the busiest link's seconds, out or in, and the checkpoint's.
    """

    moved_bytes: float
    restored_bytes: float
    move_s: float


_Holding = tuple[Group, ...]
"""The groups that hold an array, a copy each."""


def moving(
    old: Plan,
    new: Plan,
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
    lost: Collection[int] = (),
    restore_bandwidth: float = 1e9,
) -> Moving:
    """What a running state moves from the layouts of one plan to those of another.

    Args:
      old: the plan that ran, on devices of `cluster`.
      new: the plan that shall run.
      graph: the model of both.
      cluster: the machines, the lost ones included.
      workload: how many arrays the optimizer keeps.
      lost: devices whose memory is gone.
      restore_bandwidth: bytes per second at which a checkpoint is read, all devices together.
    """
    counts: dict[tuple[Parameter, _Holding, _Holding], float] = defaultdict(float)
    before, after = _holdings(old, graph), _holdings(new, graph)
    for key, (parameter, at_rest, in_optimizer) in before.items():
        counts[parameter, at_rest, after[key][1]] += 1
        counts[parameter, in_optimizer, after[key][2]] += workload.optimizer_slots
    wanted: list[Demand] = []
    sizes: list[float] = []
    restored = 0.0
    for (parameter, source, target), count in counts.items():
        if not count:
            continue
        for demand in _demands(parameter, source, target, lost):
            size = demand.size * DTYPE_BYTES[parameter.dtype] * count
            if demand.owners:
                wanted.append(demand)
                sizes.append(size)
            else:
                restored += size * len(demand.receivers)
    routing = route(wanted, sizes, cluster)
    moved = sum(size * len(d.receivers) for d, size in zip(wanted, sizes, strict=True))
    busiest_s = max(routing.busiest_s, _receiving_s(wanted, sizes, routing, cluster))
    return Moving(moved, restored, busiest_s + restored / restore_bandwidth)


def _holdings(plan: Plan, graph: LayerGraph) -> Mapping[str, tuple[Parameter, _Holding, _Holding]]:
    """(parameter, who holds it, who holds its optimizer state) by its full name."""
    found: dict[str, Parameter] = {}
    groups: dict[str, tuple[list[Group], list[Group]]] = defaultdict(lambda: ([], []))
    known: dict[tuple[tuple[int, ...], GroupLayout], Group] = {}
    for pipeline in plan.pipelines:
        for stage in pipeline.stages:
            chosen = strategies(stage, graph)
            for name, layer, parameter in graph.parameters:
                if layer.name not in chosen:
                    continue
                found[name] = parameter
                for where, layout_of in zip(
                    groups[name], (parameter_layout, optimizer_layout), strict=True
                ):
                    layout = layout_of(parameter, chosen[layer.name], stage.mesh, plan.tensor_dims)
                    key = stage.devices, layout
                    if key not in known:
                        known[key] = Group.of(stage.devices, layout)
                    where.append(known[key])
    return {
        name: (parameter, tuple(groups[name][0]), tuple(groups[name][1]))
        for name, parameter in found.items()
    }


def _demands(
    parameter: Parameter, source: _Holding, target: _Holding, lost: Collection[int]
) -> tuple[Demand, ...]:
    """The pieces that devices want and lack; those without owners are lost."""
    have = [
        Have(piece.device, 0, piece.spans)
        for group in source
        for piece in group.pieces(parameter.shape)
        if piece.device not in lost
    ]
    want = [
        Want(piece.device, (0,), piece.spans)
        for group in target
        for piece in group.pieces(parameter.shape)
    ]
    return demands(have, want)


def _receiving_s(
    wanted: list[Demand], sizes: list[float], routing: Routing, cluster: Cluster
) -> float:
    """Seconds of the busiest device's link inwards."""
    load: dict[tuple[int, bool], float] = defaultdict(float)
    for demand, size, shares in zip(wanted, sizes, routing.shares, strict=True):
        for receiver, parts in shares.items():
            for sender, elements in parts:
                far = cluster.host_of(sender) != cluster.host_of(receiver)
                link = cluster.inter_host if far else cluster.intra_host
                load[receiver, far] += size * elements / demand.size / link.bandwidth
    return max(load.values(), default=0.0)
