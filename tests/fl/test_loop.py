"""The loop of a federation: what it writes, and what ends it."""

from __future__ import annotations

import numpy as np
import pytest

from shardpar.errors import RunError
from shardpar.fl.evaluation import Evaluation
from shardpar.fl.ledger import Ledger, Release, epsilon_of
from shardpar.fl.loop import Surroundings, spending, train
from shardpar.fl.options import FederatedOptions
from shardpar.fl.privacy_options import PrivacyOptions
from shardpar.fl.saving import Savings
from shardpar.fl.simulated_federation import simulated_federation
from shardpar.fl.task import Task
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.metrics import MetricsLog, read_metrics
from shardpar.run.options import CheckpointOptions
from shardpar.run.progress import Progress
from tests.fl.test_simulate import DATA, INPUTS, LABELS, MLP, ONE

HELD = {"inputs": INPUTS[600:800], "labels": LABELS[600:800]}
SAVING = CheckpointOptions(every_steps=2)


@pytest.fixture(scope="module")
def task():
    options = MLP.MLPOptions(64, (), 10)
    return Task.of(lambda rngs: MLP.build(options, rngs), MLP.loss)


def run(task, folder, federation, rounds, *, spend=None, stop=lambda: False, eval_every=2):
    folder.mkdir(exist_ok=True)
    with (
        Checkpoints(folder / "checkpoints", SAVING) as checkpoints,
        MetricsLog(folder / "metrics.jsonl") as metrics,
        Progress(quiet=True) as progress,
    ):
        around = Surroundings(
            Savings(checkpoints), metrics, progress, {}, lambda: None, stop, spend
        )
        evaluation = Evaluation(task, HELD, MLP.predict)
        outcome = train(federation.rounds, rounds, evaluation, eval_every, SAVING, around)
    rows = read_metrics(folder / "metrics.jsonl")
    return outcome, [{k: v for k, v in row.items() if k != "step_s"} for row in rows]


def federation(task, rounds, privacy=None, **how):
    options = FederatedOptions(rounds=rounds, cohort=4, batch=16, seed=3, **how)
    return simulated_federation(task, DATA, options, privacy=privacy, devices=ONE)


def test_a_run_that_is_stopped_and_goes_on_writes_what_one_that_was_not_does(task, tmp_path):
    outcome, wanted = run(task, tmp_path / "whole", federation(task, 5), 5)
    assert [row["round"] for row in wanted] == [row["step"] for row in wanted] == [1, 2, 3, 4, 5]
    assert [row["round"] for row in wanted if "accuracy" in row] == [2, 4, 5]
    assert outcome.scores == {name: wanted[-1][name] for name in ("eval_loss", "accuracy")}
    # 650 float32 and two scalars up, 650 down, for each of four clients.
    assert wanted[0]["bytes"] == 4 * 4 * (650 + 2 + 650)
    assert wanted[0]["clients"] == 4
    calls = iter([False, False, True])
    folder = tmp_path / "parted"
    stopped, _ = run(task, folder, federation(task, 5), 5, stop=lambda: next(calls))
    assert stopped.stopped
    assert stopped.position.round_ == 3
    again, rows = run(task, folder, federation(task, 5), 5)
    assert rows == wanted
    for name, leaf in outcome.position.params.items():
        np.testing.assert_array_equal(again.position.params[name], leaf)


def test_training_ends_where_the_budget_does_and_a_round_run_again_is_paid_for_once(task, tmp_path):
    # Enough for three rounds with so much noise, and not for four.
    three = epsilon_of([Release(2.0)] * 3, 1e-5) + 1e-3
    privacy = PrivacyOptions("central", epsilon=three, clip=0.5, noise_multiplier=2.0)
    found = federation(task, 3, privacy)
    release, budget = found.privacy.release, found.privacy.budget
    with Ledger(tmp_path / "ledger", budget) as ledger:
        # Rounds 0 and 1 were written down by a process that died before it saved anything.
        ledger.append(release, "round 0")
        ledger.append(release, "round 1")
        spend = spending(ledger, release)
        outcome, rows = run(task, tmp_path / "run", found, 3, spend=spend)
        assert len(ledger.releases) == 3
        assert outcome.epsilon == rows[-1]["epsilon"] == ledger.spent() <= three
        assert not outcome.budget_spent
        assert "loss" not in rows[0]
        longer = federation(task, 5, privacy)
        outcome, _ = run(task, tmp_path / "run", longer, 5, spend=spend)
        assert outcome.budget_spent
        assert outcome.position.round_ == len(ledger.releases) == 3
        assert outcome.scores


def test_a_model_that_diverges_ends_the_run(task, tmp_path):
    diverging = federation(task, 5, learning_rate=1e38)
    with pytest.raises(RunError, match=r"after round \d its loss is not finite.*learning_rate"):
        run(task, tmp_path / "run", diverging, 5, eval_every=1)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 5
