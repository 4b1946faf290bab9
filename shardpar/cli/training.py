"""Runs training from a config: the heavy half of `shardpar train`."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any

import jax

from shardpar.cli.ending import ending
from shardpar.cli.later import later
from shardpar.cli.planning import Planned, capture_aloud, show_plan, use_devices
from shardpar.cli.preparing import (
    MODEL,
    Ahead,
    Prepared,
    machines_of,
    plan_to_follow,
    prepare,
    resumed_config,
    same_run,
)
from shardpar.cli.tables import console, describe, print_json
from shardpar.config.schema import RunConfig
from shardpar.errors import RunError, UserError
from shardpar.lowering.probe import probe_s, product_flops
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.directory import RunDirectory
from shardpar.run.durable import write_atomically
from shardpar.run.metrics import MetricsLog, Unwritten
from shardpar.run.peers import ALONE, Peers
from shardpar.run.progress import Progress, clock_time
from shardpar.run.rendezvous import Rendezvous
from shardpar.run.supervised import STOPPED, Supervised
from shardpar.spec.cluster import Cluster
from shardpar.spec.plan import Plan
from shardpar.spec.schedule import digest, tasks
from shardpar.spec.text import plan_to_text
from shardpar.train.changes import PlanChanges
from shardpar.train.data import TextData
from shardpar.train.generate import generate as sample_tokens
from shardpar.train.loop import PLAN, Outcome, Surroundings
from shardpar.train.loop import train as run_loop
from shardpar.train.requests import Machines, Requests, Task
from shardpar.train.watch import SpeedWatch


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
    ahead: Ahead | None = None,
) -> None:
    """`shardpar train --resume`: the run's own config, with overrides.

    With `ahead`, from `stand_by` with the same arguments, only what is left is done.
    """
    if ahead is not None and where is None:
        _give_signs_of_life()
        directory = RunDirectory.existing(Path(path))
        prepared = ahead.prepared if ahead.holds(directory) else None
        config = resumed_config(directory, overrides, plan)
        _begin(config, directory.path.name, directory.path, ALONE, json=json, dry_run=dry_run,
               prepared=prepared)  # fmt: skip
        return
    peers = _prepare(devices, where)
    with _all_or_none(peers):
        directory = RunDirectory.existing(Path(path))
        config = resumed_config(directory, overrides, plan)
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
    _give_signs_of_life()
    return use_devices(devices, where)


def _give_signs_of_life() -> None:
    supervised = Supervised.find(os.environ)
    if supervised is not None:
        supervised.begin()


def _begin(
    config: RunConfig,
    name: str,
    path: Path | None,
    peers: Peers,
    *,
    json: bool,
    dry_run: bool,
    prepared: Prepared | None = None,
) -> None:
    if path is not None and RunDirectory(path).config_yaml.is_file():
        config = same_run(config, RunDirectory(path))
    else:
        config = replace(
            config,
            optimizer=replace(
                config.optimizer, decay_steps=config.optimizer.decay_end(config.train.steps)
            ),
        )
    machines = machines_of(config)
    if dry_run:
        captured = capture_aloud(config)
        followed = RunDirectory(path) if path else None
        planned = plan_to_follow(config, captured, followed, machines)
        if peers.is_first:
            show_plan(planned)
        return
    if path is None:
        path = Path(peers.decide("run directory", lambda: str(_fresh(name))))
    directory = RunDirectory(path)
    config = replace(config, train=replace(config.train, run_dir=str(directory.path)))
    with _signals() as signals, Progress(quiet=not peers.is_first) as progress:
        _train(config, name, directory, machines, peers, progress, signals, prepared, json=json)


def _fresh(name: str) -> Path:
    return RunDirectory.fresh(name, datetime.now()).path


def _train(
    config: RunConfig,
    name: str,
    directory: RunDirectory,
    machines: Cluster,
    peers: Peers,
    progress: Progress,
    signals: _Signals,
    prepared: Prepared | None,
    *,
    json: bool,
) -> None:
    supervised = Supervised.find(os.environ)
    directory.make()
    started = time.monotonic()
    prepared = prepared or prepare(config, directory, machines, peers, progress)
    data, planned, programs = prepared.data, prepared.planned, prepared.programs
    captured, schedule, texts = planned.captured, prepared.schedule, prepared.texts
    for note in prepared.notes:
        progress.say(f"note: {note}")
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
                lambda: supervised.says(jax.devices()[0].platform) if supervised else None,
            ),
        )
    text = _sample(config, outcome, data, peers, progress)
    if outcome.stopped and supervised is not None:
        raise SystemExit(STOPPED)
    if not peers.is_first:
        return
    ended = "stopped" if outcome.stopped else "diverged" if outcome.diverged else "finished"
    later("reporting").report(
        directory,
        planned,
        title=name,
        status=ended,
        session_s=time.monotonic() - started,
        sample=text,
    )
    _conclude(outcome, directory, text, started, json=json)


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


@dataclass
class _Signals:
    """What signals have asked for, and whom SIGUSR1 asks for another plan."""

    asked: list[int] = field(default_factory=list)
    on_replan: Callable[[], None] = lambda: None

    def should_stop(self) -> bool:
        """Whether to save and stop."""
        return bool(self.asked)


@contextmanager
def _signals() -> Iterator[_Signals]:
    """SIGTERM and the first Ctrl-C ask the loop to save and stop; a second Ctrl-C interrupts."""
    signals = _Signals()

    def ask(number: int, _: Any) -> None:
        if number == signal.SIGUSR1:
            signals.on_replan()
            return
        if signals.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.asked.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
