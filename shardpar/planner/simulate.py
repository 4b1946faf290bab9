"""A plan's step played event by event: when each device group does what.

The planner's objective is a closed formula; this is what it stands for. A stage runs
its schedule's actions one after another; an action waits for its input to arrive
from the neighbour stage, and sending does not keep the sender from going on.
Gradients are summed across pipelines when all copies of a stage's layers are done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardpar.planner.cost import PlanCost
from shardpar.spec.plan import Pipeline, Plan
from shardpar.spec.schedule import Action, actions

EventKind = Literal["forward", "backward", "sync", "update"]


@dataclass(frozen=True)
class Event:
    """What one stage does from `start_s` to `end_s`; `microbatch` is -1 once a step."""

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
        played = _play(
            pipeline,
            [(price.forward_s, price.backward_s) for price in prices],
            [price.sent_s / 2 for price in prices],
        )
        ends.append([0.0] * len(pipeline.stages))
        for stage, action, start_s, end_s in played:
            events.append(Event(number, stage, action.kind, action.microbatch, start_s, end_s))
            ends[-1][stage] = max(ends[-1][stage], end_s)
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
    bubble = 1 - busy / (step_s * sum(sizes.values())) if step_s else 0.0
    return Timeline(
        tuple(sorted(events, key=lambda e: (e.start_s, e.pipeline, e.stage))), step_s, bubble
    )


def _play(
    pipeline: Pipeline, times: list[tuple[float, float]], arrive_s: list[float]
) -> list[tuple[int, Action, float, float]]:
    """(stage, action, start, end) of a pipeline's step; arrive_s[s] from stage s - 1 to s."""
    depth, count = len(pipeline.stages), pipeline.num_microbatches
    queues = [list(actions(pipeline.schedule, depth, s, count)) for s in range(depth)]
    done: dict[tuple[str, int, int], float] = {}
    free = [0.0] * depth
    out: list[tuple[int, Action, float, float]] = []
    position = [0] * depth
    waiting = sum(map(len, queues))
    while waiting:
        progressed = False
        for stage in range(depth):
            while position[stage] < len(queues[stage]):
                action = queues[stage][position[stage]]
                ready = _ready(action, stage, depth, done, arrive_s)
                if ready is None:
                    break
                start_s = max(free[stage], ready)
                end_s = start_s + times[stage][0 if action.kind == "forward" else 1]
                free[stage] = end_s
                done[action.kind, stage, action.microbatch] = end_s
                out.append((stage, action, start_s, end_s))
                position[stage] += 1
                waiting -= 1
                progressed = True
        assert progressed, "a schedule waits for itself"
    return out


def _ready(
    action: Action,
    stage: int,
    depth: int,
    done: dict[tuple[str, int, int], float],
    arrive_s: list[float],
) -> float | None:
    """When an action's input is there; None if what makes it has not run."""
    if action.kind == "forward":
        if stage == 0:
            return 0.0
        before = done.get(("forward", stage - 1, action.microbatch))
        return None if before is None else before + arrive_s[stage]
    own = done.get(("forward", stage, action.microbatch))
    if own is None or stage == depth - 1:
        return own
    after = done.get(("backward", stage + 1, action.microbatch))
    return None if after is None else after + arrive_s[stage + 1]
