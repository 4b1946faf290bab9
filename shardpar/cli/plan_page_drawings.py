"""Decides where a plan's time and memory go on a page: bars in percent, for a template to draw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardpar.planner.cost import PlanCost
from shardpar.planner.prices import StageCost
from shardpar.planner.simulate import Event, Timeline
from shardpar.planner.trace_export import ranges_text
from shardpar.spec.plan import Plan, Stage

MOST_EVENTS = 2000
"""A timeline of more events is drawn with the middle of its lanes merged."""

ZOOMS = (1, 4, 16)
"""How many times the page's width a timeline can have."""

_PLOT_PX = 800
_FINER = {1: 0.2, 2: 0.5, 5: 1.0}


@dataclass(frozen=True)
class PricedStage:
    """A stage with its place in the plan and its price."""

    pipeline: int
    number: int
    microbatches: int
    stage: Stage
    cost: StageCost

    @property
    def name(self) -> str:
        """As the plan's table on the terminal has it."""
        return f"{self.pipeline}.{self.number}"

    @property
    def devices(self) -> str:
        """Its devices as text."""
        return ranges_text(self.stage.devices)


@dataclass(frozen=True)
class Bar:
    """A rectangle: `left` and `width` in percent of the picture, `zoom` at which its label fits."""

    left: float
    width: float
    kind: str
    title: str
    label: str = ""
    zoom: int = 1


@dataclass(frozen=True)
class Tick:
    """A time on the axis: `left` in percent; finer ones are for greater zooms."""

    left: float
    label: str
    zoom: int


@dataclass(frozen=True)
class Lane:
    """What one stage does in a step; `busy` is its share of the step."""

    name: str
    devices: str
    busy: float
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class TimelineDrawing:
    """A step's lanes and axis; `merged` of the `events` have no bar of their own."""

    lanes: tuple[Lane, ...]
    ticks: tuple[Tick, ...]
    events: int
    merged: int


@dataclass(frozen=True)
class MemoryRow:
    """A stage's bytes on its fullest device against the limit; `limit_left` in percent."""

    priced: PricedStage
    limit_bytes: float
    limit_left: float
    bars: tuple[Bar, ...]


def priced_stages(plan: Plan, cost: PlanCost) -> tuple[PricedStage, ...]:
    """The stages of all pipelines, each with its price."""
    places = [
        (p, s, pipeline.num_microbatches, stage)
        for p, pipeline in enumerate(plan.pipelines)
        for s, stage in enumerate(pipeline.stages)
    ]
    return tuple(
        PricedStage(*place, price) for place, price in zip(places, cost.stages, strict=True)
    )


def timeline_drawing(
    stages: Sequence[PricedStage], timeline: Timeline, most: int = MOST_EVENTS
) -> TimelineDrawing:
    """Lays a simulated step out as lanes of bars.

    Args:
      stages: of all pipelines.
      timeline: the step.
      most: bars to draw at most; where there are more events, each long lane keeps its
        first and last ones, and one bar of kind "merged" stands for those between.
    """
    step_s = timeline.step_s or 1.0
    of_lane: dict[tuple[int, int], list[Event]] = {(s.pipeline, s.number): [] for s in stages}
    for event in timeline.events:
        of_lane[event.pipeline, event.stage].append(event)
    # A lane needs one bar for what is merged and one on each side of it.
    room = max(3, most // len(stages)) if len(timeline.events) > most else len(timeline.events)
    lanes, drawn = [], 0
    for priced in stages:
        events = of_lane[priced.pipeline, priced.number]
        first = len(events) if len(events) <= room else room // 2
        last = len(events) if len(events) <= room else len(events) - (room - first - 1)
        bars = [_event_bar(event, priced, step_s) for event in (*events[:first], *events[last:])]
        drawn += len(bars)
        if middle := events[first:last]:
            bars.insert(first, _merged_bar(middle, priced, step_s))
        busy_s = math.fsum(event.end_s - event.start_s for event in events)
        lanes.append(Lane(priced.name, priced.devices, busy_s / step_s, tuple(bars)))
    events = len(timeline.events)
    return TimelineDrawing(tuple(lanes), tuple(_ticks(step_s)), events, events - drawn)


def memory_rows(stages: Sequence[PricedStage], limits_bytes: Sequence[float]) -> list[MemoryRow]:
    """A stacked bar per stage, all to one scale, which the greatest limit or peak sets."""
    scale = 100 / max(*limits_bytes, *(s.cost.peak_bytes for s in stages), 1.0) / 1.03
    rows = []
    for priced, limit in zip(stages, limits_bytes, strict=True):
        price = priced.cost
        parts = [
            ("state", price.state_bytes, "parameters, gradients and optimizer state"),
            ("saved", price.saved_bytes, "activations saved for the backward"),
            ("scratch", price.scratch_bytes, "scratch of the largest layer"),
        ]
        bars, at = [], 0.0
        for kind, size, meaning in parts:
            title = f"stage {priced.name}: {gib(size)} GiB of {meaning}"
            bars.append(Bar(at * scale, size * scale, kind, title))
            at += size
        rows.append(MemoryRow(priced, limit, limit * scale, tuple(bars)))
    return rows


def figure(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, but at most four decimals.

    >>> figure(0.0), figure(1234.5), figure(12.345), figure(0.012345), figure(1e-6)
    ('0', '1,234', '12.3', '0.0123', '<0.0001')
    >>> figure(-0.5)
    '−0.500'
    """
    if value == 0:
        return "0"
    decimals = max(0, min(4, digits - 1 - math.floor(math.log10(abs(value)))))
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else "<0.0001"


def gib(num_bytes: float) -> str:
    """Bytes in GiB, without the unit."""
    return figure(num_bytes / 2**30)


def time_text(seconds: float, digits: int = 4) -> str:
    """Seconds in the unit people read.

    >>> time_text(12.3456), time_text(0.0123456), time_text(3.2e-6), time_text(0.0)
    ('12.35 s', '12.35 ms', '3.200 µs', '0 s')
    """
    unit, size = _unit(seconds)
    return f"{figure(seconds / size, digits)} {unit}"


def _unit(seconds: float) -> tuple[str, float]:
    if seconds == 0 or abs(seconds) >= 1:
        return "s", 1.0
    return ("ms", 1e-3) if abs(seconds) >= 1e-3 else ("µs", 1e-6)


def _event_bar(event: Event, priced: PricedStage, step_s: float) -> Bar:
    left, width = 100 * event.start_s / step_s, 100 * (event.end_s - event.start_s) / step_s
    once = event.microbatch < 0
    label = event.kind if once else str(event.microbatch)
    needed = 7 * len(label) + 5
    zoom = next((z for z in ZOOMS if width / 100 * _PLOT_PX * z >= needed), 0)
    what = event.kind if once else f"{event.kind} of micro-batch {event.microbatch}"
    title = f"{what}, stage {priced.name}: {_span(event.start_s, event.end_s)}"
    return Bar(left, width, event.kind, title, label if zoom else "", zoom or 1)


def _merged_bar(events: Sequence[Event], priced: PricedStage, step_s: float) -> Bar:
    start_s, end_s = events[0].start_s, events[-1].end_s
    busy = math.fsum(event.end_s - event.start_s for event in events) / ((end_s - start_s) or 1.0)
    forwards = sum(event.kind == "forward" for event in events)
    title = (
        f"stage {priced.name}: {len(events):,} events merged, {forwards:,} forward, "
        f"{len(events) - forwards:,} others, busy {busy:.0%}: {_span(start_s, end_s)}"
    )
    left, width = 100 * start_s / step_s, 100 * (end_s - start_s) / step_s
    return Bar(left, width, "merged", title, f"{len(events):,} events, busy {busy:.0%}")


def _span(start_s: float, end_s: float) -> str:
    unit, size = _unit(end_s)
    start, end = figure(start_s / size, 5), figure(end_s / size, 5)
    return f"{start} to {end} {unit}, {time_text(end_s - start_s, 3)}"


def _ticks(step_s: float) -> Iterator[Tick]:
    """Round times, those of a coarser grid before the finer ones between them."""
    unit, size = _unit(step_s)
    total = step_s / size
    power = 10.0 ** math.floor(math.log10(total / 8))
    lead = next((m for m in (1, 2, 5) if total / (m * power) <= 9), 10)
    if lead == 10:
        lead, power = 1, power * 10
    seen: set[float] = set()
    for zoom in ZOOMS:
        step = lead * power
        for i in range(int(total / step * (1 + 1e-9)) + 1):
            left = round(100 * i * step / total, 6)
            if left not in seen:
                seen.add(left)
                yield Tick(left, f"{i * step:,.10g} {unit}" if i else "0", zoom)
        finer = _FINER[lead] * power
        power = 10.0 ** math.floor(math.log10(finer) + 1e-9)
        lead = round(finer / power)
