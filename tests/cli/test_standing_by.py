"""A process that stands by for a trainer: what it prepares, and that it leaves the run alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from shardpar.cli import preparing
from shardpar.cli.preparing import stand_by
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.directory import RunDirectory
from tests.cli.command import ROOT, TINY, environment, losses, shardpar

GPT = str(ROOT / "configs" / "gpt.gin")
SHORT = (*TINY, "model.layers=1", "train.steps=8", "train.eval_every=0", "checkpoint.every_steps=4")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    shardpar("train", GPT, *SHORT, "train.run_dir=run", cwd=folder)
    return folder / "run"


@pytest.fixture
def half(finished, tmp_path):
    """The run as it was after half of its steps."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "8")
    return run


@pytest.fixture
def as_it_is(monkeypatch):
    """This process's jax has started already, and its settings are other tests' too."""
    monkeypatch.setattr(preparing, "use_devices", lambda _: None)


def files(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_what_was_prepared_goes_on_as_the_run_would_have(finished, half):
    before = files(half)
    process = subprocess.Popen(
        [sys.executable, "-m", "shardpar", "train", "--resume", str(half)],
        env={**environment(), "SHARDPAR_STANDBY": "programs", "JAX_LOG_COMPILES": "1"},
        cwd=half.parent, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        # The step is compiled before it is this process's turn.
        for line in process.stderr:
            if "Finished XLA compilation of jit(step)" in line:
                break
        else:
            pytest.fail("the step was not compiled ahead")
        assert files(half) == before
        # Nor is the run locked: its trainer lives.
        Checkpoints(half / "checkpoints").close()
        heartbeat = half.parent / "heartbeat"
        _, said = process.communicate(json.dumps({"SHARDPAR_HEARTBEAT": str(heartbeat)}), 120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert "resumed from step 4" in said
    assert "capturing the model" not in said
    assert "Finished XLA compilation of jit(step)" not in said
    assert heartbeat.read_text() == "cpu"
    assert losses(half) == losses(finished)


@pytest.mark.parametrize("changed", ["plan.yaml", "config.yaml"])
def test_a_run_that_has_changed_meanwhile_is_prepared_for_anew(half, changed, as_it_is):
    ahead = stand_by(str(half), None, devices=None, plan=None)
    directory = RunDirectory(half)
    assert ahead is not None
    assert ahead.holds(directory)
    text = (half / changed).read_text()
    (half / changed).write_text(text.replace("global_batch: 8", "global_batch: 16"))
    assert (half / changed).read_text() != text
    assert not ahead.holds(directory)


def test_where_nothing_can_be_prepared_the_process_waits_all_the_same(half, as_it_is):
    (half / "plan.yaml").write_text("no plan")
    assert stand_by(str(half), None, devices=None, plan=None) is None
    assert stand_by(str(half / "nowhere"), None, devices=None, plan=None) is None
