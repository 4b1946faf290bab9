"""The loop of a simulated federation: rounds in, metrics and checkpoints out, stoppable between.

A round under privacy is written down in the ledger before it is run, so that no result is used that
nobody paid for, and training ends where the budget does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from shardpar.errors import RunError
from shardpar.fl.evaluation import Evaluation
from shardpar.fl.saving import Savings
from shardpar.fl.simulated_rounds import Position, RoundFigures, Rounds
from shardpar.lowering.devices import peak_bytes_in_use
from shardpar.run.metrics import MetricsLog
from shardpar.run.options import CheckpointOptions
from shardpar.run.progress import Figures, Progress
from shardpar.run.retention import due

if TYPE_CHECKING:
    from shardpar.fl.ledger import Ledger, Release


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      position: after the last round.
      loss: of the last round; None if none ran, or clients do not tell.
      scores: of the last evaluation.
      epsilon: spent; None without privacy.
      stopped: a signal ended it.
      budget_spent: privacy's budget ended it before the last round.
    """

    position: Position
    loss: float | None
    scores: Mapping[str, float]
    epsilon: float | None
    stopped: bool
    budget_spent: bool


@dataclass(frozen=True)
class Surroundings:
    """What the loop touches outside itself.

    Attributes:
      savings, metrics, progress: of the run directory.
      files: small texts to keep beside each checkpoint.
      begun: called when rounds will be done.
      should_stop: asked after every round.
      spend: writes a round down before it is run: ε spent, or None where the budget does not allow
        it. None without privacy.
    """

    savings: Savings
    metrics: MetricsLog
    progress: Progress
    files: Mapping[str, str]
    begun: Callable[[], None]
    should_stop: Callable[[], bool]
    spend: Callable[[int], float | None] | None = None


def spending(ledger: Ledger, release: Release) -> Callable[[int], float | None]:
    """Writes rounds down in a ledger.

    A round that is run again after a crash comes to the same result, which costs nothing more.
    """

    def spend(round_: int) -> float | None:
        if len(ledger.releases) > round_:
            return ledger.spent()
        return ledger.append(release, f"round {round_}") if ledger.allows(release) else None

    return spend


def train(
    rounds: Rounds,
    count: int,
    evaluation: Evaluation | None,
    eval_every: int,
    saving: CheckpointOptions,
    around: Surroundings,
) -> Outcome:
    """Trains all rounds, from the newest good checkpoint if there is one.

    Args:
      rounds: of the federation.
      count: how many there are.
      evaluation: of the global model; None for none.
      eval_every: evaluate after each so many rounds; 0 only at the end.
      saving: when to save.
      around: checkpoints, metrics, progress.

    Raises:
      RunError: the model diverged.
      CheckpointError: every checkpoint is damaged, or the disk is full.
    """
    position = around.savings.latest(rounds)
    if position is None:
        position = rounds.begin()
    else:
        around.progress.say(f"going on from round {position.round_}")
    around.metrics.truncate_after(position.round_)
    around.begun()
    return _Loop(rounds, count, evaluation, eval_every, saving, around).run(position)


@dataclass
class _Loop:
    rounds: Rounds
    count: int
    evaluation: Evaluation | None
    eval_every: int
    saving: CheckpointOptions
    around: Surroundings
    round_s: float | None = None

    def run(self, position: Position) -> Outcome:
        around = self.around
        saved, saved_s = position.round_, time.monotonic()
        loss: float | None = None
        epsilon: float | None = None
        scores: dict[str, float] = {}
        evaluated, stopped, refused = -1, False, False
        coming = self.rounds.after(position)
        while position.round_ < self.count and not stopped:
            if around.spend is not None:
                spent = around.spend(position.round_)
                if spent is None:
                    refused = True
                    break
                epsilon = spent
            began_s = time.perf_counter()
            position, figures = next(coming)
            loss = figures.loss
            jax.block_until_ready(position.params)
            took_s = time.perf_counter() - began_s
            stopped = around.should_stop()
            last = position.round_ == self.count
            if last or (self.eval_every and position.round_ % self.eval_every == 0):
                scores, evaluated = self._evaluate(position), position.round_
            self._record(
                position, figures, scores if evaluated == position.round_ else {}, epsilon, took_s
            )
            timely = due(
                self.saving, step=position.round_, now_s=time.monotonic(), last_step=saved,
                last_s=saved_s,
            )  # fmt: skip
            if timely or stopped:
                around.savings.save(position, around.files)
                saved, saved_s = position.round_, time.monotonic()
        if saved != position.round_:
            around.savings.save(position, around.files)
        if not stopped and evaluated != position.round_:
            scores = self._evaluate(position)
        return Outcome(position, loss, scores, epsilon, stopped, refused)

    def _evaluate(self, position: Position) -> dict[str, float]:
        if self.evaluation is None:
            return {}
        return self.evaluation(jax.device_get(position.params))

    def _record(
        self,
        position: Position,
        figures: RoundFigures,
        scores: Mapping[str, float],
        epsilon: float | None,
        took_s: float,
    ) -> None:
        # The first round compiles.
        if self.round_s is None:
            self.round_s = math.nan
        else:
            known = math.isfinite(self.round_s)
            self.round_s = 0.9 * self.round_s + 0.1 * took_s if known else took_s
        round_ = position.round_
        row: dict[str, Any] = {"round": round_, "clients": figures.clients}
        if figures.loss is not None:
            row["loss"] = figures.loss
        row |= {**scores, **figures.more, "bytes": figures.sent_bytes}
        if epsilon is not None:
            row["epsilon"] = epsilon
        known_s = self.round_s if math.isfinite(self.round_s) else None
        if known_s is not None:
            row["step_s"] = round(known_s, 6)
        self.around.metrics.write(round_, row)
        devices = list(jax.tree.leaves(position.params)[0].devices())
        peak = peak_bytes_in_use(devices)
        self.around.progress.update(
            Figures(round_, self.count, figures.loss, step_s=known_s, peak_bytes=peak)
        )
        told = [x for x in (figures.loss, scores.get("eval_loss")) if x is not None]
        if not all(map(math.isfinite, told)):
            raise RunError(
                f"the model diverged: after round {round_} its loss is not finite; begin again "
                "with a lower federated.learning_rate or federated.server_learning_rate"
            )
