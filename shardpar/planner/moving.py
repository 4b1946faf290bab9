"""What changing from one plan to another moves: bytes of state, and seconds on the links.

Parameters and optimizer state lie as their strategies say, a copy or a slice in each pipeline.
A piece crosses if its device does not have it yet; where several devices have it, senders are
chosen as for any reshard (HotSPa's fused batched send-receive, SOSP'24). What only lost devices
had is read from a checkpoint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from shardpar.planner.setting import Workload
from shardpar.spec.cluster import Cluster
from shardpar.spec.exchange import Demand, Have, Want, demands
from shardpar.spec.graph import DTYPE_BYTES, LayerGraph, Parameter
from shardpar.spec.layout import Layout
from shardpar.spec.plan import Plan
from shardpar.spec.routing import Routing, route
from shardpar.spec.zero import holdings


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
    counts: dict[tuple[Parameter, Layout, Layout], float] = defaultdict(float)
    before, after = holdings(old, graph), holdings(new, graph)
    for name, here in before.items():
        there = after[name]
        counts[here.parameter, here.at_rest, there.at_rest] += 1
        counts[here.parameter, here.in_optimizer, there.in_optimizer] += workload.optimizer_slots
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


def _demands(
    parameter: Parameter, source: Layout, target: Layout, lost: Collection[int]
) -> tuple[Demand, ...]:
    """The pieces that devices want and lack; those without owners are lost."""
    have = [
        Have(piece.device, 0, piece.spans)
        for pieces in source.pieces(parameter.shape)
        for piece in pieces
        if piece.device not in lost
    ]
    want = [
        Want(piece.device, (0,), piece.spans)
        for pieces in target.pieces(parameter.shape)
        for piece in pieces
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
