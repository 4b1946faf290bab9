"""Runs training from a config: the heavy half of `shardpar train`."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any

import jax

from shardpar.capture.trace import Captured
from shardpar.cli.arguments import read_cluster, read_config
from shardpar.cli.ending import ending
from shardpar.cli.planning import (
    Planned,
    capture,
    capture_aloud,
    make_plan,
    show_plan,
    use_devices,
)
from shardpar.cli.sampling import TOKENIZER, read_tokenizer
from shardpar.cli.signals import Signals, caught_signals
from shardpar.cli.tables import console, describe, print_json
from shardpar.config.load import load
from shardpar.config.model_source import find_model
from shardpar.config.save import to_gin, to_yaml
from shardpar.config.schema import RunConfig
from shardpar.errors import ConfigError, PlanError, RunError, UserError
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
from shardpar.train.data import TextData, load_text
from shardpar.train.generate import generate as sample_tokens
from shardpar.train.loop import PLAN, Outcome, Surroundings, require_vocabulary
from shardpar.train.loop import train as run_loop
from shardpar.train.optimizer import make_optimizer
from shardpar.train.requests import Machines, Requests, Task
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
        if peers.is_first:
            show_plan(planned)
        return
    if path is None:
        path = Path(peers.decide("run directory", lambda: str(_fresh(name))))
    directory = RunDirectory(path)
    config = replace(config, train=replace(config.train, run_dir=str(directory.path)))
    with caught_signals() as signals, Progress(quiet=not peers.is_first) as progress:
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
        data = load_text(config.data, stored)
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
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    programs = Programs(captured, optimizer, config.program)
    for plan in schedule:
        # What cannot be lowered is refused now, not when its turn comes.
        programs.program(plan)
    texts = _texts(config, planned, data)
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
        _introduce(config, planned, data, directory, peers, progress)
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
                _peak_flops(config, planned),
                peers,
                PlanChanges(schedule, config.train.switch_every, requests).at,
                lambda plan: _write_all({PLAN: plan_to_text(plan)}, directory),
                requests.there,
                _speed_watch(config, machines, peers, requests),
                supervised is not None,
            ),
        )
    text = _sample(config, outcome, data, peers, progress)
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
    _conclude(outcome, directory, text, started, json=json)


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


def _texts(config: RunConfig, planned: Planned, data: TextData) -> dict[str, str]:
    """What is kept beside the run and each of its checkpoints: all that is needed to go on."""
    # Plans are kept too, so the run does not depend on the files they came from.
    if config.plan.file is not None:
        config = replace(config, plan=replace(config.plan, file=PLAN))
    schedule = enumerate(config.train.plan_schedule)
    plans = {f"plan-{n}.yaml": Path(file).read_text() for n, file in schedule}
    config = replace(config, train=replace(config.train, plan_schedule=tuple(plans)))
    return {
        **plans,
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


def _introduce(
    config: RunConfig,
    planned: Planned,
    data: TextData,
    directory: RunDirectory,
    peers: Peers,
    progress: Progress,
) -> None:
    pipeline = planned.plan.pipelines[0]
    stage = pipeline.stages[0]
    progress.say(
        f"{planned.captured.graph.model}: {planned.captured.graph.num_parameters:,} parameters; "
        f"{data.name}: {len(data.train):,} samples of {config.data.sequence_length} tokens, "
        f"{len(data.evaluation):,} for evaluation"
    )
    if peers.count > 1:
        progress.say(f"{peers.count} processes, which saw the same plan, config, data and code")
    several = len(planned.plan.pipelines) > 1 or len(pipeline.stages) > 1
    progress.say(
        f"{len(planned.plan.devices)} x {planned.cluster.kinds[0].name}: "
        + (f"stages {planned.plan.in_short}, the first " if several else "")
        + describe(stage.layers[0], stage.mesh)
        + (" and others" if len(stage.layers) > 1 else "")
        + f"; global batch {planned.plan.global_batch} = "
        + " + ".join(
            f"{p.num_microbatches} micro-batches of {p.microbatch}" for p in planned.plan.pipelines
        )
    )
    progress.say(f"run directory: {directory.path}")


def _sample(
    config: RunConfig, outcome: Outcome, data: TextData, peers: Peers, progress: Progress
) -> str | None:
    if config.train.sample_prompt is None or outcome.stopped:
        return None
    program = outcome.program
    weights = program.together(outcome.state)
    if not peers.is_first:
        return None
    try:
        with progress.phase("writing a sample"):
            ids = sample_tokens(
                program.captured.model,
                *weights,
                data.tokenizer.encode(config.train.sample_prompt),
                tokens=config.train.sample_tokens,
                window=config.data.sequence_length,
                seed=config.train.seed,
            )
    except UserError as error:
        progress.say(f"note: no sample: {error}")
        return None
    return data.tokenizer.decode(ids)


def _conclude(
    outcome: Outcome, directory: RunDirectory, text: str | None, started: float, *, json: bool
) -> None:
    screen = console(stderr=True)
    if outcome.stopped:
        screen.print(
            f"stopped after step {outcome.step} and saved; go on with: "
            f"shardpar train --resume {directory.path}",
            highlight=False,
        )
        return
    words = [f"step {outcome.step}"]
    words += [f"loss {outcome.loss:.4f}"] if outcome.loss is not None else []
    words += (
        [f"eval loss {outcome.eval_loss:.4f} nats/token"] if outcome.eval_loss is not None else []
    )
    words += [f"{outcome.skipped} updates skipped"] if outcome.skipped else []
    if outcome.diverged:
        raise RunError(
            f"the run diverged: the loss is not finite after {', '.join(words)}; begin again with "
            f"a lower optimizer.learning_rate or a longer warm-up. Report: {directory.report}"
        )
    screen.print(
        f"done in {clock_time(time.monotonic() - started)}: {', '.join(words)}", highlight=False
    )
    if text is not None:
        if json:
            print_json({"step": outcome.step, "sample": text})
        else:
            print(f"\n{text}\n")  # noqa: T201
    screen.print(f"report: {directory.report}", highlight=False)


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
        **{f"model.{key}": value for key, value in config.model.options},
    }
    for section in ("data", "optimizer"):
        values.update({f"{section}.{k}": v for k, v in vars(getattr(config, section)).items()})
    # The same text may lie elsewhere; the position in the data proves that it is the same.
    del values["data.path"]
    return values
