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

import jax

from shardpar.cli.ending import ending
from shardpar.cli.later import later
from shardpar.cli.mixing import planned_buckets
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
from shardpar.cli.signals import Signals, asked_by_signal
from shardpar.cli.telling import conclude, introduce, sample
from shardpar.config.schema import RunConfig
from shardpar.lowering.probe import probe_s, product_flops
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.directory import RunDirectory
from shardpar.run.metrics import MetricsLog, Unwritten
from shardpar.run.peers import ALONE, Peers
from shardpar.run.progress import Progress
from shardpar.run.rendezvous import Rendezvous
from shardpar.run.supervised import STOPPED, Supervised
from shardpar.spec.cluster import Cluster
from shardpar.spec.plan import Plan
from shardpar.spec.schedule import digest, tasks
from shardpar.spec.text import plan_to_text
from shardpar.train.changes import PlanChanges
from shardpar.train.data import TextData
from shardpar.train.loop import PLAN, Surroundings
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
    signals: Signals,
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
        introduce(config, planned, data, directory, peers, progress, prepared.buckets)
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
                lambda: directory.write(texts) if peers.is_first else None,
                signals.should_stop,
                None if prepared.is_mixed else _peak_flops(config, planned),
                peers,
                PlanChanges(schedule, config.train.switch_every, requests).at,
                lambda plan: directory.write({PLAN: plan_to_text(plan)}),
                requests.there,
                _speed_watch(config, machines, peers, requests),
                supervised is not None,
                prepared.stepping,
                lambda: supervised.says(jax.devices()[0].platform) if supervised else None,
            ),
        )
    text = sample(config, outcome, data, peers, progress)
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
    conclude(outcome, directory, text, started, json=json)


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


def _note_changed_model(text: str, directory: RunDirectory, progress: Progress) -> None:
    stored = directory.path / MODEL
    if stored.is_file() and stored.read_text() != text:
        progress.say(
            f"note: the model's file is not what it was; {stored} has the text of the last session"
        )


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
