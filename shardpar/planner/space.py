"""All that a model's layers may do in one setting, priced: what the exact search chooses from."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from shardpar.errors import PlanError
from shardpar.planner.layers import Choice, Chosen, Run, bounds, choose, leanest_choice, least_bytes
from shardpar.planner.prices import LayerCost, layer_cost
from shardpar.planner.setting import Setting
from shardpar.planner.strategies import Pins, layer_strategies
from shardpar.planner.traffic import border_axes, border_s
from shardpar.spec.check import check_layer
from shardpar.spec.graph import OUTSIDE, LayerClass, LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy
from shardpar.spec.select import selector


@dataclass(frozen=True)
class Part:
    """Neighbouring layers that are alike, `first` to `end` in the graph: one class, equal pins."""

    cls: LayerClass
    pins: Pins
    first: int
    end: int


@dataclass(frozen=True, eq=False)
class Space:
    """The parts of a model, and what each may do in a setting.

    Attributes:
      graph, setting: of which model, where.
      parts: in layer order.
      strategies: per part; entry i is choice i of the part's run.
      runs: per part, all its layers with their priced choices.
    """

    graph: LayerGraph
    setting: Setting
    parts: tuple[Part, ...]
    strategies: tuple[tuple[LayerStrategy, ...], ...]
    runs: tuple[Run, ...]

    def counts(self, first: int, end: int) -> tuple[int, ...]:
        """How many layers of each part lie from layer `first` to `end`."""
        return tuple(max(0, min(end, p.end) - max(first, p.first)) for p in self.parts)

    def sub_runs(self, first: int, end: int) -> tuple[list[int], list[Run]]:
        """The parts within a range of layers, and their runs cut to it."""
        counts = self.counts(first, end)
        inside = [i for i, n in enumerate(counts) if n]
        return inside, [replace(self.runs[i], count=counts[i]) for i in inside]

    def choose(
        self, first: int, end: int, limit: float, in_flight: int, epsilon: float = 0.0
    ) -> Chosen | None:
        """The best strategies of a range of layers."""
        _, runs = self.sub_runs(first, end)
        return choose(runs, limit, in_flight, epsilon)

    def lower_bounds(self, limit: float, in_flight: int) -> np.ndarray:
        """[layers + 1, layers + 1] seconds no choice for layers i to j beats; inf for j <= i."""
        total = len(self.graph.layers)
        ranges = tuple((p.first, p.end) for p in self.parts)
        starts, ends, distinct, inverse = _intervals(ranges, total)
        table = np.full((total + 1, total + 1), np.inf)
        table[starts, ends] = bounds(self.runs, distinct, limit, in_flight)[inverse]
        return table

    def leanest(self, first: int, end: int, in_flight: int) -> list[tuple[int, int]]:
        """(part, choice) of the fewest bytes for a range of layers."""
        inside, runs = self.sub_runs(first, end)
        picks = [leanest_choice(run, in_flight) for run in runs]
        return list(zip(inside, picks, strict=True))

    def least_bytes(self, in_flight: int) -> np.ndarray:
        """[layers + 1, layers + 1] bytes that layers i to j need, however slow."""
        total = len(self.graph.layers)
        table = np.full((total + 1, total + 1), np.inf)
        known: dict[tuple[int, ...], float] = {}
        for first in range(total):
            for end in range(first + 1, total + 1):
                key = self.counts(first, end)
                if key not in known:
                    known[key] = least_bytes(self.sub_runs(first, end)[1], in_flight)
                table[first, end] = known[key]
        return table

    def entries(self, first: int, chosen: Chosen, end: int) -> tuple[LayerStrategy, ...]:
        """What was chosen for a range of layers as a stage's entries, neighbours joined."""
        inside, _ = self.sub_runs(first, end)
        position = first
        blocks: list[tuple[LayerStrategy, list[str]]] = []
        for part, order in zip(inside, chosen.order, strict=True):
            for choice, count in order:
                strategy = self.strategies[part][choice]
                names = [x.name for x in self.graph.layers[position : position + count]]
                position += count
                if blocks and blocks[-1][0] == strategy:
                    blocks[-1][1].extend(names)
                else:
                    blocks.append((strategy, names))
        return tuple(replace(strategy, layers=selector(names)) for strategy, names in blocks)


@functools.lru_cache(maxsize=64)
def _intervals(
    ranges: tuple[tuple[int, int], ...], total: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All ranges of layers: starts, ends, the distinct numbers of layers per part, and which."""
    starts, ends = np.triu_indices(total + 1, 1)
    firsts, lasts = np.array(ranges).T
    upto = np.minimum(ends[:, None], lasts[None, :])
    counts = np.clip(upto - np.maximum(starts[:, None], firsts[None, :]), 0, None)
    distinct, inverse = np.unique(counts, axis=0, return_inverse=True)
    return starts, ends, distinct, inverse.reshape(-1)


def parts_of(graph: LayerGraph, pins: Mapping[str, Pins]) -> tuple[Part, ...]:
    """The model's layers as runs of layers that the planner need not tell apart."""
    parts: list[Part] = []
    for i, layer in enumerate(graph.layers):
        cls = graph.class_of(layer)
        if parts and (parts[-1].cls.name, parts[-1].pins) == (cls.name, pins[layer.name]):
            parts[-1] = replace(parts[-1], end=i + 1)
        else:
            parts.append(Part(cls, pins[layer.name], i, i + 1))
    return tuple(parts)


def space_of(
    graph: LayerGraph,
    setting: Setting,
    parts: tuple[Part, ...],
    rejected: Counter[str],
    stuck: Counter[str],
    costs: dict[tuple[str, LayerStrategy], LayerCost | None],
    legal: dict[object, str],
) -> Space | None:
    """Prices every legal strategy of every part; None if some part has none.

    Args:
      graph: the model.
      setting: machines and micro-batch.
      parts: from `parts_of`.
      rejected: counts, by reason, the strategies that are not legal; added to.
      stuck: the same, for parts that have no legal strategy at all; added to.
      costs: what is priced already for this setting with as many micro-batches or other
        ones, but for the first: a step of one does not accumulate; added to.
      legal: why a layer cannot run so on this mesh, whatever its devices; added to.
    """
    mesh, speed, microbatch = setting.mesh, setting.speed, setting.microbatch
    most_tensor = _most_tensor(setting)
    borders: dict[object, int] = {}
    samples: list[LayerStrategy] = []
    priced: dict[tuple[str, LayerStrategy], Choice | None] = {}
    shards_of: dict[LayerStrategy, int] = {}
    chosen: list[list[LayerStrategy]] = []
    choices: list[list[Choice]] = []
    for part in parts:
        kept: list[LayerStrategy] = []
        pins = part.pins
        if part.cls.name == OUTSIDE:
            # XLA is free in what lies outside all layers: nothing there is recomputed.
            pins = replace(pins, recompute="none")
        # A layer that is not understood may not have its sequence split.
        few = microbatch if part.cls.products is not None else None
        for strategy in _strategies(mesh, pins, most_tensor, few):
            if strategy not in shards_of:
                shards_of[strategy] = mesh.size_of(strategy.batch_axes(mesh))
            shards = shards_of[strategy]
            if setting.microbatch % shards:
                continue
            if part.pins.microbatch not in (None, setting.microbatch // shards):
                continue
            key = (part.cls.name, strategy)
            if key not in priced:
                priced[key] = None
                if key not in costs:
                    # What a layer recomputes has no bearing on what is legal.
                    alike = (
                        part.cls.name, strategy.tensor, strategy.fsdp, strategy.zero1,
                        strategy.sequence_parallel, strategy.context, strategy.attention,
                    )  # fmt: skip
                    if alike not in legal:
                        legal[alike] = _problem(part.cls, strategy, setting)
                    reason = legal[alike]
                    costs[key] = None if reason else layer_cost(part.cls, strategy, setting)
                    if reason:
                        rejected[f"layer {graph.layers[part.first].name}: {reason}"] += 1
                cost = costs[key]
                if cost is None:
                    continue
                border = borders.setdefault(border_axes(strategy, mesh), len(borders))
                if border == len(samples):
                    samples.append(strategy)
                priced[key] = Choice(
                    cost.seconds(speed.overlap, setting.num_microbatches), cost.state_bytes,
                    cost.saved_bytes, cost.scratch_bytes, border,
                )  # fmt: skip
            if priced[key] is not None:
                kept.append(strategy)
        if not kept:
            name = graph.layers[part.first].name
            for strategy in _strategies(mesh, pins, most_tensor, few):
                if microbatch % mesh.size_of(strategy.batch_axes(mesh)) == 0:
                    reason = _problem(part.cls, strategy, setting)
                    if reason:
                        stuck[f"layer {name}: {reason}"] += 1
            return None
        chosen.append(kept)
        choices.append([c for s in kept if (c := priced[part.cls.name, s]) is not None])
    entry = {
        part.cls.name: tuple(
            tuple(_entry_s(part.cls, a, b, setting) for b in samples) for a in samples
        )
        for part in parts
    }
    runs = tuple(
        Run(part.end - part.first, tuple(c), entry[part.cls.name])
        for part, c in zip(parts, choices, strict=True)
    )
    return Space(graph, setting, parts, tuple(map(tuple, chosen)), runs)


@functools.lru_cache(maxsize=1024)
def _strategies(
    mesh: Mesh, pins: Pins, most_tensor: int, microbatch: int | None
) -> tuple[LayerStrategy, ...]:
    return tuple(layer_strategies(mesh, pins, most_tensor, microbatch))


def _entry_s(
    cls: LayerClass, before: LayerStrategy, after: LayerStrategy, setting: Setting
) -> float:
    if cls.name == OUTSIDE and border_axes(before, setting.mesh) != border_axes(
        after, setting.mesh
    ):
        # What lies outside takes the layout of the layer before it; no constraint says otherwise.
        return math.inf
    return border_s(cls, before, after, setting)


def _problem(cls: LayerClass, strategy: LayerStrategy, setting: Setting) -> str:
    """Why a layer cannot run so; empty if it can."""
    try:
        check_layer(cls, strategy, setting.microbatch, setting.mesh, setting.tensor_dims)
    except PlanError as error:
        return str(error)
    return ""


def _most_tensor(setting: Setting) -> int:
    """Largest tensor degree worth a look: tensor parallelism talks too much to leave a host."""
    hosts = Counter(setting.cluster.host_of(d) for d in setting.devices)
    return max(hosts.values())
