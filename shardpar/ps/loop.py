"""The training loop of tables: batches in, metrics and checkpoints out, stoppable at any moment.

The distinct ids of the next batch are found while the devices work on this one. A
checkpoint holds the position in the data, so a run that was killed and resumed sees every
sample once per epoch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardpar.errors import DataError
from shardpar.lowering.devices import peak_bytes_in_use
from shardpar.ps.asked import Wanted
from shardpar.ps.data.batch import SparseBatch
from shardpar.ps.data.batches import SparseBatches, eval_batches, train_batches
from shardpar.ps.data.options import SparseDataOptions
from shardpar.ps.data.source import Source
from shardpar.ps.ids import IdMap
from shardpar.ps.metrics import auc, log_loss
from shardpar.ps.options import SparseTrainOptions
from shardpar.ps.program import SparseProgram, SparseState
from shardpar.ps.saving import Savings
from shardpar.run.metrics import MetricsLog
from shardpar.run.options import CheckpointOptions
from shardpar.run.progress import Figures, Progress
from shardpar.run.retention import due

POSITION = "position.json"

Predict = Callable[[Any, Mapping[str, Any]], Any]
Seen = tuple[np.ndarray, float, float]
Require = Callable[[Mapping[str, np.ndarray]], None]


def nothing_required(_: Mapping[str, np.ndarray]) -> None:
    """Of a batch."""


@dataclass(frozen=True)
class SparseOutcome:
    """How a run ended.

    Attributes:
      state: the last one.
      step: steps done in all.
      loss: of the last step; None if none ran.
      scores: of the last evaluation.
      stopped: a signal ended it.
    """

    state: SparseState
    step: int
    loss: float | None
    scores: Mapping[str, float]
    stopped: bool


@dataclass(frozen=True)
class SparseSurroundings:
    """What the loop touches outside itself.

    Attributes:
      savings, metrics, progress: of the run directory.
      files: small texts to keep beside each checkpoint.
      begun: called when steps will be done.
      should_stop: asked after every step.
      total_steps: how many there will be, where that is known.
      ids: maps ids to rows; None where they are rows.
      require: looks at the arrays of every batch, and raises what is wrong with them.
    """

    savings: Savings
    metrics: MetricsLog
    progress: Progress
    files: Mapping[str, str]
    begun: Callable[[], None]
    should_stop: Callable[[], bool]
    total_steps: int | None
    ids: IdMap | None = None
    require: Require = nothing_required


def arrays_of(batch: SparseBatch, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What a model sees of a batch, by name; slots without a feature have the id -1.

    Args:
      batch: as it was read.
      rows: int32[batch, slots], in the place of ids that are mapped.

    Raises:
      DataError: an id is beyond int32; give `data.rows`, so that ids are checked or hashed.
    """
    ids = batch.ids if rows is None else rows
    if ids.size and ids.max() > np.iinfo(np.int32).max:
        raise DataError(
            f"id {ids.max()} is beyond the rows of any table; hash ids with data.hashed=true"
        )
    seen = {
        "ids": np.where(batch.values == 0, -1, ids).astype(np.int32),
        "values": batch.values,
        "labels": batch.labels,
        "weights": batch.weights,
    }
    if batch.fields is not None:
        seen["fields"] = batch.fields
    if batch.dense is not None:
        seen["dense"] = batch.dense
    return seen


def train(
    program: SparseProgram,
    parts: tuple[Source, Source | None],
    predict: Predict,
    data: SparseDataOptions,
    options: SparseTrainOptions,
    saving: CheckpointOptions,
    around: SparseSurroundings,
) -> SparseOutcome:
    """Trains all epochs, from the newest good checkpoint if there is one.

    Args:
      program: of the model.
      parts: training and evaluation data.
      predict: `predict(model, batch)` gives scores [batch], or [batch, classes].
      data: how the data are shuffled, and how many bad lines they may have.
      options: epochs, batch, evaluation.
      saving: when to save.
      around: checkpoints, metrics, progress.

    Raises:
      DataError: a line cannot be read, an id is outside its table, or the data are not what
        the run began with.
      CheckpointError: every checkpoint is damaged, or the disk is full.
    """
    batches = train_batches(parts[0], data, options.global_batch, epochs=options.epochs)
    found = around.savings.latest()
    step = 0
    if found is None:
        state = program.init(options.seed)
        around.metrics.truncate_after(0)
    else:
        step, state = found.step, found.state
        batches.restore(json.loads(found.files[POSITION]))
        around.metrics.truncate_after(step)
        around.progress.say(f"going on from step {step}")
    around.begun()
    loop = _Loop(program, parts[1], predict, data, options, saving, around)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        return loop.run(state, step, _ahead(thread, batches, program, around))


@dataclass(frozen=True)
class _Ready:
    """A batch to come; what is mapped is prepared in its turn only, since rows change hands."""

    batch: SparseBatch
    prepared: tuple[dict[str, Any], Wanted | None] | None
    samples: float
    position: dict[str, Any]


def _ahead(
    thread: ThreadPoolExecutor,
    batches: SparseBatches,
    program: SparseProgram,
    around: SparseSurroundings,
) -> Iterator[_Ready]:
    """Batches, the next one being made while one is used."""

    def make() -> _Ready | None:
        batch = next(batches, None)
        if batch is None:
            return None
        arrays = arrays_of(batch) if around.ids is None else None
        around.require(arrays or {n: x for n, x in vars(batch).items() if x is not None})
        prepared = program.prepared(arrays) if arrays is not None else None
        return _Ready(batch, prepared, float((batch.weights > 0).sum()), batches.position)

    coming = thread.submit(make)
    while (ready := coming.result()) is not None:
        coming = thread.submit(make)
        yield ready


class _Loop:
    def __init__(
        self,
        program: SparseProgram,
        evaluation: Source | None,
        predict: Predict,
        data: SparseDataOptions,
        options: SparseTrainOptions,
        saving: CheckpointOptions,
        around: SparseSurroundings,
    ) -> None:
        self.program, self.evaluation, self.predict = program, evaluation, predict
        self.data, self.options, self.saving, self.around = data, options, saving, around
        self.step_s: float | None = None

    def run(self, state: SparseState, step: int, batches: Iterator[_Ready]) -> SparseOutcome:
        options, around = self.options, self.around
        saved, saved_s, last_s = step, time.monotonic(), time.perf_counter()
        loss: float | None = None
        scores: dict[str, float] = {}
        position: dict[str, Any] | None = None
        stopped, evaluated = False, -1
        ready: _Ready | None
        for ready in batches:
            if options.steps is not None and step >= options.steps:
                break
            state, arrays, wanted = self._prepared(state, ready)
            state, metrics = self.program.take(state, arrays, wanted)
            around.savings.mark(wanted)
            step, position = step + 1, ready.position
            loss = float(metrics["loss"])
            now = time.perf_counter()
            self._record(step, loss, metrics, ready.samples, now - last_s)
            stopped = around.should_stop()
            if options.eval_every and step % options.eval_every == 0 and not stopped:
                scores, evaluated = self._evaluate(state, step), step
            timely = due(
                self.saving, step=step, now_s=time.monotonic(), last_step=saved, last_s=saved_s
            )
            if timely or stopped:
                self._save(step, state, position)
                saved, saved_s = step, time.monotonic()
            last_s = time.perf_counter()
            if stopped:
                break
        if position is not None and saved != step:
            self._save(step, state, position)
        if position is None and step:
            around.progress.say(
                f"nothing is left to train after step {step}; raise train.epochs or train.steps to "
                "go on"
            )
        known = position is None and around.metrics.has(step, "eval_loss")
        if not stopped and evaluated != step and not known:
            scores = self._evaluate(state, step)
        return SparseOutcome(state, step, loss, scores, stopped)

    def _prepared(
        self, state: SparseState, ready: _Ready
    ) -> tuple[SparseState, dict[str, Any], Wanted | None]:
        """A step's arrays; rows that change hands in it begin anew."""
        if ready.prepared is not None:
            return state, *ready.prepared
        assert self.around.ids is not None
        mapped = self.around.ids(np.where(ready.batch.values == 0, -1, ready.batch.ids))
        if mapped.fresh_rows.size:
            for name in self.program.tables:
                state = self.program.renew(state, name, mapped.fresh_rows)
            self.around.savings.touch(mapped.fresh_rows)
        return state, *self.program.prepared(arrays_of(ready.batch, mapped.rows))

    def _record(
        self, step: int, loss: float, metrics: Mapping[str, Any], samples: float, took_s: float
    ) -> None:
        # The first step compiles.
        if self.step_s is None:
            self.step_s = math.nan
        else:
            known = math.isfinite(self.step_s)
            self.step_s = 0.9 * self.step_s + 0.1 * took_s if known else took_s
        row: dict[str, Any] = {"loss": loss}
        if math.isfinite(self.step_s):
            row |= {
                "step_s": round(self.step_s, 6),
                "samples_per_s": round(samples / self.step_s, 1),
            }
        rounds, outside = int(metrics["rounds"]), int(metrics["ids_outside"])
        if rounds > 1:
            row["rounds"] = rounds
        if outside:
            raise DataError(
                f"step {step}: {outside} ids are outside their tables; raise model.rows, or hash "
                "ids with data.hashed=true"
            )
        if not math.isfinite(loss):
            row["skipped"] = True
            self.around.progress.say(f"step {step}: the loss is not finite, update skipped")
        self.around.metrics.write(step, row)
        if step % self.options.log_every == 0:
            self.around.progress.update(
                Figures(
                    step,
                    max(step, self.around.total_steps or step),
                    loss,
                    step_s=self.step_s if math.isfinite(self.step_s) else None,
                    peak_bytes=peak_bytes_in_use(self.program.devices),
                )
            )

    def _evaluate(self, state: SparseState, step: int) -> dict[str, float]:
        if self.evaluation is None:
            return {}

        def seen(batch: SparseBatch) -> Seen:
            arrays = arrays_of(batch, self._known(batch))
            self.around.require(arrays)
            out = np.asarray(self.program.apply(state, arrays, self.predict))
            cost = self.program.evaluate(state, arrays)
            weight = float(cost["weight"])
            return out, float(cost["loss"]) * weight, weight

        around = self.around
        with around.progress.phase("evaluating"):
            batches = eval_batches(self.evaluation, self.data, self.options.global_batch)
            scores = evaluated(batches, seen)
        tell_scores(around.metrics, around.progress, step, scores)
        return scores

    def _known(self, batch: SparseBatch) -> np.ndarray | None:
        """The rows of a batch's ids, where they are mapped; those without one are zeros."""
        if self.around.ids is None:
            return None
        distinct, inverse = np.unique(batch.ids, return_inverse=True)
        rows = self.around.ids.find(distinct)[inverse.reshape(-1)].reshape(batch.ids.shape)
        return rows.astype(np.int32)

    def _save(self, step: int, state: SparseState, position: Mapping[str, Any]) -> None:
        files = {**self.around.files, POSITION: json.dumps(position)}
        self.around.savings.save(step, state, files)


def evaluated(
    batches: Iterable[SparseBatch], seen: Callable[[SparseBatch], Seen]
) -> dict[str, float]:
    """How good a model is on batches that each sample is in once.

    Args:
      batches: of the evaluation data.
      seen: of a batch, its predictions, its loss as a sum, and over what weight.

    Returns:
      "eval_loss", and what `scores_of` gives.
    """
    labels, found, weights = [], [], []
    total = weight = 0.0
    for batch in batches:
        there = batch.weights > 0
        out, loss, over = seen(batch)
        total, weight = total + loss, weight + over
        labels.append(batch.labels[there])
        weights.append(batch.weights[there])
        found.append(out[there])
    scores = {"eval_loss": total / weight if weight else math.nan}
    if labels:
        scores |= scores_of(np.concatenate(labels), np.concatenate(found), np.concatenate(weights))
    return scores


def tell_scores(
    metrics: MetricsLog, progress: Progress, step: int, scores: Mapping[str, float]
) -> None:
    """Writes down what an evaluation found, and says it."""
    metrics.write(step, scores)
    text = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    progress.say(f"step {step}: {text}")


def scores_of(labels: np.ndarray, found: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """How good predictions are: what fits their kind.

    Args:
      labels: [n].
      found: probabilities or scores [n], or probabilities of classes [n, classes].
      weights: [n].

    Returns:
      For two labels "auc", and "logloss" of probabilities; for classes "accuracy" and
      "logloss"; else "rmse".

    >>> scores_of(np.array([0.0, 1.0]), np.array([0.5, 0.5]), np.ones(2))["auc"]
    0.5
    """
    if found.ndim == 2:
        right = (found.argmax(1) == labels) * weights
        chosen = np.maximum(found[np.arange(len(labels)), labels.astype(int)], 1e-15)
        return {
            "accuracy": float(right.sum() / weights.sum()),
            "logloss": float((-np.log(chosen) * weights).sum() / weights.sum()),
        }
    if np.unique(labels).size > 2:
        miss = (found - labels) ** 2 * weights
        return {"rmse": float(math.sqrt(miss.sum() / weights.sum()))}
    scores = {"auc": auc(labels, found, weights)}
    if found.size and found.min() >= 0 and found.max() <= 1:
        scores["logloss"] = log_loss(labels, found, weights)
    return scores
