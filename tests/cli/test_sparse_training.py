"""`shardpar train` of models with tables: what a user sees, and what a stop and a fault leave."""

from __future__ import annotations

import json

import numpy as np
import pytest

from shardpar.ps.data.clicks import ClickLog
from tests.cli.command import ROOT, rows, shardpar

FM = str(ROOT / "configs" / "fm.gin")
SMALL = ("data.samples=4000", "data.eval_samples=1000", "train.global_batch=500", "model.factors=2")


def metrics(text: str) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows(text)]


@pytest.mark.slow
def test_a_run_that_was_stopped_and_resumed_on_other_devices_is_the_run_that_was_not(tmp_path):
    done = shardpar("train", FM, *SMALL, "--json", "--run-dir", "whole", cwd=tmp_path)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["step"] == 8
    assert {"auc", "logloss", "eval_loss"} <= set(last)
    assert 0.4 < last["auc"] < 0.8
    parted = ("train.full_every=3", "checkpoint.every_steps=2", "--run-dir", "parted")
    shardpar("train", FM, *SMALL, *parted, "train.steps=5", "--devices", "4", cwd=tmp_path)
    more = ("train.steps=8", "--devices", "2")
    shardpar("train", "--resume", "parted", *more, cwd=tmp_path)
    whole = metrics((tmp_path / "whole" / "metrics.jsonl").read_text())
    again = metrics((tmp_path / "parted" / "metrics.jsonl").read_text())
    losses, others = (
        {row["step"]: row["loss"] for row in found if "loss" in row} for found in (whole, again)
    )
    assert list(losses) == list(others) == list(range(1, 9))
    np.testing.assert_allclose(list(others.values()), list(losses.values()), rtol=1e-5)
    assert again[-1]["auc"] == pytest.approx(whole[-1]["auc"], abs=1e-4)
    assert (tmp_path / "parted" / "report.html").is_file()


@pytest.mark.slow
def test_one_s_own_file_is_read_and_its_bad_line_named(tmp_path):
    lines = []
    batch = ClickLog(40).batch(0, 40)
    for label, ids in zip(batch.labels, batch.ids, strict=True):
        lines.append(f"{int(label)} " + " ".join(f"{f}:{i}:1" for f, i in enumerate(ids)))
    (tmp_path / "good.ffm").write_text("\n".join(lines) + "\n")
    lines[6] = "1 3:nonsense:1"
    (tmp_path / "bad.ffm").write_text("\n".join(lines) + "\n")
    own = ("data.format=libffm", "train.global_batch=20", "train.epochs=2")
    done = shardpar(
        "train", FM, "data.path=good.ffm", "data.eval_path=good.ffm", *own, "--json", cwd=tmp_path
    )
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 4
    done = shardpar("train", FM, "data.path=bad.ffm", *own, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "bad.ffm:7" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("data.path=nowhere.ffm", "data.format=libffm"), "there is no file 'nowhere.ffm'"),
        (("table.optimiser=sgd",), "did you mean table.optimizer?"),
        (("model.rows=100", "data.rows=200"), "write model.rows=200"),
        (("model.rows=100",), "write model.rows=1048576, or table.ids=mapped"),
        (("data.hashed=true",), "data.hashed is for ids of files"),
        (
            ("data.format=sklearn", "data.path=iris", "data.eval_path=null"),
            "a label is 2, and this model tells two classes apart",
        ),
        (("--supervise",), "--supervise is for models with a plan"),
        (("--plan", "plan.yaml"), "there is no section plan"),
    ],
    ids=["file", "key", "rows", "few rows", "hashed", "labels", "supervise", "plan"],
)
def test_what_cannot_be_is_refused_in_words(tmp_path, given, message):
    done = shardpar("train", FM, *given, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_verb_that_plans_says_that_tables_have_no_plan(tmp_path):
    done = shardpar("plan", FM, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "trains tables and has no plan" in done.stderr
