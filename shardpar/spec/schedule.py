"""In which order a stage runs the forwards and backwards of its micro-batches.

The simulator plays these lists and the executor dispatches the same ones. 1F1B is
PipeDream-Flush (Narayanan et al., arXiv 2006.09503), GPipe is arXiv 1811.06965.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardpar.errors import PlanError
from shardpar.spec.plan import Schedule

Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class Action:
    """One micro-batch through one stage, one way."""

    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{'F' if self.kind == 'forward' else 'B'}{self.microbatch}"


def actions(schedule: Schedule, stages: int, stage: int, microbatches: int) -> tuple[Action, ...]:
    """What one stage does, in order.

    Args:
      schedule: "1f1b" or "gpipe".
      stages: how many the pipeline has.
      stage: which one, 0 the first.
      microbatches: of one step.

    Raises:
      PlanError: there is no such stage, or no micro-batch.

    >>> " ".join(map(str, actions("1f1b", 3, 0, 4)))
    'F0 F1 F2 B0 F3 B1 B2 B3'
    >>> " ".join(map(str, actions("gpipe", 3, 0, 2)))
    'F0 F1 B0 B1'
    """
    if not 0 <= stage < stages or microbatches < 1:
        raise PlanError(
            f"no schedule for stage {stage} of {stages} with {microbatches} micro-batches; "
            f"stages count from 0 to {stages - 1}, and there is at least one micro-batch"
        )
    ahead = microbatches if schedule == "gpipe" else min(microbatches, stages - stage - 1)
    order = [Action("forward", i) for i in range(ahead)]
    for i in range(microbatches):
        if ahead + i < microbatches:
            order.append(Action("forward", ahead + i))
        order.append(Action("backward", i))
    return tuple(order)


def held(schedule: Schedule, stages: int, stage: int, microbatches: int) -> int:
    """Micro-batches whose activations a stage holds at once, at most.

    >>> [held("1f1b", 4, s, 8) for s in range(4)], held("gpipe", 4, 0, 8)
    ([4, 3, 2, 1], 8)
    """
    return microbatches if schedule == "gpipe" else min(microbatches, stages - stage)
