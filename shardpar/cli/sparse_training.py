"""Runs the training of tables from a config: the heavy half of `shardpar train` for them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardpar.capture.model import abstract_model
from shardpar.cli.planning import use_devices
from shardpar.cli.signals import asked_by_signal
from shardpar.cli.stored import require_same
from shardpar.cli.tables import console, print_json
from shardpar.config.load import load_any
from shardpar.config.model_source import build_options, find_model, load_model_source
from shardpar.config.save import to_gin, to_yaml
from shardpar.config.schema import SparseConfig
from shardpar.errors import ConfigError, DataError, RunError
from shardpar.lowering.devices import local_cluster
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
from shardpar.ps.rules import dense_optimizer, row_optimizer, with_rule
from shardpar.ps.saving import Savings
from shardpar.ps.table import Table
from shardpar.run.directory import RunDirectory
from shardpar.run.environment import describe_environment
from shardpar.run.metrics import MetricsLog
from shardpar.run.progress import Progress, clock_time
from shardpar.run.report import write_report

_SAMPLED_BATCHES = 8
_TABLE_SHARE = 0.8


def train(
    config: SparseConfig, name: str, devices: int | None, *, json: bool, dry_run: bool
) -> None:
    """`shardpar train` of a model with tables."""
    use_devices(devices)
    started = time.monotonic()
    path = config.train.run_dir
    if path is not None and RunDirectory(Path(path)).config_yaml.is_file():
        _require_same_run(config, RunDirectory(Path(path)))
    data = _data_options(config)
    with asked_by_signal() as signals, Progress() as progress, ExitStack() as stack:
        with progress.phase("reading the data"):
            parts = open_parts(data)
            mapped = config.table.ids == "mapped"
            first = _sample(parts[0], data, config.train.global_batch, mapped=mapped)
        with progress.phase("tracing the model"):
            task = _task(config, first)
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
            task.predict,
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
                _total_steps(config, data),
                ids,
            ),
        )
    _conclude(config, name, directory, outcome, started, json=json)


@dataclass(frozen=True)
class _Task:
    program: SparseProgram
    predict: Callable[[Any, Mapping[str, Any]], Any]
    choices: dict[str, Choice]


def _task(config: SparseConfig, sample: dict[str, np.ndarray]) -> _Task:
    """The program for a config's model, its tables placed."""
    module = load_model_source(find_model(config.model.source))
    options = build_options(module, config.model)
    rule = row_optimizer(config.table)

    def init(rngs: Any) -> Any:
        return with_rule(module.build(options, rngs), rule)

    batch = {name: x[: config.train.global_batch] for name, x in sample.items()}
    count = len(jax.devices())
    frequencies = Frequencies.of(sample["ids"])

    def lowered(sparse: SparseOptions) -> SparseProgram:
        try:
            return SparseProgram(
                module.loss, init, dense_optimizer(config.optimizer), batch=batch, options=sparse
            )
        except KeyError as error:
            raise DataError(
                f"{config.model.source} asks for batch[{error}], which this data has not: it has "
                f"{', '.join(batch)}; use another data.format or another model"
            ) from None
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{config.model.source} does not take this data: {str(error).splitlines()[0]}"
            ) from None

    written = config.table.placement
    chosen: dict[str, Choice] = {}
    placement: Placement | dict[str, Placement] | None = None
    capacity = config.table.capacity
    if written == "auto":
        limit = _TABLE_SHARE * local_cluster().kinds[0].memory_bytes
        tables = _tables(init)
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
    program = lowered(SparseOptions(placement, capacity))
    predict = getattr(module, "predict", None)
    if predict is None:
        raise ConfigError(
            f"{config.model.source} has no function `predict(model, batch)`, which evaluation "
            "needs; write one that gives a score for each sample"
        )
    return _Task(program, predict, chosen)


def _tables(init: Callable[[Any], Any]) -> dict[str, Table]:
    model = abstract_model(init, may_be_empty=True)
    return {name: layer.table for name, layer in tables_of(model.merge(model.params, model.rest))}


def _data_options(config: SparseConfig) -> SparseDataOptions:
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


def _sample(
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


def _total_steps(config: SparseConfig, data: SparseDataOptions) -> int | None:
    if data.format == "clicks":
        epoch = -(-data.samples // config.train.global_batch)
        steps = epoch * config.train.epochs
        return steps if config.train.steps is None else min(steps, config.train.steps)
    return config.train.steps


def _require_same_run(config: SparseConfig, directory: RunDirectory) -> None:
    """Refuses to go on with another model or other data than the run had.

    Raises:
      ConfigError: naming what differs.
    """
    then = load_any(str(directory.config_yaml), find_files=False)
    now_, then_ = _fixed(config), _fixed(then)
    require_same(directory, then_, now_)


def _fixed(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"model.source": config.model.source, "train.seed": config.train.seed}
    values |= {f"model.{key}": value for key, value in config.model.options}
    for section in ("data", "optimizer", "table"):
        part = getattr(config, section, None)
        if part is not None:
            values |= {f"{section}.{f.name}": getattr(part, f.name) for f in fields(part)}
    # Files may have moved; the position in the data proves that they are the same.
    for moved in ("data.path", "data.eval_path", "table.placement", "table.capacity"):
        values.pop(moved, None)
    return values


def _conclude(
    config: SparseConfig,
    name: str,
    directory: RunDirectory,
    outcome: SparseOutcome,
    started: float,
    *,
    json: bool,
) -> None:
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
