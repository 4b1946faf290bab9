"""Runs whose plan, devices or nodes change while they train are the runs that were left alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import faults
from tests.cli.command import LONG, ROOT, TINY, losses, rows, shardpar

GPT = str(ROOT / "configs" / "gpt.gin")
RUN = (*TINY, "train.log_samples=true", "train.eval_every=0", "train.steps=16")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm")
    shardpar("train", GPT, *RUN, "--devices", "1", "--run-dir", "calm", cwd=folder)
    return losses(folder / "calm")


def same(found, expected):
    assert [(step, samples) for step, _, samples in found] == [
        (step, samples) for step, _, samples in expected
    ]
    np.testing.assert_allclose([x[1] for x in found], [x[1] for x in expected], rtol=2e-5)


@pytest.mark.slow
@LONG
def test_devices_that_held_the_only_copy_take_the_run_back_to_its_checkpoint(tmp_path, calm):
    first = ("plan.fsdp=4", "train.steps=6", "checkpoint.every_steps=3", "--run-dir", "run")
    shardpar("train", GPT, *RUN, *first, "--devices", "4", cwd=tmp_path)
    (tmp_path / "run" / "plan.request").write_text("lost: [1, 2]")
    done = shardpar("train", "--resume", "run", "train.steps=16", "--devices", "4", cwd=tmp_path)
    assert "have no living copy: going back to step" in done.stderr
    plan = (tmp_path / "run" / "plan.yaml").read_text()
    assert "devices: [0, 3]" in plan or ("[0]" in plan and "[3]" in plan)
    same(losses(tmp_path / "run"), calm)


@pytest.mark.slow
@LONG
def test_living_copies_carry_the_run_on_and_devices_come_back(tmp_path, calm):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.request").write_text("lost: [1, 2]")
    first = ("plan.data=4", "plan.zero1=1", "train.steps=8", "checkpoint.every_steps=0")
    done = shardpar("train", GPT, *RUN, *first, "--devices", "4", "--run-dir", "run", cwd=tmp_path)
    assert "another plan takes over" in done.stderr
    assert "no living copy" not in done.stderr
    (tmp_path / "run" / "plan.request").write_text("devices: [0, 1, 2, 3]")
    shardpar("train", "--resume", "run", "train.steps=16", "--devices", "4", cwd=tmp_path)
    switches = [row for row in rows((tmp_path / "run" / "metrics.jsonl").read_text())
                if "switch_s" in row]  # fmt: skip
    assert switches
    same(losses(tmp_path / "run"), calm)


@pytest.mark.slow
def test_the_last_copy_lost_without_a_checkpoint_ends_the_run_in_words(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.request").write_text("lost: [1]")
    pins = ("plan.fsdp=2", "checkpoint.every_steps=0")
    done = shardpar(
        "train", GPT, *RUN, *pins, "--devices", "2", "--run-dir", "run", cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert "devices [1] held the only copy of" in done.stderr
    assert "save more often (checkpoint.every_steps)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_nodes_that_switch_and_are_killed_and_lost_make_the_calm_run(tmp_path):
    calm = faults.calm(tmp_path, 30)
    wild = faults.wild(tmp_path, 30, kills=1, losses=1, every=5)
    assert faults.compare(calm, wild) < 2e-5
    kinds = [event["event"] for event in wild.events]
    assert "lost" in kinds
    assert "joined" in kinds
    assert wild.switches >= 4


@pytest.mark.slow
def test_a_decision_is_printed_without_asking_anything(tmp_path):
    shardpar(
        "train", GPT, *TINY, "train.steps=2", "plan.data=4", "--devices", "4", "--run-dir", "run",
        cwd=tmp_path,
    )  # fmt: skip
    arguments = ("replan", "run", "--devices", "4", "--slow", "2=0.3")
    done = shardpar(*arguments, "--dry-run", "--json", cwd=tmp_path)
    said = json.loads(done.stdout)
    names = [a["name"] for a in said["alternatives"]]
    assert names[0] == "keep"
    assert said["chosen"] in names
    assert not (tmp_path / "run" / "plan.request").exists()
    shardpar(*arguments, cwd=tmp_path)
    assert "2: 0.3" in (tmp_path / "run" / "plan.request").read_text()
    wrong = shardpar("replan", "run", "--slow", "x", cwd=tmp_path, check=False)
    assert wrong.returncode == 2
    assert "write DEVICE=SHARE" in wrong.stderr
