"""A plan's step played event by event: when each device group does what.

The planner's objective is a closed formula; this is what it stands for. A stage runs
its schedule's actions one after another; an action waits for its input to arrive
from the neighbour stage, and sending does not keep the sender from going on.
Gradients are summed across pipelines when all copies of a stage's layers are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardpar.planner.cost import PlanCost
from shardpar.planner.prices import StageCost
from shardpar.spec.plan import Pipeline, Plan
from shardpar.spec.schedule import play

EventKind = Literal["forward", "backward", "ends", "sync", "update"]


@dataclass(frozen=True)
class Event:
    """What one stage does from `start_s` to `end_s`; `microbatch` is -1 once a step.

    "ends" is a stage's share of the first and last layers of a single_jit pipeline.
    """

    pipeline: int
    stage: int
    kind: EventKind
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step.

    Attributes:
      events: in order of their start.
      step_s: when the last one ends.
      bubble: share of the stages' time in which they wait, weighed by their devices.
    """

    events: tuple[Event, ...]
    step_s: float
    bubble: float


def simulate(plan: Plan, cost: PlanCost) -> Timeline:
    """Plays one step.

    Args:
      plan: the plan.
      cost: its price, from `plan_cost`.

    Returns:
      Every event, and the step's seconds.
    """
    stages = iter(cost.stages)
    events: list[Event] = []
    ends: list[list[float]] = []
    for number, pipeline in enumerate(plan.pipelines):
        prices = [next(stages) for _ in pipeline.stages]
        if pipeline.schedule == "single_jit":
            found, end_s = _lockstep(number, pipeline, prices)
            events += found
            ends.append([end_s] * len(pipeline.stages))
            continue
        played = play(
            pipeline,
            [(price.forward_s, price.backward_s) for price in prices],
            [price.sent_s / 2 for price in prices],
        )
        ends.append([0.0] * len(pipeline.stages))
        for turn in played:
            stage, action = turn.stage, turn.action
            events.append(
                Event(number, stage, action.kind, action.microbatch, turn.start, turn.end)
            )
            ends[-1][stage] = max(ends[-1][stage], turn.end)
    stages = iter(cost.stages)
    last = max(end for row in ends for end in row)
    for number, pipeline in enumerate(plan.pipelines):
        for stage in range(len(pipeline.stages)):
            price = next(stages)
            at = ends[number][stage]
            if price.cross_s:
                # Which stages hold the same layers differs by pipeline: wait for all.
                start_s = max(at, last)
                at = start_s + price.cross_s
                events.append(Event(number, stage, "sync", -1, start_s, at))
            if price.update_s:
                events.append(Event(number, stage, "update", -1, at, at + price.update_s))
    step_s = max(event.end_s for event in events)
    sizes = {
        (p, s): len(stage.devices)
        for p, pipeline in enumerate(plan.pipelines)
        for s, stage in enumerate(pipeline.stages)
    }
    busy = sum((e.end_s - e.start_s) * sizes[e.pipeline, e.stage] for e in events)
    bubble = 1 - busy / (step_s * len(plan.devices)) if step_s else 0.0
    return Timeline(
        tuple(sorted(events, key=lambda e: (e.start_s, e.pipeline, e.stage))), step_s, bubble
    )


def _lockstep(
    number: int, pipeline: Pipeline, prices: Sequence[StageCost]
) -> tuple[list[Event], float]:
    """All stages tick by tick, each tick as long as the slowest takes and what it hands on.

    Between the ways, where the loss is, each stage does its share of the first and last layers.
    """
    count, stages = pipeline.num_microbatches, len(prices)
    hop_s = max(price.sent_s for price in prices) / 2
    events: list[Event] = []
    at = 0.0
    ways: tuple[tuple[EventKind, list[float]], ...] = (
        ("forward", [price.forward_s for price in prices]),
        ("backward", [price.backward_s for price in prices]),
    )
    for kind, seconds in ways:
        tick_s = max(seconds) + hop_s
        for tick in range(count + stages - 1):
            for stage in range(stages):
                microbatch = tick - (stage if kind == "forward" else stages - 1 - stage)
                if 0 <= microbatch < count:
                    start_s = at + tick * tick_s
                    end_s = start_s + seconds[stage]
                    events.append(Event(number, stage, kind, microbatch, start_s, end_s))
        at += (count + stages - 1) * tick_s
        if kind == "forward" and any(price.ends_s for price in prices):
            shares = [count * price.ends_s for price in prices]
            events += [Event(number, s, "ends", -1, at, at + x) for s, x in enumerate(shares)]
            at += max(shares)
    return events, at
