"""The training loop of servers and workers: metrics and evaluations while others do the steps.

Servers keep every update that they acknowledge, so that there is nothing to save: a run that
was stopped or killed goes on with its directory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from shardpar.ps.cluster import Cluster, Trained
from shardpar.ps.data.batch import SparseBatch
from shardpar.ps.data.batches import eval_batches
from shardpar.ps.data.options import SparseDataOptions
from shardpar.ps.data.source import Source
from shardpar.ps.loop import (
    Predict,
    Require,
    Seen,
    arrays_of,
    evaluated,
    nothing_required,
    tell_scores,
)
from shardpar.ps.options import SparseTrainOptions
from shardpar.run.metrics import MetricsLog
from shardpar.run.progress import Figures, Progress

_TOLD_S = 0.5


@dataclass(frozen=True)
class ClusterOutcome:
    """How a run ended.

    Attributes:
      step: that every worker has finished.
      loss: of the last step that is known of all workers.
      scores: of the last evaluation.
      stopped: a signal ended it.
    """

    step: int
    loss: float | None
    scores: Mapping[str, float]
    stopped: bool


@dataclass
class ClusterLoop:
    """Trains a cluster up to a step, and tells people how it goes.

    Attributes:
      cluster: running.
      evaluation: data, or None.
      predict: `predict(model, batch)` gives scores [batch], or [batch, classes].
      data: how evaluation data are read.
      options: batch, evaluation.
      metrics, progress: of the run directory.
      should_stop: asked several times a second.
      require: looks at the arrays of every evaluated batch, and raises what is wrong with them.
    """

    cluster: Cluster
    evaluation: Source | None
    predict: Predict
    data: SparseDataOptions
    options: SparseTrainOptions
    metrics: MetricsLog
    progress: Progress
    should_stop: Callable[[], bool]
    require: Require = nothing_required
    _told: int = field(default=0, init=False)
    _told_s: float = field(default=-math.inf, init=False)
    _timed_s: float | None = field(default=None, init=False)
    _loss: float | None = field(default=None, init=False)
    _step_s: float | None = field(default=None, init=False)

    def run(self, steps: int) -> ClusterOutcome:
        """Trains until every worker has finished so many steps in all.

        Raises:
          DataError: a worker cannot read a line, or an id is outside its table.
          RunError: a process stays away, or is killed too often.
        """
        step = self._told = self.cluster.steps
        self.metrics.truncate_after(step)
        if step >= steps > 0:
            self.progress.say(
                f"nothing is left to train after step {step}; raise train.epochs or train.steps to "
                "go on"
            )
            scores = {} if self.metrics.has(step, "eval_loss") else self._evaluate(step)
            return ClusterOutcome(step, None, scores, stopped=False)
        if step:
            self.progress.say(f"going on from step {step}")
        every = self.options.eval_every or steps
        scores: dict[str, float] = {}
        evaluated_at, stopped = -1, False
        while step < steps and not stopped:
            done = self.cluster.train(min(steps, (step // every + 1) * every), self._watch(steps))
            step, stopped = done.steps, self.should_stop()
            self._tell(steps)
            self._tell_of_workers(step, done)
            if not stopped and (self.options.eval_every or step >= steps):
                scores, evaluated_at = self._evaluate(step), step
        if not stopped and evaluated_at != step:
            scores = self._evaluate(step)
        return ClusterOutcome(step, self._loss, scores, stopped)

    def _watch(self, steps: int) -> Callable[[tuple[int, ...]], bool]:
        def watch(_: tuple[int, ...]) -> bool:
            if time.monotonic() - self._told_s > _TOLD_S:
                self._tell(steps)
            return self.should_stop()

        return watch

    def _tell(self, of: int) -> None:
        """Writes down the losses that are new."""
        self._told_s = time.monotonic()
        losses = self.cluster.losses(self._told)
        if not losses:
            return
        done = max(losses) + 1
        since_s, self._timed_s = self._timed_s, self._told_s
        self._step_s = None if since_s is None else (self._told_s - since_s) / (done - self._told)
        rate = self._step_s and round(self.options.global_batch / self._step_s, 1)
        for step, loss in losses.items():
            row = {"loss": loss} | ({"samples_per_s": rate} if rate else {})
            if not math.isfinite(loss):
                self.progress.say(f"step {step + 1}: the loss is not finite, update skipped")
                row["skipped"] = True
            self.metrics.write(step + 1, row)
            self._loss = loss
        self._told = done
        self.progress.update(Figures(done, max(of, done), self._loss, step_s=self._step_s))

    def _tell_of_workers(self, step: int, done: Trained) -> None:
        self.metrics.write(
            step,
            {
                "rows_asked": done.asked,
                "rows_pulled": done.pulled,
                "rows_pushed": done.pushed,
                "most_ahead": done.most_ahead,
                "worker_restarts": done.worker_restarts,
            },
        )
        for worker in done.slow:
            mean_s = np.mean(list(done.seconds_per_sample.values()))
            times = done.seconds_per_sample[worker] / mean_s
            self.progress.say(f"worker {worker} is slow: {times:.1f} times the mean per sample")

    def _evaluate(self, step: int) -> dict[str, float]:
        if self.evaluation is None:
            return {}
        program = self.cluster.program

        def seen(batch: SparseBatch) -> Seen:
            arrays = arrays_of(batch)
            self.require(arrays)
            total, weight = self.cluster.apply(arrays, program.evaluate)
            out = np.asarray(self.cluster.apply(arrays, self.predict))
            return out, float(total), float(weight)

        size = self.options.global_batch // self.cluster.options.workers
        with self.progress.phase("evaluating"):
            scores = evaluated(eval_batches(self.evaluation, self.data, size), seen)
        tell_scores(self.metrics, self.progress, step, scores)
        # What evaluating took is no part of the next steps.
        self._timed_s = None
        return scores
