"""The fastest plan by other means: all plans one by one, or all Pareto-optimal chains of layers.

Both know the planner's prices (`plan_cost`, `layer_cost`) and nothing of how it searches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from shardpar.errors import PlanError
from shardpar.planner.cost import PlanCost, plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.prices import layer_cost
from shardpar.planner.setting import Setting, Workload
from shardpar.planner.strategies import Pins, layer_strategies, pins_of
from shardpar.planner.traffic import arrival_s, border_axes, border_s
from shardpar.spec.check import check, check_layer
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import OUTSIDE, LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.schedule import held

Groups = list[tuple[int, ...]]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def groups_of(cluster: Cluster, layers: int, options: SearchOptions) -> Iterator[Groups]:
    """All devices in order, in every number of equal groups."""
    devices = cluster.num_devices
    for stages in divisors(devices):
        if stages <= layers and options.stages in (None, stages):
            size = devices // stages
            yield [tuple(range(i, i + size)) for i in range(0, devices, size)]


def cuts_of(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for inner in itertools.combinations(range(1, layers), stages - 1):
        yield (0, *inner, layers)


def strategies_of(
    graph: LayerGraph,
    position: int,
    mesh: Mesh,
    pins: dict[str, Pins],
    microbatch: int,
    most_tensor: int,
) -> list[LayerStrategy]:
    """What one layer may do; tensor parallelism stays inside a host unless it is pinned."""
    layer = graph.layers[position]
    own = pins[layer.name]
    each = own.microbatch
    if graph.class_of(layer).name == OUTSIDE:
        own = replace(own, recompute="none")
    found = []
    for strategy in layer_strategies(mesh, own):
        shards = mesh.size_of(strategy.data_axes(mesh))
        wide = own.tensor is None and mesh.size_of(strategy.tensor) > most_tensor
        if each in (None, microbatch / shards) and not wide:
            found.append(replace(strategy, layers=layer.name))
    return found


def devices_of_a_host(cluster: Cluster, devices: tuple[int, ...]) -> int:
    """Of these devices, the most that one host has."""
    hosts = [cluster.host_of(d) for d in devices]
    return max(hosts.count(host) for host in hosts)


def every_plan(
    graph: LayerGraph, cluster: Cluster, work: Workload, options: SearchOptions = SearchOptions()
) -> Iterator[tuple[Plan, PlanCost]]:
    """Every legal plan of one pipeline with its price, a strategy for each layer by itself."""
    pins, layers = pins_of(graph, options), len(graph.layers)
    for groups in groups_of(cluster, layers, options):
        mesh = Mesh.factored(len(groups[0]))
        for microbatch, cuts in itertools.product(
            divisors(work.global_batch), cuts_of(layers, len(groups))
        ):
            # Which stage a layer is in says how many of its devices share a host.
            each = [
                strategies_of(graph, i, mesh, pins, microbatch, devices_of_a_host(cluster, devices))
                for devices, (first, end) in zip(groups, itertools.pairwise(cuts), strict=True)
                for i in range(first, end)
            ]
            for chosen in itertools.product(*each):
                if not outside_follows(graph, chosen, cuts, mesh):
                    continue
                stages = tuple(
                    Stage(devices, mesh, chosen[first:end])
                    for devices, (first, end) in zip(groups, itertools.pairwise(cuts), strict=True)
                )
                pipeline = Pipeline(work.global_batch, microbatch, stages)
                plan = Plan(cluster.name, work.global_batch, (pipeline,))
                try:
                    check(plan, graph, cluster)
                except PlanError:
                    continue
                yield plan, plan_cost(plan, graph, cluster, work)


def outside_follows(
    graph: LayerGraph, chosen: tuple[LayerStrategy, ...], cuts: tuple[int, ...], mesh: Mesh
) -> bool:
    """What lies outside all layers has the layout of the layer before it in its stage."""
    return all(
        graph.class_of(layer).name != OUTSIDE
        or i in cuts
        or border_axes(chosen[i - 1], mesh) == border_axes(chosen[i], mesh)
        for i, layer in enumerate(graph.layers)
    )


# A label is (seconds, bytes) of a chain of layers.
Labels = list[tuple[float, float]]


def pareto(labels: Labels) -> Labels:
    """Those that no other beats in both measures."""
    out: Labels = []
    for seconds, num_bytes in sorted(labels):
        if not out or num_bytes < out[-1][1]:
            out.append((seconds, num_bytes))
    return out


class Chains:
    """The fastest chain of layers in one group, by dynamic programming over Pareto sets."""

    def __init__(self, graph: LayerGraph, setting: Setting, pins: dict[str, Pins]) -> None:
        self.graph, self.setting = graph, setting
        self.choices = []
        for i, layer in enumerate(graph.layers):
            cls, own = graph.class_of(layer), []
            most = devices_of_a_host(setting.cluster, setting.devices)
            for s in strategies_of(graph, i, setting.mesh, pins, setting.microbatch, most):
                try:
                    check_layer(cls, s, setting.microbatch, setting.mesh)
                except PlanError:
                    continue
                own.append((s, layer_cost(cls, s, setting), border_axes(s, setting.mesh)))
            self.choices.append(own)

    def best(self, first: int, end: int, limit: float, in_flight: int) -> float:
        """Seconds of one micro-batch through layers first to end; inf if nothing fits."""
        found = math.inf
        caps = {c.scratch_bytes for own in self.choices[first:end] for _, c, _ in own}
        for cap in sorted(caps, reverse=True):
            found = min(found, self._below(first, end, limit, in_flight, cap, found))
        return found

    def _below(
        self, first: int, end: int, limit: float, in_flight: int, cap: float, cutoff: float
    ) -> float:
        setting = self.setting
        state: dict[object, tuple[LayerStrategy, Labels]] = {}
        for i in range(first, end):
            cls = self.graph.class_of(self.graph.layers[i])
            by_border: dict[object, list[tuple[LayerStrategy, float, float]]] = {}
            for s, cost, border in self.choices[i]:
                if cost.scratch_bytes <= cap:
                    seconds = cost.seconds(setting.speed.overlap, setting.num_microbatches)
                    num_bytes = cost.state_bytes + in_flight * cost.saved_bytes
                    by_border.setdefault(border, []).append((s, seconds, num_bytes))
            after: dict[object, tuple[LayerStrategy, Labels]] = {}
            for border, own in by_border.items():
                before: Labels = [(0.0, 0.0)] if i == first else []
                for other, (sample, labels) in state.items():
                    if cls.name == OUTSIDE and other != border:
                        continue
                    move_s = border_s(cls, sample, own[0][0], setting)
                    before += [(s + move_s, b) for s, b in labels]
                items = pareto([(s, b) for _, s, b in own])
                labels = pareto([
                    (s + t, b + c)
                    for s, b in pareto(before)
                    for t, c in items
                    if b + c + cap <= limit and s + t < cutoff
                ])  # fmt: skip
                if labels:
                    after[border] = own[0][0], labels
            state = after
            if not state:
                return math.inf
        return min(labels[0][0] for _, labels in state.values())


def fastest_by_chains(
    graph: LayerGraph, cluster: Cluster, work: Workload, options: SearchOptions = SearchOptions()
) -> float:
    """Seconds of the fastest plan of one pipeline; inf if nothing fits."""
    limit = cluster.kinds[0].memory_bytes * options.memory_fraction
    layers, pins, best = len(graph.layers), pins_of(graph, options), math.inf
    for groups in groups_of(cluster, layers, options):
        for microbatch in divisors(work.global_batch):
            count = work.global_batch // microbatch
            tables = []
            for number, devices in enumerate(groups):
                setting = Setting(
                    cluster, devices, Mesh.factored(len(devices)), graph.batch, microbatch, count,
                    work,
                )  # fmt: skip
                chains = Chains(graph, setting, pins)
                in_flight = held("1f1b", len(groups), number, count)
                firsts = [0] if number == 0 else range(number, layers)
                ends = [layers] if number == len(groups) - 1 else range(1, layers)
                table = {}
                for first, end in itertools.product(firsts, ends):
                    if first < end:
                        arrives_s = 0.0
                        if number:
                            cls, source = graph.class_of(graph.layers[first]), groups[number - 1]
                            link = cluster.link_among((*source, *devices))
                            arrives_s = arrival_s(cls, source, link, setting)
                        seconds = chains.best(first, end, limit, in_flight)
                        table[first, end] = seconds + arrives_s
                tables.append(table)
            for cuts in cuts_of(layers, len(groups)):
                times = [t[part] for t, part in zip(tables, itertools.pairwise(cuts), strict=True)]
                if max(times) < math.inf:
                    best = min(best, math.fsum(times) + (count - 1) * max(times))
    return best
