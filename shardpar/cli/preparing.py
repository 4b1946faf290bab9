"""What a trainer does before it touches its run: reads, captures, plans, lowers.

All of it can be done ahead of time, by a process that stands by for another (`stand_by`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from shardpar.capture.trace import Captured
from shardpar.cli.arguments import read_cluster, read_config
from shardpar.cli.mixing import PlannedBucket, RowsOfPipelines, planned_buckets
from shardpar.cli.planning import Planned, capture, make_plan, use_devices
from shardpar.cli.sampling import TOKENIZER, read_tokenizer
from shardpar.cli.stored import require_same
from shardpar.config.load import load
from shardpar.config.model_source import find_model
from shardpar.config.save import to_gin, to_yaml
from shardpar.config.schema import RunConfig
from shardpar.errors import ConfigError, PlanError, ShardparError
from shardpar.lowering.devices import local_cluster
from shardpar.lowering.switch import Programs
from shardpar.planner.options import PINS
from shardpar.run.directory import RunDirectory
from shardpar.run.peers import ALONE, Peers
from shardpar.run.progress import Progress
from shardpar.spec.cluster import Cluster
from shardpar.spec.plan import Plan
from shardpar.spec.text import plan_from_text, plan_to_text
from shardpar.train import compile as compilation
from shardpar.train.changes import read_schedule
from shardpar.train.data import TextData, load_text, require_vocabulary
from shardpar.train.loop import PLAN
from shardpar.train.optimizer import make_optimizer
from shardpar.train.stepping import InBuckets, OneLength, Start

MODEL = "model.py"
"""The model's source, kept to see whether it was changed between two sessions."""

_PINS = ("file", *PINS)


@dataclass(frozen=True)
class Prepared:
    """All that a run is made of, before its state is there.

    Attributes:
      data: windows of text.
      planned: the captured model, and the plan to begin with.
      schedule: plans that take turns.
      programs: of the model; those of the schedule are lowered.
      texts: what is kept beside the run and its checkpoints, by file name.
      notes: for people.
      buckets: plans of lengths within a step.
      stepping: how a step is made of a batch.
    """

    data: TextData
    planned: Planned
    schedule: tuple[Plan, ...]
    programs: Programs
    texts: dict[str, str]
    notes: tuple[str, ...]
    buckets: tuple[PlannedBucket, ...]
    stepping: Start

    @property
    def is_mixed(self) -> bool:
        """Whether steps hold sequences of several lengths."""
        return self.stepping is not OneLength


@dataclass(frozen=True)
class Ahead:
    """What was prepared for a run's next trainer while another one trains.

    Attributes:
      prepared: with the program of its plan compiled.
      found: the run's files that it follows, as they were read.
    """

    prepared: Prepared
    found: Mapping[str, str]

    def holds(self, directory: RunDirectory) -> bool:
        """Whether the run still is what was prepared for: it may have switched to another plan."""
        return self.found == _followed(directory)


def _followed(directory: RunDirectory) -> dict[str, str]:
    config = load(str(directory.config_yaml), find_files=False)
    files = [directory.config_yaml, directory.plan, find_model(config.model.source)]
    return {str(path): path.read_text() for path in files if path.is_file()}


def stand_by(
    path: str, overrides: Sequence[str] | None, *, devices: int | None, plan: str | None
) -> Ahead | None:
    """Prepares to go on with a run that another process trains; writes nothing.

    Args:
      path: the run directory.
      overrides: as given.
      devices: virtual CPU devices.
      plan: a plan file to follow.

    Returns:
      What was prepared; None where that failed, which the run's next trainer will explain.
    """
    use_devices(devices)
    try:
        directory = RunDirectory.existing(Path(path))
        found = _followed(directory)
        config = same_run(resumed_config(directory, overrides, plan), directory)
        machines = machines_of(config)
        prepared = prepare(config, directory, machines, ALONE, Progress(quiet=True))
        prepared.programs.program(prepared.planned.plan).compile()
    except (ShardparError, OSError):
        return None
    return Ahead(prepared, found)


def prepare(
    config: RunConfig, directory: RunDirectory, machines: Cluster, peers: Peers, progress: Progress
) -> Prepared:
    """Reads the data, captures the model, plans, and lowers what can be refused.

    Args:
      config: of the run.
      directory: whose plan and tokenizer are followed, if it has any; it is not written.
      machines: to train on.
      peers: the processes that train together.
      progress: shows what takes its time.

    Raises:
      ShardparError: the data, the model or a plan does not fit.
    """
    stored = read_tokenizer(directory) if (directory.path / TOKENIZER).is_file() else None
    with progress.phase("reading the data"):
        data = load_text(config.data, stored, bucketed=bool(config.buckets.lengths))
    vocabulary = config.model.get("vocab_size")
    require_vocabulary(vocabulary if isinstance(vocabulary, int) else None, data)
    with progress.phase("capturing the model"):
        captured = capture(config)
    planned = _planned_together(config, captured, directory, machines, peers)
    schedule, later = read_schedule(
        config.train.plan_schedule, captured, config.train.global_batch, machines.num_devices
    )
    if later and not directory.is_run():
        raise PlanError(later[0])
    with progress.phase("planning each bucket") if config.buckets.lengths else nullcontext():
        buckets = tuple(planned_buckets(config, captured, machines, directory, peers.decide))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    rows = RowsOfPipelines(config, captured)
    programs = Programs(captured, optimizer, config.program, of_pipelines=rows.captured)
    for plan in schedule:
        # What cannot be lowered is refused now, not when its turn comes.
        programs.program(plan)
    stepping: Start = OneLength
    if buckets:
        stepping = partial(InBuckets, programs, [bucket.bucket for bucket in buckets])
    elif config.data.dispatch:
        stepping = rows.stepping(machines, planned.work)
    stepping(programs.program(planned.plan), ())
    notes = [f"left out of train.plan_schedule for now: {reason}" for reason in later]
    return Prepared(
        data,
        planned,
        tuple(schedule),
        programs,
        _texts(config, planned, data, buckets),
        (*captured.warnings, *notes),
        buckets,
        stepping,
    )


def resumed_config(
    directory: RunDirectory, overrides: Sequence[str] | None, plan: str | None
) -> RunConfig:
    """A run's own config, with overrides and perhaps another plan file.

    Raises:
      ConfigError: an override is wrong.
    """
    given = list(overrides or ())
    changed = not _same_devices(directory)
    if plan or changed or any(text.startswith("plan.") for text in given):
        # Other devices or another plan: what the run pinned before does not bind it now.
        pins = (*_PINS, "cluster") if changed else _PINS
        free = [f"plan.{pin}=null" for pin in pins]
        if load(str(directory.config_yaml), find_files=False).plan.schedule == "single_jit":
            free.append("plan.schedule=fastest")
        given = [*free, *given]
    config, _ = read_config(
        [str(directory.config_yaml), *given],
        {"train.run_dir": str(directory.path), "plan.file": plan},
    )
    return config


def machines_of(config: RunConfig) -> Cluster:
    """The devices at hand, with the rates of the config's cluster file if it names one.

    Raises:
      ConfigError: the file describes another number of devices.
    """
    here = local_cluster()
    if config.plan.cluster is None:
        return here
    described = read_cluster(config.plan.cluster)
    if described.num_devices != here.num_devices:
        raise ConfigError(
            f"plan.cluster, {config.plan.cluster}, has {described.num_devices} devices, and there "
            f"are {here.num_devices} to train on; drop plan.cluster, or plan for it with "
            "`shardpar plan`"
        )
    return described


def _same_devices(directory: RunDirectory) -> bool:
    """Whether the run's plan is for the devices at hand, or a hand-written one fits them."""
    if not directory.plan.is_file():
        return True
    plan, here = compilation.read_plan(directory.plan), local_cluster()
    by_hand = load(str(directory.config_yaml), find_files=False).plan.file is not None
    if by_hand or plan.cluster == here.name:
        return max(plan.devices) < here.num_devices
    return len(plan.devices) == here.num_devices


def _planned_together(
    config: RunConfig,
    captured: Captured,
    directory: RunDirectory,
    machines: Cluster,
    peers: Peers,
) -> Planned:
    """The first process's plan in every process, as its text says it."""
    made: list[Planned] = []

    def plan() -> str:
        made.append(plan_to_follow(config, captured, directory, machines))
        return plan_to_text(made[0].plan)

    plan_ = plan_from_text(peers.decide("plan", plan), "the plan of process 0")
    if made:
        return replace(made[0], plan=plan_)
    return make_plan(config, captured, machines, plan=plan_)


def _texts(
    config: RunConfig, planned: Planned, data: TextData, buckets: Sequence[PlannedBucket]
) -> dict[str, str]:
    """What is kept beside the run and each of its checkpoints: all that is needed to go on."""
    # Plans are kept too, so the run does not depend on the files they came from.
    if config.plan.file is not None:
        config = replace(config, plan=replace(config.plan, file=PLAN))
    schedule = enumerate(config.train.plan_schedule)
    plans = {f"plan-{n}.yaml": Path(file).read_text() for n, file in schedule}
    config = replace(config, train=replace(config.train, plan_schedule=tuple(plans)))
    of_buckets = {bucket.file: plan_to_text(bucket.planned.plan) for bucket in buckets}
    if config.buckets.plans:
        kept = zip(config.buckets.plans, of_buckets, strict=True)
        files = tuple(given and file for given, file in kept)
        config = replace(config, buckets=replace(config.buckets, plans=files))
    return {
        **plans,
        **of_buckets,
        "config.yaml": to_yaml(config),
        "config.gin": to_gin(config),
        PLAN: plan_to_text(planned.plan),
        TOKENIZER: data.tokenizer.to_text(),
        MODEL: find_model(config.model.source).read_text(),
    }


def plan_to_follow(
    config: RunConfig, captured: Captured, directory: RunDirectory | None, machines: Cluster
) -> Planned:
    """The plan the run has had so far, unless its devices, its batch or the user's wishes changed.

    A new search might choose otherwise, on a machine with another amount of memory
    or with a later cost model, and the losses would no longer be the same bit for bit.
    """
    if (
        directory is not None
        and directory.config_yaml.is_file()
        and directory.plan.is_file()
        and config.plan.file is None
    ):
        then = compilation.read_plan(directory.plan)
        if (
            load(str(directory.config_yaml), find_files=False).plan == config.plan
            and then.global_batch == config.train.global_batch
            and then.cluster == machines.name
        ):
            kept = replace(config, plan=replace(config.plan, file=str(directory.plan)))
            planned = make_plan(kept, captured, machines)
            if planned.cost.peak_bytes <= planned.limit_bytes:
                return planned
    return make_plan(config, captured, machines)


def same_run(config: RunConfig, directory: RunDirectory) -> RunConfig:
    """The config, if it says the same run as the one stored in the directory."""
    stored = load(str(directory.config_yaml), find_files=False)
    if config.optimizer.decay_steps is None:
        config = replace(
            config, optimizer=replace(config.optimizer, decay_steps=stored.optimizer.decay_steps)
        )
    require_same(directory, _fixed(stored), _fixed(config))
    return config


def _fixed(config: RunConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model.source": config.model.source,
        "train.seed": config.train.seed,
        "program.compute_dtype": config.program.compute_dtype,
        "buckets or none": "buckets" if config.buckets.lengths else "none",
        **{f"model.{key}": value for key, value in config.model.options},
    }
    for section in ("data", "optimizer"):
        values.update({f"{section}.{k}": v for k, v in vars(getattr(config, section)).items()})
    # The same text may lie elsewhere; the position in the data proves that it is the same.
    del values["data.path"]
    return values
