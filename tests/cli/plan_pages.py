"""Priced plans to draw, and a page as a browser meets it: tags, tables, drawings and words."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any, NamedTuple
from xml.etree import ElementTree

from shardpar.cli.plan_page import Compiled, plan_page
from shardpar.planner.cost import PlanCost, plan_cost
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import Timeline, simulate
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from tests.planner.cases import cluster_of, gpt


class Planned(NamedTuple):
    plan: Plan
    graph: LayerGraph
    cost: PlanCost
    timeline: Timeline
    limits: tuple[float, ...]

    def page(self, compiled: Compiled | None = None) -> str:
        return plan_page(*self, compiled)


def planned(plan: Plan, graph: LayerGraph, limit_bytes: float = 1e8) -> Planned:
    cluster = cluster_of(8, -(-len(plan.devices) // 8))
    cost = plan_cost(plan, graph, cluster, Workload(plan.global_batch))
    limits = tuple(limit_bytes * (1 + i / 10) for i in range(len(cost.stages)))
    return Planned(plan, graph, cost, simulate(plan, cost), limits)


def deep(blocks: int) -> LayerGraph:
    """The demo model with more blocks."""
    layers = gpt().layers
    more = (replace(layers[1], name=f"blocks[{i}]", path=f"blocks.{i}") for i in range(blocks))
    return replace(gpt(), layers=(layers[0], *more, *layers[5:]))


def long_pipeline(microbatches: int, blocks: int = 29, stages: int = 8) -> Planned:
    graph = deep(blocks)
    names = [layer.name for layer in graph.layers]
    edges = [round(i * len(names) / stages) for i in range(stages + 1)]
    built = tuple(
        Stage(
            (2 * s, 2 * s + 1), Mesh.factored(2),
            (LayerStrategy(f"{names[edges[s]]}..{names[edges[s + 1] - 1]}", tensor=("a",)),),
        )
        for s in range(stages)
    )  # fmt: skip
    pipeline = Pipeline(2 * microbatches, 2, built)
    return planned(Plan("deep", 2 * microbatches, (pipeline,)), graph)


class Page(HTMLParser):
    """Collects what is on a page.

    `tiles` are the headline figures by name; a table's cells are their attributes with
    `tag`, `text` and, where there is a figure, its exact `value`.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.tiles: dict[str, float] = {}
        self.tables: dict[str, list[list[dict[str, Any]]]] = {}
        self._open: list[str] = []
        self._cell: dict[str, Any] | None = None
        self._term = ""
        self.feed(text)
        assert self._open == []
        self.drawings = [
            ElementTree.fromstring(svg) for svg in re.findall(r"<svg\b.*?</svg>", text, re.DOTALL)
        ]

    def handle_starttag(self, tag, attrs):
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag not in {"meta", "input"}:
            self._open.append(tag)
        if tag == "dt":
            self._term = ""
        elif tag == "table":
            self.tables[attributes["class"].split()[-1]] = []
        elif tag == "tr":
            self._table().append([])
        elif tag in {"td", "th"}:
            self._cell = attributes | {"tag": tag, "text": ""}
            self._table()[-1].append(self._cell)
        elif tag == "data" and self._cell is not None:
            self._cell["value"] = float(attributes["value"])
        elif tag == "data":
            self.tiles[self._term] = float(attributes["value"])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag in {"td", "th"}:
            self._cell = None

    def handle_data(self, data):
        if "style" in self._open or "svg" in self._open:
            return
        self.text += data
        if self._open and self._open[-1] == "dt":
            self._term += data
        if self._cell is not None:
            self._cell["text"] += data

    def _table(self) -> list[list[dict[str, Any]]]:
        return self.tables[list(self.tables)[-1]]

    def rows(self, table: str) -> list[list[dict[str, Any]]]:
        """The rows of a table that are about something."""
        return [row for row in self.tables[table] if row[0].get("scope") == "row"]

    def plot(self) -> ElementTree.Element:
        """The timeline."""
        (plot,) = (svg for svg in self.drawings if svg.get("class") == "plot")
        return plot

    def lanes(self) -> list[list[ElementTree.Element]]:
        """The timeline's bars, lane by lane."""
        groups = (g for g in self.plot().iter("g") if (g.get("class") or "").startswith("lane"))
        return [g.findall("rect") for g in groups]


def percent(text: str | None) -> float:
    """A place or size in a drawing."""
    assert text is not None
    assert text.endswith("%")
    return float(text[:-1])
