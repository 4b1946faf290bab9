"""Turns a plan into one page that needs no network: when, where and how its layers run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from shardpar import __version__
from shardpar.cli.plan_page_drawings import (
    ZOOMS,
    Bar,
    PricedStage,
    figure,
    gib,
    memory_rows,
    priced_stages,
    time_text,
    timeline_drawing,
)
from shardpar.cli.plan_page_layers import TERMS, cost_rows, stage_sums, strategy_map
from shardpar.cli.tables import byte_text
from shardpar.planner.cost import PlanCost
from shardpar.planner.simulate import Timeline
from shardpar.planner.trace_export import ranges_text
from shardpar.spec.graph import LayerGraph
from shardpar.spec.plan import Plan


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of the plan, on its fullest device.

    Attributes:
      target: for which devices, "8 x H100".
      argument_bytes: state and batch.
      temp_bytes: scratch, saved activations included.
      predicted_bytes: what the planner predicted for the two together.
      collectives: (kind, group size, runs per step, bytes per device) rows.
    """

    target: str
    argument_bytes: float
    temp_bytes: float
    predicted_bytes: float
    collectives: tuple[tuple[str, int, int, int], ...]

    @property
    def total_bytes(self) -> float:
        """State, batch and scratch."""
        return self.argument_bytes + self.temp_bytes

    @property
    def bars(self) -> tuple[tuple[Bar, ...], tuple[Bar, ...]]:
        """The predicted and the compiled bytes as bars to one scale."""
        scale = 100 / max(self.predicted_bytes, self.total_bytes, 1.0)
        state = self.argument_bytes * scale
        scratch = Bar(state, self.temp_bytes * scale, "scratch", "scratch by the compiler")
        return (
            (Bar(0, self.predicted_bytes * scale, "predicted", "predicted by the planner"),),
            (Bar(0, state, "state", "state and batch by the compiler"), scratch),
        )


@dataclass(frozen=True)
class Tile:
    """One of the figures that people look for first; `exact` for those who compare pages."""

    name: str
    text: str
    note: str = ""
    exact: float | None = None


def plan_page(
    plan: Plan,
    graph: LayerGraph,
    cost: PlanCost,
    timeline: Timeline,
    limits_bytes: Sequence[float],
    compiled: Compiled | None = None,
) -> str:
    """Makes the page of a plan; every name in it is escaped.

    Args:
      plan: a checked plan.
      graph: the model.
      cost: the plan's price, from `plan_cost`.
      timeline: its step, from `simulate`.
      limits_bytes: memory that each stage's devices may use, in the order of `cost.stages`.
      compiled: what a compiler made of it; None says that nothing was verified.

    Returns:
      HTML without a script or a single reference to anything outside itself.

    Raises:
      ValueError: there is not one limit per stage.
    """
    stages = priced_stages(plan, cost)
    mapped = strategy_map(stages, graph)
    templates = Environment(
        loader=PackageLoader("shardpar.cli", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"figure": figure, "gib": gib, "time": time_text, "bytes": byte_text}
    templates.filters["counted"] = _counted
    return templates.get_template("plan_page.html.j2").render(
        plan=plan,
        graph=graph,
        shape=shape(plan),
        tiles=tiles(plan, cost, timeline, max(stages, key=lambda stage: stage.cost.peak_bytes)),
        stages=stages,
        timeline=timeline,
        drawing=timeline_drawing(stages, timeline),
        zooms=ZOOMS,
        memory=memory_rows(stages, limits_bytes),
        mapped=mapped,
        terms=TERMS,
        cost_rows=cost_rows(stages, graph, mapped),
        stage_sums=stage_sums(stages),
        compiled=compiled,
        version=__version__,
    )


def shape(plan: Plan) -> list[str]:
    """How a plan is built, a line for all pipelines that are built alike."""
    alike: dict[str, list[int]] = {}
    for p, pipeline in enumerate(plan.pipelines):
        parts = [
            _counted(len(pipeline.stages), "stage"),
            _counted(pipeline.num_microbatches, "micro-batch", "micro-batches")
            + f" of {_counted(pipeline.microbatch, 'sequence')}",
        ]
        if len(pipeline.stages) > 1:
            parts.append(f"{pipeline.schedule} schedule")
        alike.setdefault(", ".join(parts), []).append(p)
    devices = _counted(len(plan.devices), "device")
    if len(plan.pipelines) == 1:
        return [f"{devices}, {text}" for text in alike]
    pipelines = _counted(len(plan.pipelines), "pipeline")
    return [f"{devices}, {pipelines}"] + [
        f"pipeline{'s' if len(numbers) > 1 else ''} {ranges_text(tuple(numbers))}: {text}"
        for text, numbers in alike.items()
    ]


def tiles(plan: Plan, cost: PlanCost, timeline: Timeline, fullest: PricedStage) -> tuple[Tile, ...]:
    """Picks the figures that people look for first.

    Args:
      plan: the plan; one written by hand has no objective, so no certificate.
      cost: its price.
      timeline: its simulated step.
      fullest: the stage with the highest peak.
    """
    objective = plan.objective
    by_hand = "the plan was written by hand"
    found = [Tile("Predicted step", time_text(cost.step_s), "by the cost model", cost.step_s)]
    if objective is None:
        found.append(Tile("Certified gap", "none", by_hand))
        found.append(Tile("Lower bound", "none", by_hand))
        found.append(Tile("Search", "none", by_hand))
    else:
        gap = "no plan searched is faster" if objective.gap == 0 else "at most this much faster"
        bound = "no plan searched beats it"
        found += [
            Tile("Certified gap", _percent(objective.gap), gap, objective.gap),
            Tile("Lower bound", time_text(objective.lower_bound_s), bound, objective.lower_bound_s),
            Tile(
                "Search", time_text(objective.search_s, 3), "to find the plan", objective.search_s
            ),
        ]
    simulated = f"of {time_text(timeline.step_s)} simulated"
    found += [
        Tile("Bubble", _percent(timeline.bubble), simulated, timeline.bubble),
        Tile("Global batch", f"{plan.global_batch:,}", "sequences a step", plan.global_batch),
        Tile(
            "Peak memory", f"{gib(cost.peak_bytes)} GiB", f"in stage {fullest.name}",
            cost.peak_bytes,
        ),
    ]  # fmt: skip
    return tuple(found)


def _percent(share: float) -> str:
    """A share in percent, so that one that is not 0 does not look like it.

    >>> _percent(0.0), _percent(0.1234), _percent(0.00001)
    ('0%', '12.3%', '<0.01%')
    """
    # Rounding leaves tiny shares, and tiny negative ones, of nothing.
    if share < 1e-9:
        return "0%"
    if share < 1e-4:
        return "<0.01%"
    return f"{figure(100 * share)}%"


def _counted(count: int, one: str, many: str = "") -> str:
    """A number with its noun.

    >>> _counted(1, "stage"), _counted(1200, "stage")
    ('1 stage', '1,200 stages')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"
