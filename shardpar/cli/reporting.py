"""Writes the report of a run that has ended: charts are slow to import, and training needs none."""

from __future__ import annotations

import jax

from shardpar.cli.planning import Planned
from shardpar.cli.tables import describe
from shardpar.run.directory import RunDirectory
from shardpar.run.environment import describe_environment
from shardpar.run.progress import clock_time
from shardpar.run.report import write_report


def report(
    directory: RunDirectory,
    planned: Planned,
    *,
    title: str,
    status: str,
    session_s: float,
    sample: str | None,
) -> None:
    """Writes `report.html`.

    Args:
      directory: of the run.
      planned: the model, and the plan it began with.
      title: for people.
      status: how it ended.
      session_s: how long this process trained.
      sample: text that the model wrote.

    Raises:
      RunError: it cannot be written.
    """
    stage = planned.plan.pipelines[0].stages[0]
    write_report(
        directory,
        title=title,
        status=status,
        facts={
            "parameters": f"{planned.captured.graph.num_parameters:,}",
            "plan": describe(stage.layers[0], stage.mesh),
            "this session": clock_time(session_s),
        },
        environment=describe_environment(jax.devices()),
        sample=sample,
    )
