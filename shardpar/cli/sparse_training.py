"""Runs the training of tables from a config: the heavy half of `shardpar train` for them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardpar.capture.model import abstract_model
from shardpar.cli.planning import use_devices
from shardpar.cli.signals import asked_by_signal
from shardpar.cli.stored import earlier_run, require_same
from shardpar.cli.tables import console, print_json
from shardpar.config.save import to_gin, to_yaml
from shardpar.config.schema import SparseConfig
from shardpar.config.tables_model import TablesModel
from shardpar.errors import DataError, RunError
from shardpar.lowering.devices import local_cluster
from shardpar.ps.cluster_loop import ClusterOutcome
from shardpar.ps.data.batches import eval_batches
from shardpar.ps.data.open import open_parts
from shardpar.ps.data.options import SparseDataOptions
from shardpar.ps.data.source import Source
from shardpar.ps.embed import tables_of
from shardpar.ps.ids import IdMap, IdOptions
from shardpar.ps.loop import SparseOutcome, SparseSurroundings, arrays_of
from shardpar.ps.loop import train as run_loop
from shardpar.ps.placement import Placement
from shardpar.ps.planning import Choice, Frequencies, choose
from shardpar.ps.program import SparseOptions, SparseProgram
from shardpar.ps.rules import dense_optimizer
from shardpar.ps.saving import Savings
from shardpar.ps.table import Table
from shardpar.run.directory import RunDirectory
from shardpar.run.environment import describe_environment
from shardpar.run.metrics import MetricsLog
from shardpar.run.progress import Progress, clock_time
from shardpar.run.report import write_report

_SAMPLED_BATCHES = 8
_TABLE_SHARE = 0.8
_MAY_CHANGE = (
    "data.path", "data.eval_path", "table.placement", "table.capacity", "table.ragged",
    "ps.snapshot_every", "ps.fsync", "ps.patience_s", "ps.restarts", "ps.address",
)  # fmt: skip


def train(
    config: SparseConfig, name: str, devices: int | None, *, json: bool, dry_run: bool
) -> None:
    """`shardpar train` of a model with tables, in this process."""
    use_devices(devices)
    started = time.monotonic()
    path = config.train.run_dir
    require_same_run(config)
    data = data_options(config)
    model = TablesModel(config.model, config.table)
    with asked_by_signal() as signals, Progress() as progress, ExitStack() as stack:
        with progress.phase("reading the data"):
            parts = open_parts(data)
            mapped = config.table.ids == "mapped"
            first = first_batches(parts[0], data, config.train.global_batch, mapped=mapped)
        model.require(first)
        with progress.phase("tracing the model"):
            task = _task(config, model, first)
        for name_, choice in task.choices.items():
            progress.say(f"table {name_}: {choice.reason}")
        if dry_run:
            return
        directory = RunDirectory(Path(path)) if path else RunDirectory.fresh(name, datetime.now())
        directory.make()
        config = replace(config, train=replace(config.train, run_dir=str(directory.path)))
        ids = _id_map(config)
        savings = stack.enter_context(
            Savings.open(
                directory.checkpoints, task.program, config.checkpoint, config.train.full_every,
                progress.say, ids,
            )
        )  # fmt: skip
        metrics = stack.enter_context(
            MetricsLog(
                directory.metrics,
                tensorboard=directory.tensorboard,
                stdout=sys.stdout if json else None,
            )
        )
        texts = {"config.yaml": to_yaml(config), "config.gin": to_gin(config)}
        progress.say(f"run directory: {directory.path}")
        outcome = run_loop(
            task.program,
            parts,
            model.predict,
            data,
            config.train,
            config.checkpoint,
            SparseSurroundings(
                savings,
                metrics,
                progress,
                texts,
                lambda: directory.write(texts),
                signals.should_stop,
                total_steps(config, data),
                ids,
                model.require,
            ),
        )
    conclude(config, name, directory, outcome, started, json=json)


@dataclass(frozen=True)
class _Task:
    program: SparseProgram
    choices: dict[str, Choice]


@contextmanager
def naming_what_does_not_fit(source: str, batch: Mapping[str, Any]) -> Iterator[None]:
    """Says in words what a model asks of a batch that is not in it.

    Raises:
      DataError: in the place of what the model raised.
    """
    try:
        yield
    except KeyError as error:
        raise DataError(
            f"{source} asks for batch[{error}], which this data has not: it has "
            f"{', '.join(batch)}; use another data.format or another model"
        ) from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{source} does not take this data: {str(error).splitlines()[0]}") from None


def _task(config: SparseConfig, model: TablesModel, sample: dict[str, np.ndarray]) -> _Task:
    """The program for a config's model, its tables placed."""
    batch = {name: x[: config.train.global_batch] for name, x in sample.items()}
    count = len(jax.devices())
    frequencies = Frequencies.of(sample["ids"])

    def lowered(sparse: SparseOptions) -> SparseProgram:
        with naming_what_does_not_fit(config.model.source, batch):
            return SparseProgram(
                model.loss, model.init, dense_optimizer(config.optimizer), batch=batch,
                options=sparse,
            )  # fmt: skip

    written = config.table.placement
    chosen: dict[str, Choice] = {}
    placement: Placement | dict[str, Placement] | None = None
    capacity = config.table.capacity
    if written == "auto":
        limit = _TABLE_SHARE * local_cluster().kinds[0].memory_bytes
        tables = _tables(model.init)
        chosen = {
            name: choose(
                table,
                frequencies,
                global_batch=config.train.global_batch,
                devices=count,
                memory_bytes=limit / len(tables),
            )
            for name, table in tables.items()
        }
        placement = {name: choice.placement for name, choice in chosen.items()}
    elif written == "replicated":
        placement = Placement(replicated=True)
    else:
        placement = Placement(columns=count) if written == "columns" else Placement(rows=count)
    sparse = SparseOptions(placement, capacity, ragged=config.table.ragged)
    return _Task(lowered(sparse), chosen)


def _tables(init: Callable[[Any], Any]) -> dict[str, Table]:
    model = abstract_model(init, may_be_empty=True)
    return {name: layer.table for name, layer in tables_of(model.merge(model.params, model.rest))}


def data_options(config: SparseConfig) -> SparseDataOptions:
    """The data's options, with the table's rows as the range of ids."""
    rows = config.model.get("rows")
    if config.table.ids == "mapped":
        return config.data
    if config.data.rows is None and isinstance(rows, int):
        return replace(config.data, rows=rows)
    return config.data


def _id_map(config: SparseConfig) -> IdMap | None:
    if config.table.ids == "rows":
        return None
    rows = config.model.get("rows")
    assert isinstance(rows, int)
    table = config.table
    return IdMap(rows, IdOptions(table.admit_after, table.evict, table.ttl_steps))


def first_batches(
    source: Source, data: SparseDataOptions, global_batch: int, *, mapped: bool
) -> dict[str, np.ndarray]:
    """The first batches, one after the other: what a batch is like, and which ids are frequent."""
    first = list(islice(eval_batches(source, data, global_batch), _SAMPLED_BATCHES))
    if not first:
        raise DataError("the data has no sample; give it at least one line")
    ids = np.concatenate([batch.ids for batch in first])
    if mapped:
        # Which rows they will get does not matter here, only how often each occurs.
        ids = np.unique(ids, return_inverse=True)[1].reshape(ids.shape)
    parts = [
        arrays_of(batch, rows) for batch, rows in zip(first, np.split(ids, len(first)), strict=True)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def total_steps(config: SparseConfig, data: SparseDataOptions) -> int | None:
    """How many steps a run has, where that is known without reading its files."""
    if data.format == "clicks":
        epoch = -(-data.samples // config.train.global_batch)
        steps = epoch * config.train.epochs
        return steps if config.train.steps is None else min(steps, config.train.steps)
    return config.train.steps


def require_same_run(config: SparseConfig) -> None:
    """Refuses to go on with another model or other data than the run in `train.run_dir` had.

    Raises:
      ConfigError: naming what differs.
    """
    earlier = earlier_run(config)
    if earlier is not None:
        directory, then = earlier
        require_same(directory, _fixed(then), _fixed(config))


def _fixed(config: SparseConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"model.source": config.model.source, "train.seed": config.train.seed}
    values |= {f"model.{key}": value for key, value in config.model.options}
    for section in ("data", "optimizer", "table", "ps"):
        values |= {f"{section}.{name}": x for name, x in vars(getattr(config, section)).items()}
    # Files may have moved; the position in the data proves that they are the same.
    for moved in _MAY_CHANGE:
        values.pop(moved, None)
    if config.ps.servers:
        # A worker's batches are counted in its steps.
        values["train.global_batch"] = config.train.global_batch
    return values


def conclude(
    config: SparseConfig,
    name: str,
    directory: RunDirectory,
    outcome: SparseOutcome | ClusterOutcome,
    started: float,
    *,
    json: bool,
) -> None:
    """Says how a run ended, and writes its report.

    Raises:
      RunError: it diverged.
    """
    screen = console(stderr=True)
    if outcome.stopped:
        screen.print(
            f"stopped after step {outcome.step} and saved; go on with: "
            f"shardpar train --resume {directory.path}",
            highlight=False,
        )
        return
    diverged = outcome.loss is not None and not math.isfinite(outcome.loss)
    took = clock_time(time.monotonic() - started)
    write_report(
        directory,
        title=name,
        status="diverged" if diverged else "finished",
        facts={"model": config.model.source, "this session": took},
        environment=describe_environment(jax.devices()),
    )
    if diverged:
        raise RunError(
            f"the run diverged: the loss is not finite after step {outcome.step}; begin again with "
            f"a lower table.learning_rate or optimizer.learning_rate. Report: {directory.report}"
        )
    words = [f"step {outcome.step}"]
    words += [f"loss {outcome.loss:.4f}"] if outcome.loss is not None else []
    words += [f"{key} {value:.4f}" for key, value in outcome.scores.items()]
    screen.print(f"done in {took}: {', '.join(words)}", highlight=False)
    if json:
        print_json({"step": outcome.step, **outcome.scores})
    screen.print(f"report: {directory.report}", highlight=False)
