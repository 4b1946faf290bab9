"""Runs training from a config: the heavy half of `shardpar train`."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any

import jax

from shardpar.capture.trace import Captured
from shardpar.cli.arguments import read_cluster, read_config
from shardpar.cli.ending import ending
from shardpar.cli.mixing import PlannedBucket, RowsOfPipelines, planned_buckets
from shardpar.cli.planning import (
    Planned,
    capture,
    capture_aloud,
    make_plan,
    show_plan,
    use_devices,
)
from shardpar.cli.sampling import TOKENIZER, read_tokenizer
from shardpar.cli.signals import Signals, asked_by_signal
from shardpar.cli.tables import describe
from shardpar.cli.telling import conclude, introduce, sample
from shardpar.config.load import load
from shardpar.config.model_source import find_model
from shardpar.config.save import to_gin, to_yaml
from shardpar.config.schema import RunConfig
from shardpar.errors import ConfigError, PlanError, RunError
from shardpar.lowering.devices import local_cluster
from shardpar.lowering.probe import probe_s, product_flops
from shardpar.lowering.switch import Programs
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.directory import RunDirectory
from shardpar.run.durable import write_atomically
from shardpar.run.environment import describe_environment
from shardpar.run.metrics import MetricsLog, Unwritten
from shardpar.run.peers import Peers
from shardpar.run.progress import Progress, clock_time
from shardpar.run.rendezvous import Rendezvous
from shardpar.run.report import write_report
from shardpar.run.supervised import STOPPED, Supervised
from shardpar.spec.cluster import Cluster
from shardpar.spec.plan import Plan
from shardpar.spec.schedule import digest, tasks
from shardpar.spec.text import plan_from_text, plan_to_text
from shardpar.train import compile as compilation
from shardpar.train.changes import PlanChanges, read_schedule
from shardpar.train.data import TextData, load_text, require_vocabulary
from shardpar.train.loop import PLAN, Surroundings
from shardpar.train.loop import train as run_loop
from shardpar.train.optimizer import make_optimizer
from shardpar.train.requests import Machines, Requests, Task
from shardpar.train.stepping import InBuckets, OneLength, Start
from shardpar.train.watch import SpeedWatch

MODEL = "model.py"
"""The model's source, kept to see whether it was changed between two sessions."""

_PINS = ("file", "data", "fsdp", "tensor", "sequence_parallel", "recompute", "microbatch")


def train(
    config: RunConfig,
    name: str,
    *,
    devices: int | None,
    where: Rendezvous | None,
    json: bool,
    dry_run: bool,
) -> None:
    """`shardpar train`."""
    peers = _prepare(devices, where)
    given = config.train.run_dir
    with _all_or_none(peers):
        _begin(config, name, Path(given) if given else None, peers, json=json, dry_run=dry_run)


def resume(
    path: str,
    overrides: Sequence[str] | None,
    *,
    devices: int | None,
    where: Rendezvous | None,
    plan: str | None,
    json: bool,
    dry_run: bool,
) -> None:
    """`shardpar train --resume`: the run's own config, with overrides."""
    peers = _prepare(devices, where)
    with _all_or_none(peers):
        _resume(path, overrides, peers, plan=plan, json=json, dry_run=dry_run)


def _resume(
    path: str,
    overrides: Sequence[str] | None,
    peers: Peers,
    *,
    plan: str | None,
    json: bool,
    dry_run: bool,
) -> None:
    directory = RunDirectory.existing(Path(path))
    given = list(overrides or ())
    changed = not _same_devices(directory)
    if plan or changed or any(text.startswith("plan.") for text in given):
        # Other devices or another plan: what the run pinned before does not bind it now.
        pins = (*_PINS, "cluster") if changed else _PINS
        given = [*(f"plan.{pin}=null" for pin in pins), *given]
    config, _ = read_config(
        [str(directory.config_yaml), *given],
        {"train.run_dir": str(directory.path), "plan.file": plan},
    )
    _begin(config, directory.path.name, directory.path, peers, json=json, dry_run=dry_run)


@contextmanager
def _all_or_none(peers: Peers) -> Iterator[None]:
    """Where others wait for this process, an error ends it without waiting for them in turn."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if peers.count == 1:
            raise
        code = ending(error)
        sys.stdout.flush()
        os._exit(code)


def _prepare(devices: int | None, where: Rendezvous | None) -> Peers:
    supervised = Supervised.find(os.environ)
    if supervised is not None:
        supervised.begin()
    return use_devices(devices, where)


def _begin(
    config: RunConfig, name: str, path: Path | None, peers: Peers, *, json: bool, dry_run: bool
) -> None:
    if path is not None and RunDirectory(path).config_yaml.is_file():
        config = _same_run(config, RunDirectory(path))
    else:
        config = replace(
            config,
            optimizer=replace(
                config.optimizer, decay_steps=config.optimizer.decay_end(config.train.steps)
            ),
        )
    machines = _machines(config)
    if dry_run:
        captured = capture_aloud(config)
        followed = RunDirectory(path) if path else None
        planned = _plan_to_follow(config, captured, followed, machines)
        buckets = planned_buckets(config, captured, machines, followed, peers.decide)
        for shown in (planned, *(bucket.planned for bucket in buckets)):
            if peers.is_first:
                show_plan(shown)
        return
    if path is None:
        path = Path(peers.decide("run directory", lambda: str(_fresh(name))))
    directory = RunDirectory(path)
    config = replace(config, train=replace(config.train, run_dir=str(directory.path)))
    with asked_by_signal() as signals, Progress(quiet=not peers.is_first) as progress:
        _train(config, name, directory, machines, peers, progress, signals, json=json)


def _fresh(name: str) -> Path:
    return RunDirectory.fresh(name, datetime.now()).path


def _machines(config: RunConfig) -> Cluster:
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


def _train(
    config: RunConfig,
    name: str,
    directory: RunDirectory,
    machines: Cluster,
    peers: Peers,
    progress: Progress,
    signals: Signals,
    *,
    json: bool,
) -> None:
    supervised = Supervised.find(os.environ)
    directory.make()
    started = time.monotonic()
    stored = read_tokenizer(directory) if (directory.path / TOKENIZER).is_file() else None
    with progress.phase("reading the data"):
        data = load_text(config.data, stored, bucketed=bool(config.buckets.lengths))
    vocabulary = config.model.get("vocab_size")
    require_vocabulary(vocabulary if isinstance(vocabulary, int) else None, data)
    with progress.phase("capturing the model"):
        captured = capture(config)
    for warning in captured.warnings:
        progress.say(f"note: {warning}")
    planned = _planned_together(config, captured, directory, machines, peers)
    schedule, later = read_schedule(
        config.train.plan_schedule, captured, config.train.global_batch, machines.num_devices
    )
    if later and not directory.is_run():
        raise PlanError(later[0])
    for reason in later:
        progress.say(f"note: left out of train.plan_schedule for now: {reason}")
    with progress.phase("planning each bucket") if config.buckets.lengths else nullcontext():
        buckets = tuple(planned_buckets(config, captured, machines, directory, peers.decide))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    rows = RowsOfPipelines(config, captured)
    programs = Programs(captured, optimizer, config.program, of_pipelines=rows.captured)
    for plan in schedule:
        # What cannot be lowered is refused now, not when its turn comes.
        programs.program(plan)
    stepping: Start = OneLength
    mixed = bool(buckets) or config.data.dispatch
    if buckets:
        stepping = partial(InBuckets, programs, [bucket.bucket for bucket in buckets])
    elif config.data.dispatch:
        stepping = rows.stepping(machines, planned.work)
    stepping(programs.program(planned.plan), ())
    texts = _texts(config, planned, data, buckets)
    peers.agree("plan, config, data or code", _digest(texts, planned.plan, data))
    with ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(directory.checkpoints, config.checkpoint, notify=progress.say, peers=peers)
        )
        metrics: MetricsLog | Unwritten = Unwritten()
        if peers.is_first:
            _note_changed_model(texts[MODEL], directory, progress)
            metrics = stack.enter_context(
                MetricsLog(
                    directory.metrics,
                    tensorboard=directory.tensorboard,
                    stdout=sys.stdout if json else None,
                )
            )
        requests = Requests(
            directory.path,
            Machines(
                machines,
                frozenset(range(machines.num_devices)),
                processes=tuple(device.process_index for device in jax.devices()),
            ),
            Task(captured.graph, planned.work, config.plan, config.replan),
            progress.say,
        )
        stack.callback(requests.close)
        signals.on_replan = requests.ask
        introduce(config, planned, data, directory, peers, progress, buckets)
        outcome = run_loop(
            programs,
            planned.plan,
            data,
            config.train,
            config.checkpoint,
            Surroundings(
                checkpoints,
                metrics,
                progress,
                texts,
                lambda: _write_all(texts, directory) if peers.is_first else None,
                signals.should_stop,
                None if mixed else _peak_flops(config, planned),
                peers,
                PlanChanges(schedule, config.train.switch_every, requests).at,
                lambda plan: _write_all({PLAN: plan_to_text(plan)}, directory),
                requests.there,
                _speed_watch(config, machines, peers, requests),
                supervised is not None,
                stepping,
            ),
        )
    text = sample(config, outcome, data, peers, progress)
    if outcome.stopped and supervised is not None:
        raise SystemExit(STOPPED)
    if not peers.is_first:
        return
    ended = "stopped" if outcome.stopped else "diverged" if outcome.diverged else "finished"
    write_report(
        directory,
        title=name,
        status=ended,
        facts={
            "parameters": f"{captured.graph.num_parameters:,}",
            "plan": describe(
                planned.plan.pipelines[0].stages[0].layers[0],
                planned.plan.pipelines[0].stages[0].mesh,
            ),
            "this session": clock_time(time.monotonic() - started),
        },
        environment=describe_environment(jax.devices()),
        sample=text,
    )
    conclude(outcome, directory, text, started, json=json)


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
        made.append(_plan_to_follow(config, captured, directory, machines))
        return plan_to_text(made[0].plan)

    plan_ = plan_from_text(peers.decide("plan", plan), "the plan of process 0")
    if made:
        return replace(made[0], plan=plan_)
    return make_plan(config, captured, machines, plan=plan_)


def _digest(texts: Mapping[str, str], plan: Plan, data: TextData) -> str:
    """A short name of what all processes must have alike, the order of their tasks included."""
    parts = [
        *(texts[name] for name in sorted(texts)),
        digest(tasks(plan.pipelines)),
        dumps(data.train.identity),
        jax.__version__,
        version("shardpar"),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


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


def _write_all(texts: dict[str, str], directory: RunDirectory) -> None:
    for file, text in texts.items():
        try:
            write_atomically(directory.path / file, text.encode())
        except OSError as error:
            raise RunError(
                f"{directory.path / file} cannot be written: {error.strerror}; make room first"
            ) from error


def _note_changed_model(text: str, directory: RunDirectory, progress: Progress) -> None:
    stored = directory.path / MODEL
    if stored.is_file() and stored.read_text() != text:
        progress.say(
            f"note: the model's file is not what it was; {stored} has the text of the last session"
        )


def _plan_to_follow(
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


def _speed_watch(
    config: RunConfig, machines: Cluster, peers: Peers, requests: Requests
) -> SpeedWatch | None:
    devices = jax.devices()
    if devices[0].platform == "cpu" and len(jax.local_devices()) > 1:
        # They share cores: what one gains another loses.
        return None
    if len(devices) == 1:
        return None

    def probe(numbers: Sequence[int]) -> Mapping[int, float]:
        return probe_s({number: devices[number] for number in numbers})

    return SpeedWatch(probe, product_flops(), machines, peers, requests.slow, config.stragglers)


def _peak_flops(config: RunConfig, planned: Planned) -> float | None:
    kind = planned.cluster.kinds[0]
    if kind.source == "assumed":
        return None
    return kind.flops(config.program.compute_dtype) * len(planned.plan.devices)


def _same_run(config: RunConfig, directory: RunDirectory) -> RunConfig:
    """The config, if it says the same run as the one stored in the directory."""
    stored = load(str(directory.config_yaml), find_files=False)
    if config.optimizer.decay_steps is None:
        config = replace(
            config, optimizer=replace(config.optimizer, decay_steps=stored.optimizer.decay_steps)
        )
    now, then = _fixed(config), _fixed(stored)
    changed = [key for key in now if now[key] != then.get(key)]
    if changed:
        differences = "; ".join(f"{key} was {then.get(key)!r}, now {now[key]!r}" for key in changed)
        raise ConfigError(
            f"{directory.path} holds another run: {differences}; "
            "use the old values, or another train.run_dir"
        )
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
