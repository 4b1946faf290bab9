"""The best pipeline over given groups of devices: layers of each stage, strategy of each layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shardpar.planner.layers import Chosen
from shardpar.planner.options import SearchOptions
from shardpar.planner.priced import Priced
from shardpar.planner.prices import LayerCost
from shardpar.planner.setting import Setting, Workload
from shardpar.planner.space import Part, Space, parts_of, space_of
from shardpar.planner.stages import Division, StageSeconds, divide, relaxed
from shardpar.planner.strategies import pins_of
from shardpar.planner.traffic import arrival_s
from shardpar.spec.cluster import Cluster, Link
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Stage, Zero
from shardpar.spec.schedule import held

Groups = tuple[tuple[int, ...], ...]
"""Devices of each stage, in order."""


@dataclass(frozen=True)
class Shape:
    """A pipeline before its layers are divided.

    Attributes:
      groups: devices of each stage.
      sequences: of the global batch that it takes.
      microbatch: sequences of one micro-batch.
      pipelines: how many pipelines the plan has in all.
    """

    groups: Groups
    sequences: int
    microbatch: int
    pipelines: int = 1

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a step."""
        return self.sequences // self.microbatch


@dataclass(frozen=True)
class Found:
    """A pipeline with its seconds and a bound on every pipeline of its shape."""

    pipeline: Pipeline
    step_s: float
    lower_bound_s: float


@dataclass(eq=False)
class Problem:
    """What is planned for; what was computed on the way is kept here and nowhere else.

    Attributes:
      graph, cluster, workload, options: the search's arguments.
      zero: "pipelines" to keep the optimizer state once over pipelines.
      rejected: strategies that are not legal, counted by reason.
      stuck: those of them that leave a layer without any.
    """

    graph: LayerGraph
    cluster: Cluster
    workload: Workload
    options: SearchOptions
    zero: Zero = "none"
    rejected: Counter[str] = field(default_factory=Counter)
    stuck: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.parts: tuple[Part, ...] = parts_of(self.graph, pins_of(self.graph, self.options))
        # How far from its bound any stage was left: divisions passed over for its seconds
        # may be better by so much.
        self.slack = 1.0
        self._alike: dict[tuple[int, ...], int] = {}
        self._groups: dict[object, int] = {}
        self._between: dict[object, Link] = {}
        self._known: dict[int, dict[object, Any]] = {}
        self._legal: dict[Mesh, dict[object, str]] = {}
        self._priced: dict[object, Priced | None] = {}
        self._spaces: dict[object, Space | None] = {}
        self._lower: dict[object, np.ndarray] = {}
        self._least: dict[object, np.ndarray] = {}
        self._chosen: dict[object, Chosen | None] = {}

    def runs(self, shape: Shape) -> bool:
        """Whether a shape can run at all, memory aside."""
        if len(shape.groups) > len(self.graph.layers):
            return False
        return all(self.space(devices, shape) is not None for devices in shape.groups)

    def limit(self, devices: tuple[int, ...]) -> float:
        """Bytes a plan may use on the smallest device of a group."""
        smallest = min(k.memory_bytes for k in {self.cluster.kind_of(d) for d in devices})
        return smallest * self.options.memory_fraction

    def alike(self, devices: tuple[int, ...]) -> int:
        """Equal for groups that cost the same: equal kinds, equally spread over hosts."""
        if devices not in self._alike:
            first = self.cluster.host_of(devices[0])
            group = tuple(
                (self.cluster.kind_of(d).name, self.cluster.host_of(d) - first) for d in devices
            )
            self._alike[devices] = self._groups.setdefault(group, len(self._groups))
        return self._alike[devices]

    def priced(self, devices: tuple[int, ...], shape: Shape) -> Priced | None:
        """All choices of a group, however many micro-batches; None if a layer has none."""
        alike, microbatch, count = self.alike(devices), shape.microbatch, shape.num_microbatches
        # A step of one micro-batch adds up no gradients; otherwise the number has no bearing.
        key = (alike, microbatch, count > 1)
        if key not in self._priced:
            mesh = Mesh.factored(len(devices))
            setting = Setting(
                self.cluster, devices, mesh, self.graph.batch, microbatch, count, self.workload,
                pipelines=2, zero=self.zero, known=self._known.setdefault(alike, {}),
            )  # fmt: skip
            costs: dict[tuple[str, LayerStrategy], LayerCost | None] = {}
            space = space_of(
                self.graph, setting, self.parts, self.rejected, self.stuck, costs,
                self._legal.setdefault(mesh, {}),
            )  # fmt: skip
            self._priced[key] = None if space is None else Priced.of(space, costs)
        return self._priced[key]

    def space(self, devices: tuple[int, ...], shape: Shape) -> Space | None:
        """The choices of a group that are worth a look."""
        key = self._key(devices, shape)
        if key not in self._spaces:
            priced = self.priced(devices, shape)
            self._spaces[key] = (
                None if priced is None else priced.of_step(shape.num_microbatches, shape.pipelines)
            )
        return self._spaces[key]

    def _key(self, devices: tuple[int, ...], shape: Shape) -> tuple[int, int, int, int]:
        many = min(shape.pipelines, 2)
        return (self.alike(devices), shape.microbatch, shape.num_microbatches, many)

    def table(self, shape: Shape) -> StageSeconds | None:
        """Lower bounds of all stages, and how to make them exact; None if a group has no choice."""
        lower, arrivals = [], []
        for number, devices in enumerate(shape.groups):
            space = self.space(devices, shape)
            if space is None:
                return None
            in_flight = held("1f1b", len(shape.groups), number, shape.num_microbatches)
            key = (self._key(devices, shape), in_flight)
            if key not in self._lower:
                self._lower[key] = space.lower_bounds(self.limit(devices), in_flight)
            # The space may be that of another group that is like this one.
            here = replace(space.setting, devices=devices)
            arrival = self._arrivals(shape, number, here)
            arrivals.append(arrival)
            lower.append(self._lower[key] + arrival[:, None])

        def exact(stage: int, first: int, end: int) -> float:
            chosen = self.chosen(shape, stage, first, end)
            return math.inf if chosen is None else chosen.seconds + float(arrivals[stage][first])

        return StageSeconds(lower, exact)

    def _arrivals(self, shape: Shape, number: int, setting: Setting) -> np.ndarray:
        """Seconds a stage needs to receive what its first layer reads, by first layer."""
        out = np.zeros(len(self.graph.layers) + 1)
        if number:
            source = shape.groups[number - 1]
            pair = (source, setting.devices)
            if pair not in self._between:
                self._between[pair] = self.cluster.link_among((*source, *setting.devices))
            for part in self.parts:
                out[part.first : part.end] = arrival_s(
                    part.cls, source, self._between[pair], setting
                )
        return out

    def chosen(self, shape: Shape, stage: int, first: int, end: int) -> Chosen | None:
        """The best strategies of one stage, remembered."""
        devices = shape.groups[stage]
        in_flight = held("1f1b", len(shape.groups), stage, shape.num_microbatches)
        space = self.space(devices, shape)
        assert space is not None
        key = (self._key(devices, shape), in_flight, space.counts(first, end))
        if key not in self._chosen:
            self._chosen[key] = space.choose(
                first, end, self.limit(devices), in_flight, self.options.epsilon / 2
            )
            chosen = self._chosen[key]
            if chosen is not None and chosen.seconds:
                self.slack = min(self.slack, chosen.lower_bound_s / chosen.seconds)
        return self._chosen[key]

    def least_bytes(self, shape: Shape) -> list[np.ndarray] | None:
        """Per stage, bytes that layers i to j need, however slow."""
        out = []
        for number, devices in enumerate(shape.groups):
            space = self.space(devices, shape)
            if space is None:
                return None
            in_flight = held("1f1b", len(shape.groups), number, shape.num_microbatches)
            key = (self._key(devices, shape), in_flight)
            if key not in self._least:
                self._least[key] = space.least_bytes(in_flight)
            out.append(self._least[key])
        return out


def lower_bound(problem: Problem, shape: Shape, cutoff: float = math.inf) -> float:
    """Seconds no pipeline of this shape beats; inf if it cannot run, does not fit, or needs more
    than `cutoff`.
    """
    table = problem.table(shape)
    return (
        math.inf
        if table is None
        else relaxed(table.lower, shape.num_microbatches, cutoff, problem.options.epsilon / 4)[0]
    )


def best_pipeline(problem: Problem, shape: Shape, cutoff: float = math.inf) -> Found | None:
    """The fastest pipeline of a shape; None if none takes less than `cutoff` seconds."""
    table = problem.table(shape)
    if table is None:
        return None
    division = divide(table, shape.num_microbatches, problem.options.epsilon / 2, cutoff)
    return None if division is None else _found(problem, shape, division)


def _found(problem: Problem, shape: Shape, division: Division) -> Found:
    stages = []
    for number, devices in enumerate(shape.groups):
        first, end = division.cuts[number], division.cuts[number + 1]
        chosen = problem.chosen(shape, number, first, end)
        space = problem.space(devices, shape)
        assert chosen is not None
        assert space is not None
        stages.append(
            Stage(devices, space.setting.mesh, space.entries(first, chosen, end), chosen.num_bytes)
        )
    pipeline = Pipeline(shape.sequences, shape.microbatch, tuple(stages))
    return Found(
        pipeline, division.step_s, min(division.lower_bound_s * problem.slack, division.step_s)
    )


def shapes(cluster: Cluster, workload: Workload, options: SearchOptions) -> Iterator[Shape]:
    """Single pipelines over all devices in order: every number of equal stages and micro-batch."""
    devices = tuple(range(cluster.num_devices))
    for stages in range(1, len(devices) + 1):
        if len(devices) % stages or options.stages not in (None, stages):
            continue
        size = len(devices) // stages
        groups = tuple(devices[i : i + size] for i in range(0, len(devices), size))
        for microbatch in range(workload.global_batch, 0, -1):
            if workload.global_batch % microbatch == 0:
                yield Shape(groups, workload.global_batch, microbatch)
