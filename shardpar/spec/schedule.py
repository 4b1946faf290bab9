"""In which order the device groups of a plan run the forwards and backwards of its micro-batches.

The simulator plays these lists and the executor dispatches the same ones. GPipe is
arXiv 1811.06965; 1F1B is PipeDream-Flush (Narayanan et al., arXiv 2006.09503); interleaved
1F1B, where a group holds several stages far apart, is Megatron-LM's (arXiv 2104.04473).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from shardpar.errors import PlanError
from shardpar.spec.plan import Pipeline, Schedule

Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class Action:
    """One micro-batch through one stage, one way.

    `chunk` counts the stages of one group: of the stages `g`, `g + groups`, ... that group g
    holds, the first is chunk 0.
    """

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        name = f"{'F' if self.kind == 'forward' else 'B'}{self.microbatch}"
        return f"{name}.{self.chunk}" if self.chunk else name


@dataclass(frozen=True)
class Task:
    """An action of a plan: which pipeline, which of its stages, which way, which micro-batch."""

    pipeline: int
    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        way = "F" if self.kind == "forward" else "B"
        return f"{way}{self.microbatch}@{self.pipeline}.{self.stage}"


@dataclass(frozen=True)
class Played:
    """When a stage does an action, in the unit of the times that were given."""

    stage: int
    action: Action
    start: float
    end: float


def actions(
    schedule: Schedule, groups: int, group: int, microbatches: int, chunks: int = 1
) -> tuple[Action, ...]:
    """What one group of devices does, in order.

    Args:
      schedule: "1f1b", "gpipe", "interleaved" or "single_jit".
      groups: how many groups the pipeline has.
      group: which one, 0 the first.
      microbatches: of one step.
      chunks: stages per group; more than one only where the schedule is interleaved.

    Raises:
      PlanError: there is no such group, no micro-batch, or a schedule without chunks has some.

    >>> " ".join(map(str, actions("1f1b", 3, 0, 4)))
    'F0 F1 F2 B0 F3 B1 B2 B3'
    >>> " ".join(map(str, actions("gpipe", 3, 0, 2)))
    'F0 F1 B0 B1'
    >>> " ".join(map(str, actions("interleaved", 2, 1, 2, 2)))
    'F0 F1 F0.1 B0.1 F1.1 B1.1 B0 B1'
    """
    if not 0 <= group < groups or microbatches < 1:
        raise PlanError(
            f"no schedule for stage {group} of {groups} with {microbatches} micro-batches; "
            f"stages count from 0 to {groups - 1}, and there is at least one micro-batch"
        )
    if chunks != 1 and schedule != "interleaved":
        raise PlanError(f"schedule {schedule} has one stage per group; write interleaved")
    return _actions(schedule, groups, group, microbatches, chunks)


@lru_cache(maxsize=1024)
def _actions(
    schedule: Schedule, groups: int, group: int, microbatches: int, chunks: int
) -> tuple[Action, ...]:
    forward, backward = _ways(groups if schedule == "interleaved" else 1, microbatches, chunks)
    if schedule in ("gpipe", "single_jit"):
        ahead = microbatches
    elif schedule == "1f1b":
        ahead = groups - group - 1
    else:
        ahead = 2 * (groups - group - 1) + (chunks - 1) * groups
    ahead = min(ahead, len(forward))
    order = list(forward[:ahead])
    for i, back in enumerate(backward):
        order += forward[ahead + i : ahead + i + 1]
        order.append(back)
    return tuple(order)


def _ways(together: int, microbatches: int, chunks: int) -> tuple[list[Action], list[Action]]:
    """A group's forwards and its backwards: `together` micro-batches per chunk at a time."""
    forward: list[Action] = []
    backward: list[Action] = []
    for first in range(0, microbatches, together):
        batch = range(first, min(first + together, microbatches))
        forward += [Action("forward", i, c) for c in range(chunks) for i in batch]
        backward += [Action("backward", i, c) for c in reversed(range(chunks)) for i in batch]
    return forward, backward


def held(
    schedule: Schedule, groups: int, group: int, microbatches: int, chunks: int = 1, chunk: int = 0
) -> int:
    """Micro-batches whose activations a group holds at once, at most, of one of its stages.

    >>> [held("1f1b", 4, s, 8) for s in range(4)], held("gpipe", 4, 0, 8)
    ([4, 3, 2, 1], 8)
    >>> held("single_jit", 4, 0, 8)
    11
    """
    if schedule == "single_jit":
        # In lockstep a stage computes, and keeps, something on every tick.
        return microbatches + groups - 1
    if schedule == "gpipe":
        return microbatches
    if schedule == "1f1b":
        return min(microbatches, groups - group)
    now = most = 0
    for action in actions(schedule, groups, group, microbatches, chunks):
        if action.chunk == chunk:
            now += 1 if action.kind == "forward" else -1
            most = max(most, now)
    return most


def play(
    pipeline: Pipeline, times: Sequence[tuple[float, float]], arrive: Sequence[float]
) -> list[Played]:
    """One step of a pipeline, each group doing its actions in order as their inputs arrive.

    Args:
      pipeline: its stages, groups, micro-batches and schedule.
      times: of each stage, a forward and a backward.
      arrive: what it takes from stage s - 1 to stage s, and back.

    Raises:
      PlanError: the schedule waits for itself.
    """
    depth, groups, count = len(pipeline.stages), pipeline.num_groups, pipeline.num_microbatches
    queues = [actions(pipeline.schedule, groups, g, count, pipeline.chunks) for g in range(groups)]
    done: dict[tuple[Kind, int, int], float] = {}
    free, position = [0.0] * groups, [0] * groups
    out: list[Played] = []
    waiting = sum(map(len, queues))
    while len(out) < waiting:
        before = len(out)
        for group, queue in enumerate(queues):
            while position[group] < len(queue):
                action = queue[position[group]]
                stage = group + action.chunk * groups
                ready = _ready(action, stage, depth, done, arrive)
                if ready is None:
                    break
                start = max(free[group], ready)
                end = start + times[stage][0 if action.kind == "forward" else 1]
                free[group] = done[action.kind, stage, action.microbatch] = end
                out.append(Played(stage, action, start, end))
                position[group] += 1
        if len(out) == before:
            raise PlanError(
                f"a pipeline of {groups} groups, {pipeline.chunks} stages each, waits for itself "
                f"with {count} micro-batches; use a multiple of {groups} micro-batches"
            )
    return out


def _ready(
    action: Action,
    stage: int,
    depth: int,
    done: dict[tuple[Kind, int, int], float],
    arrive: Sequence[float],
) -> float | None:
    """When an action's input is there; None if what makes it has not run."""
    if action.kind == "forward":
        if stage == 0:
            return 0.0
        before = done.get(("forward", stage - 1, action.microbatch))
        return None if before is None else before + arrive[stage]
    own = done.get(("forward", stage, action.microbatch))
    if own is None or stage == depth - 1:
        return own
    after = done.get(("backward", stage + 1, action.microbatch))
    return None if after is None else max(own, after + arrive[stage + 1])


def tasks(pipelines: Iterable[Pipeline], counts: Sequence[int] | None = None) -> tuple[Task, ...]:
    """All actions of a step in one order in which none stands before what it waits for.

    It depends on the plan alone, so that every process of a cluster finds the same: each runs
    what is its own, and none waits for a task that another has behind one that waits for it.

    Args:
      pipelines: of the plan.
      counts: micro-batches of each in this step, 0 where it has none; None takes the plan's.

    Raises:
      PlanError: an interleaved pipeline has a number that its groups do not divide.

    >>> from shardpar.spec.mesh import Mesh
    >>> from shardpar.spec.plan import LayerStrategy, Stage
    >>> stages = tuple(Stage((d,), Mesh(), (LayerStrategy(f"blocks[{d}]"),)) for d in (0, 1))
    >>> " ".join(map(str, tasks([Pipeline(2, 1, stages)])))
    'F0@0.0 F1@0.0 F0@0.1 B0@0.1 B0@0.0 F1@0.1 B1@0.1 B1@0.0'
    """
    timed = []
    for number, pipeline in enumerate(pipelines):
        if counts is not None:
            if not counts[number]:
                continue
            sequences = counts[number] * pipeline.microbatch
            pipeline = replace(pipeline, sequences=sequences)
        depth = len(pipeline.stages)
        for played in play(pipeline, [(1.0, 2.0)] * depth, [0.0] * depth):
            task = Task(number, played.stage, played.action.kind, played.action.microbatch)
            timed.append((played.start, number, played.stage, task))
    return tuple(task for *_, task in sorted(timed, key=lambda row: row[:3]))


def digest(order: Iterable[Task]) -> str:
    """A short name of an order of tasks, for processes to compare before they start.

    >>> digest([Task(0, 0, "forward", 0)]) == digest([Task(0, 0, "backward", 0)])
    False
    """
    return hashlib.sha256(" ".join(map(str, order)).encode()).hexdigest()[:16]
