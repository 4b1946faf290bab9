"""A plan becomes a program: one jit where one suffices or is asked for, else one per stage."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import optax

from shardpar.capture.trace import Captured
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.pipelined import PipelinedProgram
from shardpar.lowering.program import Program
from shardpar.lowering.single_jit import SingleJitProgram
from shardpar.spec.plan import Plan

AnyProgram = Program | PipelinedProgram | SingleJitProgram


def lower(
    captured: Captured,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    options: ProgramOptions = ProgramOptions(),
    devices: Sequence[jax.Device] | None = None,
    of_pipelines: Sequence[Captured] = (),
) -> AnyProgram:
    """The program of a plan: `init`, `step`, `evaluate`.

    Args:
      captured: from `capture.trace`.
      plan: from the planner, a file, or a person.
      optimizer: any optax transformation; with several stages, one that updates each
        parameter from itself alone.
      options: dtype, loops, clipping.
      devices: the cluster's devices in plan order; None takes `jax.devices()`.
      of_pipelines: the model captured for the rows of each pipeline, where these are of other
        lengths than those of `captured`.

    Raises:
      PlanError: the plan does not fit the model, the devices or the optimizer.
    """
    if any(pipeline.schedule == "single_jit" for pipeline in plan.pipelines):
        return SingleJitProgram(captured, plan, optimizer, options, devices)
    several = len(plan.pipelines) > 1 or len(plan.pipelines[0].stages) > 1
    if several:
        return PipelinedProgram(captured, plan, optimizer, options, devices, of_pipelines)
    return Program(captured, plan, optimizer, options, devices)
