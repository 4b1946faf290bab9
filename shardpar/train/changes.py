"""Which plan a step is computed under: the run's own, plans in turn, or one asked for.

Programs of plans that come back are kept, so a schedule compiles each plan once
(hot switching: HotSPa, SOSP 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardpar.capture.trace import Captured
from shardpar.errors import PlanError
from shardpar.spec.plan import Plan
from shardpar.train.compile import read_plan
from shardpar.train.requests import Change, Requests


@dataclass(frozen=True)
class PlanChanges:
    """Decides after each step whether another plan takes over.

    Attributes:
      schedule: plans in turn; none keeps the plan in force.
      every: steps each of them is in force.
      requests: by hand; the first that is answered ends the schedule.

    >>> changes = PlanChanges(("a", "b"), 5)
    >>> [getattr(changes.at(step, "a"), "plan", "-") for step in (0, 4, 5, 9, 10)]
    ['-', '-', 'b', 'b', '-']
    """

    schedule: tuple[Plan, ...] = ()
    every: int = 1
    requests: Requests | None = None

    def at(self, step: int, now: Plan) -> Change | None:
        """What takes over after so many steps; None leaves the plan in force.

        Args:
          step: how many are done.
          now: the plan in force.
        """
        if self.requests is not None:
            change = self.requests.ready(now)
            if change is not None or self.requests.plan is not None:
                return change
        if self.schedule:
            plan = self.schedule[step // self.every % len(self.schedule)]
            return None if plan == now else Change(plan)
        return None


def read_schedule(
    files: Sequence[str], captured: Captured, global_batch: int, devices: int
) -> tuple[tuple[Plan, ...], tuple[str, ...]]:
    """The plans of `train.plan_schedule`, checked before the run begins.

    Args:
      files: plan files.
      captured: the model they are for.
      global_batch: of the run.
      devices: how many there are.

    Returns:
      Those that fit the devices, and for each of the others why it does not: a run that lost
      devices goes on with fewer plans until it has them back.

    Raises:
      PlanError: one is missing, malformed, or for another model or batch.
    """
    plans, later = [], []
    for file in files:
        plan = read_plan(file, captured.graph)
        if plan.global_batch != global_batch:
            raise PlanError(
                f"{file}: global_batch is {plan.global_batch}, but train.global_batch is "
                f"{global_batch}; plans of one schedule take the run's batch"
            )
        if max(plan.devices) >= devices:
            later.append(
                f"{file}: it uses device {max(plan.devices)}, and there are {devices} devices, "
                "counted from 0; plan for these"
            )
            continue
        plans.append(plan)
    return tuple(plans), tuple(later)
