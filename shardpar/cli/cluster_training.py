"""Trains tables on servers and workers of their own: `shardpar train` with `ps.servers`."""

from __future__ import annotations

import json as json_format
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from shardpar.cli.planning import use_devices
from shardpar.cli.signals import asked_by_signal
from shardpar.cli.sparse_training import (
    conclude,
    data_options,
    first_batches,
    naming_what_does_not_fit,
    require_same_run,
)
from shardpar.config.save import to_gin, to_yaml
from shardpar.config.schema import SparseConfig
from shardpar.config.tables_model import TablesModel
from shardpar.ps.cache import CacheOptions
from shardpar.ps.cluster import Cluster, ClusterOptions
from shardpar.ps.cluster_loop import ClusterLoop
from shardpar.ps.consistency import consistency_from_text
from shardpar.ps.data.batches import train_batches
from shardpar.ps.data.open import open_parts
from shardpar.ps.data.options import SparseDataOptions
from shardpar.ps.data.source import Source
from shardpar.ps.options import ServerOptions
from shardpar.ps.rules import dense_optimizer
from shardpar.ps.worker_data import WorkerData, steps_in
from shardpar.run.directory import RunDirectory
from shardpar.run.metrics import MetricsLog
from shardpar.run.progress import Progress

_SERVERS = "servers"
_DATA = "data.json"


def train(
    config: SparseConfig, name: str, devices: int | None, *, json: bool, dry_run: bool
) -> None:
    """`shardpar train` of a model with tables, with `ps.servers` and `ps.workers` on Ray."""
    assert devices is None, "refused by whoever calls"
    use_devices(None)
    started = time.monotonic()
    path = config.train.run_dir
    require_same_run(config)
    ps, model = config.ps, TablesModel(config.model, config.table)
    size = config.train.global_batch // ps.workers
    with Progress() as progress, ExitStack() as stack:
        with progress.phase("reading the data"):
            data = data_options(config)
            parts = open_parts(data)
            first = first_batches(parts[0], data, size, mapped=False)
        model.require(first)
        batch = {name: x[:size] for name, x in first.items()}
        with progress.phase("counting the samples"):
            per_epoch = steps_in(data, config.train.global_batch)
        steps = per_epoch * config.train.epochs
        steps = min(steps, config.train.steps or steps)
        progress.say(
            f"{steps} steps of {ps.workers} workers with {size} samples each, {ps.servers} "
            f"servers, {consistency_from_text(ps.consistency).text()}"
        )
        predict = model.predict
        if dry_run:
            return
        directory = RunDirectory(Path(path)) if path else RunDirectory.fresh(name, datetime.now())
        directory.make()
        texts = {_DATA: _same_data(directory, parts[0], data, config.train.global_batch)}
        config = replace(config, train=replace(config.train, run_dir=str(directory.path)))
        with (
            progress.phase("starting servers and workers"),
            naming_what_does_not_fit(config.model.source, batch),
        ):
            cluster = stack.enter_context(
                Cluster(
                    model.loss, model.init, dense_optimizer(config.optimizer), batch,
                    WorkerData(
                        data, config.train.global_batch, ps.workers, per_epoch, model.require
                    ),
                    _cluster_options(ps, directory.path / _SERVERS), config.train.seed,
                )
            )  # fmt: skip
        metrics = stack.enter_context(
            MetricsLog(
                directory.metrics,
                tensorboard=directory.tensorboard,
                stdout=sys.stdout if json else None,
            )
        )
        texts |= {"config.yaml": to_yaml(config), "config.gin": to_gin(config)}
        directory.write(texts)
        progress.say(f"run directory: {directory.path}")
        # Ray sets its own handler of SIGTERM when it starts.
        signals = stack.enter_context(asked_by_signal())
        loop = ClusterLoop(
            cluster,
            parts[1],
            predict,
            data,
            config.train,
            metrics,
            progress,
            signals.should_stop,
            model.require,
        )
        outcome = loop.run(steps)
    conclude(config, name, directory, outcome, started, json=json)


def _same_data(
    directory: RunDirectory, source: Source, data: SparseDataOptions, global_batch: int
) -> str:
    """Where the data begin, as text; servers know of steps only, not of what was in them.

    Raises:
      DataError: the run began with other data.
    """
    batches = train_batches(source, data, global_batch)
    path = directory.path / _DATA
    if path.is_file():
        batches.restore(json_format.loads(path.read_text()))
    return json_format.dumps(batches.position)


def _cluster_options(ps: ServerOptions, directory: Path) -> ClusterOptions:
    cache = None
    if ps.cache_rows:
        cache = CacheOptions(ps.cache_rows, ps.pull_bound, ps.push_bound, ps.evict)
    return ClusterOptions(
        directory, ps.servers, ps.workers, consistency_from_text(ps.consistency), ps.deal,
        cache, ps.delay_scaled, ps.snapshot_every, ps.fsync,
        ps.patience_s, ps.restarts, ps.address,
    )  # fmt: skip
