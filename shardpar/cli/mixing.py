"""What a config says of mixed lengths: buckets with a plan each, and rows of each pipeline."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from shardpar.capture.trace import Captured
from shardpar.cli.planning import Planned, capture, make_plan
from shardpar.config.schema import RunConfig
from shardpar.errors import PlanError
from shardpar.lowering.lower import AnyProgram
from shardpar.planner.setting import Workload
from shardpar.planner.speeds import pipeline_speeds
from shardpar.run.directory import RunDirectory
from shardpar.spec.cluster import Cluster
from shardpar.spec.plan import Plan
from shardpar.spec.text import plan_from_text, plan_to_text
from shardpar.train import compile as compilation
from shardpar.train.buckets import Bucket
from shardpar.train.dispatching import Dispatched
from shardpar.train.stepping import Start

Decide = Callable[[str, Callable[[], Any]], Any]


@dataclass(frozen=True, eq=False)
class PlannedBucket:
    """A bucket with the price of its plan.

    Attributes:
      length: tokens of a row.
      planned: its capture, plan and price.
    """

    length: int
    planned: Planned

    @property
    def bucket(self) -> Bucket:
        """What a step computes."""
        return Bucket(self.planned.captured, self.planned.plan)

    @property
    def file(self) -> str:
        """Where the plan is kept in a run directory."""
        return bucket_file(self.length)


def bucket_file(length: int) -> str:
    """The name of a bucket's plan in a run directory."""
    return f"bucket-{length}.yaml"


def planned_buckets(
    config: RunConfig,
    captured: Captured,
    machines: Cluster,
    directory: RunDirectory | None,
    decide: Decide,
) -> Iterator[PlannedBucket]:
    """The buckets of a config, each planned.

    Args:
      config: its section `buckets`; pins of its section `plan` hold for searched plans.
      captured: the model for the run's own batch.
      machines: what computes.
      directory: of the run, whose searched plans are kept while its devices are the same.
      decide: as `Peers.decide`: the first process plans for all.

    Raises:
      PlanError: a plan file does not fit the model at its bucket's length, or the devices.
      InfeasibleError: nothing fits for a bucket.
    """
    buckets = config.buckets
    for number, length in enumerate(buckets.lengths):
        file = buckets.plans[number] if buckets.plans else None
        turn = buckets.turn(number, config.train.global_batch)
        given = None
        if file is not None:
            given = compilation.read_plan(file)
            turn = given.global_batch
            if max(given.devices) >= machines.num_devices:
                raise PlanError(
                    f"buckets.plans: {file} uses device {max(given.devices)}, and there are "
                    f"{machines.num_devices} devices, counted from 0; plan for these"
                )
        here = replace(
            config,
            train=replace(config.train, global_batch=turn),
            plan=replace(config.plan, file=file),
        )
        same = turn == config.train.global_batch and length == config.data.sequence_length
        of_bucket = captured if same else capture(here, row_tokens=length)
        made: list[Planned] = []

        def plan(
            here: RunConfig = here, captured: Captured = of_bucket, made: list[Planned] = made,
            length: int = length,
        ) -> str:  # fmt: skip
            kept = None if here.plan.file else _kept(directory, length, here, machines)
            made.append(make_plan(here, captured, machines, plan=kept))
            return plan_to_text(made[0].plan)

        try:
            text = decide(f"plan of the bucket of {length} tokens", plan)
            plan_ = plan_from_text(text, f"the plan of the bucket of {length} tokens")
            planned = made[0] if made else make_plan(here, of_bucket, machines, plan=plan_)
        except PlanError as error:
            raise PlanError(f"the bucket of {length} tokens: {error}") from error
        yield PlannedBucket(length, replace(planned, plan=plan_))


def _kept(
    directory: RunDirectory | None, length: int, here: RunConfig, machines: Cluster
) -> Plan | None:
    """The plan that the bucket has had so far, if it is for this batch and these machines."""
    path = directory.path / bucket_file(length) if directory else None
    if path is None or not path.is_file():
        return None
    plan = compilation.read_plan(path)
    same = plan.global_batch == here.train.global_batch and plan.cluster == machines.name
    return plan if same else None


class RowsOfPipelines:
    """The model captured for the rows of each pipeline, where steps are dispatched."""

    def __init__(self, config: RunConfig, captured: Captured) -> None:
        """Captures nothing yet.

        Args:
          config: its section `dispatch`.
          captured: the model for rows of `data.sequence_length`.
        """
        self._config = config
        self._found = {config.data.sequence_length: captured}

    def captured(self, plan: Plan) -> tuple[Captured, ...]:
        """Of each pipeline; empty where rows have one length, or not as many as pipelines."""
        lengths = self._config.dispatch.row_tokens
        if len(lengths) != len(plan.pipelines):
            return ()
        for length in lengths:
            if length not in self._found:
                self._found[length] = capture(self._config, row_tokens=length)
        return tuple(self._found[length] for length in lengths)

    def stepping(self, machines: Cluster, work: Workload) -> Start:
        """What dispatches the steps of a run on these machines."""
        config = self._config

        def start(program: AnyProgram, lost: Collection[int]) -> Dispatched:
            pipelines = len(program.plan.pipelines)
            lengths = config.dispatch.row_tokens or (config.data.sequence_length,) * pipelines
            graphs = [c.graph for c in self.captured(program.plan)] or [
                program.captured.graph
            ] * pipelines
            speeds = pipeline_speeds(program.plan, graphs, lengths, machines, work)
            return Dispatched(program, speeds, config.dispatch.gap, lost)

        return start
