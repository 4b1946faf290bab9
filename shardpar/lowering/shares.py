"""What each pipeline gets of a step: its micro-batches, on their devices, and all tasks in order.

Pipelines may have other numbers of micro-batches in each step. Tasks are found anew for each
combination of numbers and kept; programs are compiled for the shape of a micro-batch, which
stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from shardpar.errors import PlanError
from shardpar.lowering.device_groups import GroupPrograms
from shardpar.lowering.elsewhere import placed
from shardpar.lowering.microbatches import require_batch
from shardpar.spec.plan import Pipeline, Plan
from shardpar.spec.schedule import Task, tasks

Placed = list[list[dict[int, dict[str, jax.Array]]]]
"""By pipeline and micro-batch, the arrays of each stage."""


@dataclass(frozen=True)
class Order:
    """The tasks of a step.

    Attributes:
      tasks: as they are dispatched.
      before: by pipeline, how many micro-batches of the step come before its first.
      total: micro-batches of all pipelines.
    """

    tasks: tuple[Task, ...]
    before: tuple[int, ...]
    total: int

    @classmethod
    def of(cls, pipelines: Sequence[Pipeline], counts: Sequence[int]) -> Order:
        """Of a step in which the pipelines have so many micro-batches; some may have none."""
        before = tuple(sum(counts[:n]) for n in range(len(counts)))
        return cls(tasks(pipelines, counts), before, sum(counts))


def shares_of(batch: Mapping[str, Any], plan: Plan) -> list[dict[str, Any]]:
    """A batch cut as the plan says: the pipelines take their sequences in the plan's order."""
    out, start = [], 0
    for pipeline in plan.pipelines:
        rows = slice(start, start + pipeline.sequences)
        start += pipeline.sequences
        out.append({name: array[rows] for name, array in batch.items()})
    return out


def counts_of(
    shares: Sequence[Mapping[str, Any]], plan: Plan, shapes: Sequence[Mapping[str, Any]]
) -> tuple[int, ...]:
    """How many micro-batches each pipeline gets.

    Args:
      shares: of each pipeline, arrays whose dim 0 counts sequences.
      plan: its pipelines.
      shapes: of each pipeline's captured batch; only dim 0 may differ.

    Raises:
      CaptureError: an array is missing.
      PlanError: an array has another shape, or a share is not in whole micro-batches.
    """
    if len(shares) != len(plan.pipelines):
        raise PlanError(
            f"{len(shares)} shares of a step were given to {len(plan.pipelines)} pipelines; give "
            "one for each, of no sequences where a pipeline gets none"
        )
    counts = []
    for number, (share, pipeline) in enumerate(zip(shares, plan.pipelines, strict=True)):
        rows = next(iter(share.values())).shape[0] if share else 0
        if rows:
            require_batch(share, shapes[number], rows)
        turn = pipeline.microbatch
        if pipeline.schedule == "interleaved":
            turn *= pipeline.num_groups
        if rows % turn:
            raise PlanError(
                f"pipeline {number} was given {rows} sequences, and takes them {turn} at a time; "
                "fill up with rows whose weights are 0"
            )
        counts.append(rows // pipeline.microbatch)
    if not any(counts):
        raise PlanError("a step of no sequences was asked for; give one or more")
    return tuple(counts)


def place(
    shares: Sequence[Mapping[str, Any]],
    counts: Sequence[int],
    plan: Plan,
    group_of: Mapping[tuple[int, int], GroupPrograms],
) -> Placed:
    """Puts each pipeline's micro-batches on the devices of the stages that read them.

    Args:
      shares: of each pipeline, arrays whose dim 0 is its micro-batch times its count.
      counts: micro-batches of each.
      plan: its pipelines.
      group_of: the group of each (pipeline, stage).
    """
    values, targets, places = [], [], []
    out: Placed = []
    for number, (share, pipeline) in enumerate(zip(shares, plan.pipelines, strict=True)):
        out.append([])
        for m in range(counts[number]):
            rows = slice(m * pipeline.microbatch, (m + 1) * pipeline.microbatch)
            out[-1].append({})
            for s in range(len(pipeline.stages)):
                out[-1][m][s] = {}
                group = group_of[number, s]
                if not group.is_here:
                    continue
                for name, shape in group.stages[s].batch.items():
                    values.append(np.asarray(share[name][rows]))
                    targets.append(shape.sharding)
                    places.append((number, m, s, name))
    for (number, m, s, name), array in zip(places, placed(values, targets), strict=True):
        out[number][m][s][name] = array
    return out
