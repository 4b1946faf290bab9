"""Decides which layers share a colour, a column or a row of figures on a plan's page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardpar.cli.plan_page_drawings import Bar, PricedStage, time_text
from shardpar.planner.prices import LayerCost
from shardpar.planner.strategies import describe
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy
from shardpar.spec.select import strategies, summarise

MOST_COLUMNS = 48
"""A model of more layers has a column per run of equal layers instead of one per layer."""

TERMS = {
    "forward": "forward",
    "backward": "backward",
    "tensor": "in tensor-parallel collectives",
    "gather": "gathering parameters",
    "sync": "summing gradients",
}
"""What a micro-batch's seconds are spent on, and how people say it."""

# Neighbours in this order differ most, to people who tell few hues apart as well.
_HUES = (255, 65, 150, 320, 105, 25, 200, 350)
_TIERS = 3


@dataclass(frozen=True)
class Choice:
    """A distinct strategy: the letter and colour that stand for it, and what it is."""

    letter: str
    text: str
    hue: float
    tier: int
    layers: int


@dataclass(frozen=True)
class Cell:
    """A column of one pipeline: its choice, one layer's price, its height in percent."""

    choice: Choice
    cost: LayerCost
    busy_s: float
    height: float


@dataclass(frozen=True)
class Column:
    """Consecutive equal layers that every pipeline treats alike, often just one."""

    name: str
    class_name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class MapRow:
    """A pipeline: (stage, devices, how many columns) in order, and a cell per column."""

    pipeline: int
    stages: tuple[tuple[str, str, int], ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class StrategyMap:
    """Which strategy each layer has in each pipeline; `choices` by place and layer name."""

    columns: tuple[Column, ...]
    rows: tuple[MapRow, ...]
    legend: tuple[Choice, ...]
    choices: dict[tuple[int, str], Choice]


@dataclass(frozen=True)
class CostRow:
    """Layers of one class, strategy and price, wherever they are.

    Attributes:
      layers: in the model's order, as text.
      class_name: theirs.
      choice: their strategy.
      stages: where they are.
      count: how many, over all pipelines.
      cost: one layer's price.
      busy_s: one layer's seconds in one micro-batch, nothing hidden.
      bars: where they come from, one scale for all rows.
    """

    layers: str
    class_name: str
    choice: Choice
    stages: tuple[str, ...]
    count: int
    cost: LayerCost
    busy_s: float
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class StageSum:
    """How a stage's layers add up to its step.

    Attributes:
      priced: the stage.
      terms_s: (forward, backward, tensor, gather, sync) of one micro-batch.
      hidden_s: of the gathers and gradient sums, what goes on behind compute.
      once_s: update and sum across pipelines, once a step.
      microbatch_s: one micro-batch, without what is done once a step.
    """

    priced: PricedStage
    terms_s: tuple[float, ...]
    hidden_s: float
    once_s: float
    microbatch_s: float


def strategy_map(
    stages: Sequence[PricedStage], graph: LayerGraph, most: int = MOST_COLUMNS
) -> StrategyMap:
    """Maps every layer of every pipeline to its strategy.

    Args:
      stages: of all pipelines.
      graph: the model.
      most: columns to draw at most before equal layers share one.
    """
    found = {
        (priced.pipeline, name): (_identity(strategy, priced.stage.mesh), priced)
        for priced in stages
        for name, strategy in strategies(priced.stage, graph).items()
    }
    legend = _legend([identity for identity, _ in found.values()])
    choices = {place: legend[identity] for place, (identity, _) in found.items()}
    prices = {
        (priced.pipeline, name): price for priced in stages for name, price in priced.cost.layers
    }
    pipelines = sorted({priced.pipeline for priced in stages})
    layers = [x for x in graph.layers if all((p, x.name) in prices for p in pipelines)]

    def alike(name: str) -> tuple[tuple[str, str], ...]:
        return tuple((found[p, name][1].name, choices[p, name].letter) for p in pipelines)

    keys = [
        (layer.class_name, alike(layer.name), 0 if len(layers) > most else i)
        for i, layer in enumerate(layers)
    ]
    columns = []
    for key, run in itertools.groupby(zip(keys, layers, strict=True), key=lambda pair: pair[0]):
        names = tuple(layer.name for _, layer in run)
        columns.append(Column(_run_name(names), key[0], names))
    busy = {place: busy_s(price) for place, price in prices.items()}
    most_s = max(busy.values(), default=0.0) or 1.0
    rows = []
    for p in pipelines:
        cells = [
            Cell(choices[p, n], prices[p, n], busy[p, n], 100 * busy[p, n] / most_s)
            for n in (column.layers[0] for column in columns)
        ]
        owners = [found[p, column.layers[0]][1] for column in columns]
        spans = [
            (owner.name, owner.devices, len(list(run))) for owner, run in itertools.groupby(owners)
        ]
        rows.append(MapRow(p, tuple(spans), tuple(cells)))
    return StrategyMap(tuple(columns), tuple(rows), tuple(legend.values()), choices)


def busy_s(price: LayerCost) -> float:
    """Seconds of one micro-batch if no traffic hid behind compute."""
    return math.fsum(terms_s(price))


def cost_rows(
    stages: Sequence[PricedStage], graph: LayerGraph, mapped: StrategyMap
) -> list[CostRow]:
    """A row per distinct (class, strategy, price), in the model's order."""
    order = {layer.name: i for i, layer in enumerate(graph.layers)}
    classes = {layer.name: layer.class_name for layer in graph.layers}
    groups: dict[tuple[str, Choice, LayerCost], list[tuple[str, str]]] = {}
    for priced in stages:
        for name, price in priced.cost.layers:
            key = classes[name], mapped.choices[priced.pipeline, name], price
            groups.setdefault(key, []).append((name, priced.name))
    most_s = max((busy_s(price) for _, _, price in groups), default=0.0) or 1.0
    rows = []
    first = {key: min(order[name] for name, _ in members) for key, members in groups.items()}
    for key in sorted(groups, key=first.__getitem__):
        class_name, choice, price = key
        members = groups[key]
        names = sorted({name for name, _ in members}, key=order.__getitem__)
        places = tuple(dict.fromkeys(place for _, place in members))
        bars, at = [], 0.0
        for kind, seconds in zip(TERMS, terms_s(price), strict=True):
            title = f"{class_name}: {time_text(seconds)} {TERMS[kind]}"
            bars.append(Bar(100 * at / most_s, 100 * seconds / most_s, kind, title))
            at += seconds
        rows.append(
            CostRow(
                summarise(names), class_name, choice, places, len(members), price,
                busy_s(price), tuple(bars),
            )
        )  # fmt: skip
    return rows


def stage_sums(stages: Sequence[PricedStage]) -> list[StageSum]:
    """Adds up each stage's layers; what is left over is traffic that hides behind compute."""
    sums = []
    for priced in stages:
        cost = priced.cost
        layers = [terms_s(price) for _, price in cost.layers]
        terms = tuple(math.fsum(column) for column in zip(*layers, strict=True))
        hidden_s = math.fsum((*terms, cost.moves_s, -cost.forward_s, -cost.backward_s))
        once_s = cost.update_s + cost.cross_s
        one_s = cost.microbatch_s - once_s / priced.microbatches
        # What is smaller is what rounding leaves of nothing.
        hidden_s = hidden_s if hidden_s > 1e-9 * one_s else 0.0
        sums.append(StageSum(priced, terms, hidden_s, once_s, one_s))
    return sums


def terms_s(price: LayerCost) -> tuple[float, float, float, float, float]:
    """Seconds of one micro-batch by where they come from, in the order of TERMS."""
    return price.forward_s, price.backward_s, price.tensor_s, price.gather_s, price.sync_s


def _identity(strategy: LayerStrategy, mesh: Mesh) -> tuple[str, str]:
    """What makes two layers' strategies one choice: the degrees, and the axes that serve them."""
    axes = [
        f"{name} over {', '.join(used)}"
        for name, used in (
            ("zero1", strategy.zero1), ("fsdp", strategy.fsdp), ("tp", strategy.tensor),
        )
        if used
    ]  # fmt: skip
    return describe(replace(strategy, layers=""), mesh), "; ".join(axes)


def _legend(identities: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Choice]:
    distinct = list(dict.fromkeys(identities))
    texts = [text for text, _ in distinct]
    legend = {}
    for i, (text, axes) in enumerate(distinct):
        # Axes are told only where the degrees alone do not tell two strategies apart.
        full = f"{text} ({axes or 'no axes'})" if texts.count(text) > 1 else text
        hue = _HUES[i] if i < len(_HUES) else i * 137.5 % 360
        tier = i // len(_HUES) % _TIERS
        legend[text, axes] = Choice(_letter(i), full, hue, tier, identities.count((text, axes)))
    return legend


def _letter(number: int) -> str:
    """A, B, … Z, AA, AB, … as in a spreadsheet.

    >>> _letter(0), _letter(25), _letter(26), _letter(52)
    ('A', 'Z', 'AA', 'BA')
    """
    text = ""
    while number >= 0:
        number, place = number // 26 - 1, number % 26
        text = chr(ord("A") + place) + text
    return text


def _run_name(names: tuple[str, ...]) -> str:
    text = summarise(names)
    return text if ", " not in text else f"{names[0]}..{names[-1]}"
