"""A plan's layers and micro-batches dealt anew over its own groups of devices, for their speeds.

Malleus (arXiv 2410.13333) asks for the layers of each stage, then for the micro-batches of each
pipeline, as two integer programmes. Both are small enough to be exact by dynamic programmes:
layers are divided for every number of micro-batches, and the numbers chosen from those steps.
Malleus divides layers so that the slowest stage is fastest; here the planner's whole price of a
step, sum(t) + (m - 1) * max(t), is least, which is the same where m is large.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardpar.errors import InfeasibleError, PlanError
from shardpar.planner.cost import LayerCost, layer_cost, pipeline_s, plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.setting import Setting, Workload
from shardpar.planner.stages import most_even, relaxed
from shardpar.planner.traffic import arrival_s, border_axes, border_s
from shardpar.spec.check import check_layer
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import OUTSIDE, LayerGraph
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.schedule import held
from shardpar.spec.select import selector, strategies


def rebalanced(
    plan: Plan,
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
    options: SearchOptions = SearchOptions(),
) -> Plan:
    """The plan with the best layers per stage and micro-batches per pipeline on its groups.

    Groups of devices, meshes and sizes of micro-batches stay. A layer that comes to a stage takes
    the strategy of the nearest layer of its class that the stage had, or else of the nearest
    layer. A pipeline gets at least as many micro-batches as it has stages, or as it had if
    those were fewer, or none at all: then its devices stand by. Of an interleaved pipeline the
    layers stay too.

    Args:
      plan: what runs now; its shares of the batch need not matter any more.
      graph: the model.
      cluster: the machines, with the speeds they have now.
      workload: batch, dtype and optimizer.
      options: the share of memory to fill.

    Raises:
      InfeasibleError: the layers do not fit in these groups, however they are divided.
      PlanError: no numbers of micro-batches add up to the batch.
    """
    dealt = [
        Dealt(pipeline, graph, cluster, workload, options, plan.tensor_dims)
        for pipeline in plan.pipelines
    ]
    batch = workload.global_batch
    shares = best_shares(dealt, batch)
    if shares is None:
        raise _nothing_fits(dealt, batch)
    active = sum(share > 0 for share in shares)
    pipelines = tuple(
        one.pipeline_of(share, active) for one, share in zip(dealt, shares, strict=True) if share
    )
    found = replace(plan, global_batch=batch, pipelines=pipelines, objective=None)
    return with_peaks(found, graph, cluster, workload)


def with_peaks(plan: Plan, graph: LayerGraph, cluster: Cluster, workload: Workload) -> Plan:
    """The plan with the bytes that each stage is predicted to need."""
    costs = iter(plan_cost(plan, graph, cluster, workload).stages)
    pipelines = tuple(
        replace(p, stages=tuple(replace(s, peak_bytes=next(costs).peak_bytes) for s in p.stages))
        for p in plan.pipelines
    )
    return replace(plan, pipelines=pipelines)


def best_shares(dealt: Sequence[Dealt], batch: int) -> tuple[int, ...] | None:
    """Sequences for each pipeline, 0 for one that stands by, so that the slowest is fastest.

    None if there are none that fit and add up to the batch.
    """
    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    for at, one in enumerate(dealt):
        # A pipeline that takes the whole batch has no gradients to sum with others.
        alone = one.step_s(batch, 1)
        if alone < best[0]:
            best = alone, tuple(batch if i == at else 0 for i in range(len(dealt)))
    if len(dealt) > 1:
        tables = [
            [(0, 0.0), *((n, s) for n in one.shares(batch) if (s := one.step_s(n, 2)) < math.inf)]
            for one in dealt
        ]
        together = _least_of_slowest(tables, batch)
        if together[0] < best[0]:
            best = together
    return best[1] or None


def _least_of_slowest(
    tables: Sequence[Sequence[tuple[int, float]]], batch: int
) -> tuple[float, tuple[int, ...]]:
    """One (sequences, seconds) of each table: sequences add up, the most seconds are least.

    >>> _least_of_slowest([[(0, 0.0), (1, 2.0), (2, 4.0)], [(0, 0.0), (1, 1.0), (2, 2.0)]], 3)
    (2.0, (1, 2))
    """
    reached = np.full(batch + 1, np.inf)
    reached[0] = 0.0
    picks: list[np.ndarray] = []
    for table in tables:
        now, pick = np.full(batch + 1, np.inf), np.zeros(batch + 1, int)
        for sequences, seconds in table:
            if sequences > batch:
                continue
            value = np.maximum(reached[: batch + 1 - sequences], seconds)
            better = value < now[sequences:]
            now[sequences:][better] = value[better]
            pick[sequences:][better] = sequences
        reached = now
        picks.append(pick)
    if not np.isfinite(reached[batch]):
        return math.inf, ()
    shares, rest = [], batch
    for pick in reversed(picks):
        shares.append(int(pick[rest]))
        rest -= shares[-1]
    return float(reached[batch]), tuple(reversed(shares))


@dataclass(frozen=True, eq=False)
class _Prices:
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
        options: SearchOptions, tensor_dims: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.pipeline, self.graph, self.cluster = pipeline, graph, cluster
        self.workload, self.tensor_dims = workload, tensor_dims
        self.limits = [
            min(cluster.kind_of(d).memory_bytes for d in stage.devices) * options.memory_fraction
            for stage in pipeline.stages
        ]
        self.chosen = [_strategies_everywhere(stage, graph) for stage in pipeline.stages]
        self.cuts = (0, *itertools.accumulate(len(strategies(s, graph)) for s in pipeline.stages))
        self._prices: dict[bool, list[_Prices]] = {}
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
            layers = stage.layers if (first, end) == now else self._entries(chosen, first, end)
            stages.append(replace(stage, layers=layers, peak_bytes=None))
        return replace(self.pipeline, sequences=sequences, stages=tuple(stages))

    def _entries(
        self, chosen: Sequence[LayerStrategy], first: int, end: int
    ) -> tuple[LayerStrategy, ...]:
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
        if math.isinf(max(times)) or self._over_together(count) > 0:
            return math.inf, ()
        return pipeline_s(here, times), self.cuts

    def _over_together(self, count: int) -> float:
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

    def prices(self, accumulates: bool) -> list[_Prices]:
        """Of each stage; a step of one micro-batch adds up no gradients."""
        if accumulates not in self._prices:
            self._prices[accumulates] = [
                self._stage_prices(number, 2 if accumulates else 1)
                for number in range(len(self.pipeline.stages))
            ]
        return self._prices[accumulates]

    def _stage_prices(self, number: int, count: int) -> _Prices:
        stage, chosen = self.pipeline.stages[number], self.chosen[number]
        setting = Setting(
            self.cluster, stage.devices, stage.mesh, self.graph.batch, self.pipeline.microbatch,
            count, self.workload, 2, self.tensor_dims,
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
        return _Prices(*(np.array(column) for column in columns))

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


def _nothing_fits(dealt: Sequence[Dealt], batch: int) -> PlanError:
    short: list[tuple[float, int]] = []
    for number, one in enumerate(dealt):
        counts = [n // one.pipeline.microbatch for n in one.shares(batch)]
        if not counts:
            continue
        if one.pipeline.schedule == "interleaved":
            short.append((one._over_together(counts[0]), number))
        else:
            short.append((most_even(one.over(counts[0]))[0], number))
    missing, number = min(short, default=(0.0, 0))
    if not 0 < missing < math.inf:
        sizes = ", ".join(str(one.pipeline.microbatch) for one in dealt)
        return PlanError(
            f"no micro-batches of {sizes} sequences, at least one for each stage of a pipeline, "
            f"add up to {batch} in a way that fits; plan again with other micro-batches"
        )
    count, gib = math.ceil(missing), missing / 2**30
    suggestion = "plan again, so that layers may take other strategies and devices other groups"
    return InfeasibleError(
        f"no division of the layers over the plan's groups fits: with the most even one, pipeline "
        f"{number} is {gib:.2f} GiB ({count} bytes) per device above its limit; {suggestion}",
        missing_bytes=count,
        suggestion=suggestion,
    )
