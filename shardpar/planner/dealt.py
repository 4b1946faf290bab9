"""One pipeline on its own groups of devices: every division of its layers, priced at once.

Each stage prices all layers of the model, those that it does not have included, so that a
division's seconds and bytes are sums over its range: a step for any number of micro-batches is
then a small dynamic programme.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardpar.errors import PlanError
from shardpar.planner.cost import pipeline_s
from shardpar.planner.options import SearchOptions
from shardpar.planner.prices import LayerCost, layer_cost
from shardpar.planner.setting import Setting, Workload
from shardpar.planner.stages import relaxed
from shardpar.planner.traffic import arrival_s, border_axes, border_s
from shardpar.spec.check import check_layer
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import OUTSIDE, LayerGraph
from shardpar.spec.plan import LayerStrategy, Pipeline, Stage, Zero
from shardpar.spec.schedule import held
from shardpar.spec.select import selector, strategies


@dataclass(frozen=True, eq=False)
class Prices:
    """A stage's layers priced, whether or not they are on it now; arrays over all layers.

    Attributes:
      legal: whether the layer may be there; `joins`, whether after the layer before it.
      micro_s, update_s, cross_s: seconds, as in LayerCost.
      enters_s, arrives_s: to take the layout of the layer before; from the stage before.
      state_bytes, saved_bytes, scratch_bytes: as in LayerCost.
    """

    legal: np.ndarray
    joins: np.ndarray
    micro_s: np.ndarray
    update_s: np.ndarray
    cross_s: np.ndarray
    enters_s: np.ndarray
    arrives_s: np.ndarray
    state_bytes: np.ndarray
    saved_bytes: np.ndarray
    scratch_bytes: np.ndarray

    def seconds(self, microbatches: int, pipelines: int) -> np.ndarray:
        """[layers + 1, layers + 1]: of a micro-batch through layers i to j; inf where illegal."""
        once = self.update_s + (self.cross_s if pipelines > 1 else 0.0)
        table = _sums(self.micro_s + once / microbatches)
        # The first layer of a stage changes no layout.
        table += _sums(self.enters_s) - np.append(self.enters_s, 0.0)[:, None]
        table += np.append(self.arrives_s, 0.0)[:, None]
        apart = ~self.joins * 1.0
        wrong = _sums(~self.legal + apart) - np.append(apart, 0.0)[:, None]
        first, end = np.indices(table.shape)
        return np.where((end > first) & (wrong == 0), table, np.inf)

    def num_bytes(self, in_flight: int) -> np.ndarray:
        """[layers + 1, layers + 1]: of layers i to j; inf for j <= i."""
        count = len(self.state_bytes)
        table = _sums(self.state_bytes + in_flight * self.saved_bytes)
        for i in range(count):
            table[i, i + 1 :] += np.maximum.accumulate(self.scratch_bytes[i:])
        first, end = np.indices(table.shape)
        return np.where(end > first, table, np.inf)


def _sums(values: np.ndarray) -> np.ndarray:
    """[n + 1, n + 1] sums of the values from i to j."""
    upto = np.concatenate([[0.0], np.cumsum(values)])
    out: np.ndarray = upto[None, :] - upto[:, None]
    return out


class Dealt:
    """One pipeline, its groups fixed: its step for any number of sequences, layers divided anew."""

    def __init__(
        self, pipeline: Pipeline, graph: LayerGraph, cluster: Cluster, workload: Workload,
        options: SearchOptions, tensor_dims: tuple[str, ...], zero: Zero = "none",
    ) -> None:  # fmt: skip
        self.pipeline, self.graph, self.cluster = pipeline, graph, cluster
        self.workload, self.tensor_dims, self.zero = workload, tensor_dims, zero
        self.limits = [
            min(cluster.kind_of(d).memory_bytes for d in stage.devices) * options.memory_fraction
            for stage in pipeline.stages
        ]
        self.chosen = [_strategies_everywhere(stage, graph) for stage in pipeline.stages]
        self.cuts = (0, *itertools.accumulate(len(strategies(s, graph)) for s in pipeline.stages))
        self._prices: dict[bool, list[Prices]] = {}
        self._found: dict[tuple[int, bool], tuple[float, tuple[int, ...]]] = {}

    def shares(self, batch: int) -> Iterator[int]:
        """Sequences that it may take of a batch, besides none."""
        turn = self.pipeline.num_groups if self.pipeline.schedule == "interleaved" else 1
        fewest = min(len(self.pipeline.stages), self.pipeline.num_microbatches)
        for count in range(max(1, fewest), batch // self.pipeline.microbatch + 1):
            if count % turn == 0:
                yield count * self.pipeline.microbatch

    def step_s(self, sequences: int, pipelines: int) -> float:
        """Seconds of a step with the best division of layers; inf where nothing fits."""
        return self._best(sequences, pipelines)[0]

    def pipeline_of(self, sequences: int, pipelines: int) -> Pipeline:
        """The pipeline with so many sequences and the best division of its layers."""
        cuts = self._best(sequences, pipelines)[1]
        stages = []
        for stage, chosen, (first, end), now in zip(
            self.pipeline.stages, self.chosen, itertools.pairwise(cuts),
            itertools.pairwise(self.cuts), strict=True,
        ):  # fmt: skip
            layers = stage.layers if (first, end) == now else self.entries(chosen, first, end)
            stages.append(replace(stage, layers=layers, peak_bytes=None))
        return replace(self.pipeline, sequences=sequences, stages=tuple(stages))

    def entries(
        self, chosen: Sequence[LayerStrategy], first: int, end: int
    ) -> tuple[LayerStrategy, ...]:
        """Layers from one number to another as a stage lists them; `chosen` is of all layers."""
        names = [layer.name for layer in self.graph.layers]
        return tuple(
            replace(strategy, layers=selector([names[i] for i in run]))
            for strategy, group in itertools.groupby(range(first, end), chosen.__getitem__)
            if (run := list(group))
        )

    def _best(self, sequences: int, pipelines: int) -> tuple[float, tuple[int, ...]]:
        key = sequences, pipelines > 1
        if key not in self._found:
            count, rest = divmod(sequences, self.pipeline.microbatch)
            turn = self.pipeline.num_groups if self.pipeline.schedule == "interleaved" else 1
            fits = count > 0 and not rest and count % turn == 0
            self._found[key] = self._divided(count, pipelines) if fits else (math.inf, ())
        return self._found[key]

    def _divided(self, count: int, pipelines: int) -> tuple[float, tuple[int, ...]]:
        prices = self.prices(count > 1)
        seconds = [of_stage.seconds(count, pipelines) for of_stage in prices]
        over = self.over(count)
        if self.pipeline.schedule != "interleaved":
            fitting = [np.where(o <= 0, s, np.inf) for s, o in zip(seconds, over, strict=True)]
            return relaxed(fitting, count)
        parts = list(itertools.pairwise(self.cuts))
        times = [float(table[part]) for table, part in zip(seconds, parts, strict=True)]
        here = replace(self.pipeline, sequences=count * self.pipeline.microbatch)
        if math.isinf(max(times)) or self.over_together(count) > 0:
            return math.inf, ()
        return pipeline_s(here, times), self.cuts

    def over_together(self, count: int) -> float:
        """Bytes over the limit of the fullest group, where groups hold several stages."""
        groups, most = self.pipeline.num_groups, -math.inf
        parts = list(itertools.pairwise(self.cuts))
        for group in range(groups):
            total = scratch = 0.0
            for number in range(group, len(parts), groups):
                prices, (first, end) = self.prices(count > 1)[number], parts[number]
                flying = self._in_flight(number, count)
                total += float((prices.state_bytes + flying * prices.saved_bytes)[first:end].sum())
                scratch = max(scratch, float(prices.scratch_bytes[first:end].max()))
            most = max(most, total + scratch - self.limits[group])
        return most

    def over(self, count: int) -> list[np.ndarray]:
        """Per stage, bytes of layers i to j above what the stage may use."""
        return [
            prices.num_bytes(self._in_flight(number, count)) - self.limits[number]
            for number, prices in enumerate(self.prices(count > 1))
        ]

    def _in_flight(self, number: int, count: int) -> int:
        pipeline = self.pipeline
        groups = pipeline.num_groups
        chunk = number // groups
        return held(pipeline.schedule, groups, number % groups, count, pipeline.chunks, chunk)

    def prices(self, accumulates: bool) -> list[Prices]:
        """Of each stage; a step of one micro-batch adds up no gradients."""
        if accumulates not in self._prices:
            self._prices[accumulates] = [
                self._stage_prices(number, 2 if accumulates else 1)
                for number in range(len(self.pipeline.stages))
            ]
        return self._prices[accumulates]

    def _stage_prices(self, number: int, count: int) -> Prices:
        stage, chosen = self.pipeline.stages[number], self.chosen[number]
        setting = Setting(
            self.cluster, stage.devices, stage.mesh, self.graph.batch, self.pipeline.microbatch,
            count, self.workload, 2, self.tensor_dims, self.zero,
        )  # fmt: skip
        known: dict[tuple[str, LayerStrategy], LayerCost | None] = {}
        rows = []
        source = self.pipeline.stages[number - 1].devices if number else ()
        link = self.cluster.link_among((*source, *stage.devices))
        for i, layer in enumerate(self.graph.layers):
            cls, strategy = self.graph.class_of(layer), chosen[i]
            if (cls.name, strategy) not in known:
                known[cls.name, strategy] = self._layer_cost(number, i, setting)
            cost = known[cls.name, strategy]
            if cost is None:
                rows.append((False, True, *[0.0] * 8))
                continue
            before = chosen[i - 1] if i else strategy
            # What lies outside all layers has the layout of the layer before it.
            joins = cls.name != OUTSIDE or border_axes(before, stage.mesh) == border_axes(
                strategy, stage.mesh
            )
            rows.append((
                True, joins, cost.microbatch_s(setting.speed.overlap), cost.update_s, cost.cross_s,
                border_s(cls, before, strategy, setting),
                arrival_s(cls, source, link, setting) if source else 0.0,
                cost.state_bytes, cost.saved_bytes, cost.scratch_bytes,
            ))  # fmt: skip
        columns = zip(*rows, strict=True)
        return Prices(*(np.array(column) for column in columns))

    def _layer_cost(self, number: int, layer: int, setting: Setting) -> LayerCost | None:
        cls, strategy = self.graph.class_of(self.graph.layers[layer]), self.chosen[number][layer]
        try:
            check_layer(cls, strategy, setting.microbatch, setting.mesh, self.tensor_dims)
        except PlanError:
            return None
        return layer_cost(cls, strategy, setting)


def _strategies_everywhere(stage: Stage, graph: LayerGraph) -> list[LayerStrategy]:
    """What each layer of the model would do on a stage: as its own, or as the nearest layer does.

    The nearest is looked for among the stage's layers of the same class, if it has any.
    """
    own = strategies(stage, graph)
    held_at = [i for i, layer in enumerate(graph.layers) if layer.name in own]
    found = []
    for i, layer in enumerate(graph.layers):
        alike = [j for j in held_at if graph.layers[j].class_name == layer.class_name] or held_at
        nearest = min(alike, key=lambda j: (abs(j - i), j))
        found.append(replace(own[graph.layers[nearest].name], layers=""))
    return found
