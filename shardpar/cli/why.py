"""Where a plan's milliseconds and bytes come from, and how another plan compares, on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from shardpar.planner.cost import PlanCost, fill_s
from shardpar.planner.prices import LayerCost
from shardpar.planner.strategies import describe
from shardpar.spec.graph import LayerGraph
from shardpar.spec.plan import Plan
from shardpar.spec.select import strategies, summarise

GIB = 2**30
TERMS = (
    ("forward", "forward_s"), ("backward", "backward_s"), ("tensor", "tensor_s"),
    ("gather", "gather_s"), ("sync", "sync_s"),
)  # fmt: skip
ONCE = (("update", "update_s"), ("pipelines", "cross_s"))
BYTES = (
    ("weights", "parameter_bytes"), ("gradients", "gradient_bytes"),
    ("optimizer", "optimizer_bytes"), ("saved", "saved_bytes"), ("scratch", "scratch_bytes"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Layers of one class under one strategy in one stage."""

    stage: str
    names: tuple[str, ...]
    strategy: str
    cost: LayerCost


def rows(plan: Plan, graph: LayerGraph, cost: PlanCost) -> tuple[Row, ...]:
    """A plan's layers, equal ones together, in order."""
    found: list[Row] = []
    prices = iter(cost.stages)
    for p, pipeline in enumerate(plan.pipelines):
        for s, stage in enumerate(pipeline.stages):
            chosen = strategies(stage, graph)
            for name, layer in next(prices).layers:
                text = describe(chosen[name], stage.mesh)
                last = found[-1] if found else None
                where = f"{p}.{s}"
                if last and (last.stage, last.strategy, last.cost) == (where, text, layer):
                    found[-1] = Row(where, (*last.names, name), text, layer)
                else:
                    found.append(Row(where, (name,), text, layer))
    return tuple(found)


def why_tables(plan: Plan, graph: LayerGraph, cost: PlanCost) -> tuple[Table, Table]:
    """Of each layer on one device: milliseconds per term, and GiB per term."""
    seconds = Table(
        title="ms of each layer: of one micro-batch; update and pipelines, of the step",
        title_justify="left",
    )
    space = Table(title="GiB of each layer: saved is of one micro-batch", title_justify="left")
    for table, terms in ((seconds, (*TERMS, *ONCE)), (space, BYTES)):
        for name in ("stage", "layers", "strategy"):
            table.add_column(name)
        for name, _ in terms:
            table.add_column(name, justify="right")
    for row in rows(plan, graph, cost):
        head = (row.stage, summarise(row.names), row.strategy)
        seconds.add_row(*head, *(_ms(getattr(row.cost, key)) for _, key in (*TERMS, *ONCE)))
        space.add_row(*head, *(f"{getattr(row.cost, key) / GIB:.3f}" for _, key in BYTES))
    return seconds, space


def why_lines(plan: Plan, cost: PlanCost) -> list[str]:
    """What no layer's row shows: moves between layouts and stages, what is hidden, the bubble."""
    lines = []
    prices = iter(cost.stages)
    for p, pipeline in enumerate(plan.pipelines):
        for s in range(len(pipeline.stages)):
            price = next(prices)
            layers = [layer for _, layer in price.layers]
            all_s = math.fsum(getattr(x, key) for x in layers for _, key in TERMS)
            hidden = all_s + price.moves_s - price.forward_s - price.backward_s
            lines.append(
                f"stage {p}.{s}: {_ms(price.microbatch_s)} ms a micro-batch = "
                f"{_ms(all_s)} of its layers - {_ms(max(0.0, hidden))} hidden behind compute + "
                f"{_ms(price.moves_s)} between layouts + {_ms(price.sent_s)} from the stage before "
                f"+ {_ms((price.update_s + price.cross_s) / pipeline.num_microbatches)} of the "
                "update"
            )
    return lines


def against_table(
    best: tuple[Plan, PlanCost], other: tuple[Plan, PlanCost], limit_bytes: float
) -> Table:
    """A plan beside the one that was found: seconds of a step per term, and bytes."""
    table = Table(title="the plan found, and yours", title_justify="left")
    table.add_column("")
    for name in ("found", "yours", "yours - found"):
        table.add_column(name, justify="right")
    sides = [_step_terms(*side) for side in (best, other)]
    for name, _ in sides[0]:
        values = [dict(side)[name] for side in sides]
        table.add_row(
            f"{name}, ms", *(f"{v * 1e3:,.1f}" for v in values),
            f"{(values[1] - values[0]) * 1e3:+,.1f}",
        )  # fmt: skip
    steps = [cost.step_s for _, cost in (best, other)]
    table.add_row(
        "step, ms", *(f"{v * 1e3:,.1f}" for v in steps), f"{(steps[1] - steps[0]) * 1e3:+,.1f}"
    )
    peaks = [cost.peak_bytes / GIB for _, cost in (best, other)]
    table.add_row(
        f"fullest device, GiB (limit {limit_bytes / GIB:.2f})",
        *(f"{v:.2f}" for v in peaks),
        f"{peaks[1] - peaks[0]:+.2f}",
    )
    return table


def verdict(best: tuple[Plan, PlanCost], other: tuple[Plan, PlanCost], limit_bytes: float) -> str:
    """In one sentence why the other plan is not the one to take, or that it is as good."""
    over = other[1].peak_bytes - limit_bytes
    if over > 0:
        return f"yours does not fit: its fullest device is {over / GIB:.2f} GiB over the limit"
    slower = other[1].step_s / best[1].step_s - 1
    if slower < -1e-9:
        return f"yours is {-slower:.1%} faster than the plan found; train with it by --plan"
    if slower <= 1e-9:
        return "yours is as fast as the plan found"
    terms = [
        (name, b - a)
        for (name, a), (_, b) in zip(_step_terms(*best), _step_terms(*other), strict=True)
    ]
    name, extra = max(terms, key=lambda term: term[1])
    return f"yours is {slower:.1%} slower, most of it in {name} ({extra * 1e3:+,.1f} ms)"


def _step_terms(plan: Plan, cost: PlanCost) -> Sequence[tuple[str, float]]:
    """Seconds per term over a step, of the busiest stage of the slowest pipeline."""
    prices = iter(cost.stages)
    worst: tuple[float, list[tuple[str, float]]] = (-1.0, [])
    for pipeline in plan.pipelines:
        count = pipeline.num_microbatches
        costs = [next(prices) for _ in pipeline.stages]
        fill = fill_s(pipeline, costs)
        for price in costs:
            layers = [layer for _, layer in price.layers]
            terms = [
                (name, count * math.fsum(getattr(x, key) for x in layers)) for name, key in TERMS
            ]
            hidden = math.fsum(s for _, s in terms) / count + price.moves_s
            hidden -= price.forward_s + price.backward_s
            terms += [
                ("hidden behind compute", -count * hidden),
                ("between layouts", count * price.moves_s),
                ("between stages", count * price.sent_s),
                *((name, math.fsum(getattr(x, key) for x in layers)) for name, key in ONCE),
                ("pipeline fill", fill),
            ]
            if price.step_s + fill > worst[0]:
                worst = (price.step_s + fill, terms)
    return worst[1]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}" if seconds else "-"
