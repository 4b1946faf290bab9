"""Buckets and dispatching in a config: the losses of one length on one device, resumed exactly."""

from __future__ import annotations

import numpy as np
import pytest

from shardpar.errors import ConfigError, PlanError
from tests.cli.command import LONG, rows, shardpar
from tests.cli.mixed import GPT, TINY, texts, train

WIDE = """\
format: shardpar-plan/1
cluster: here
global_batch: 4
pipelines:
- sequences: 4
  microbatch: 4
  schedule: 1f1b
  stages:
  - {devices: [2, 3], mesh: {a: 2}, layers: [{layers: embed..outside, fsdp: [a]}]}
"""
SIX = (
    WIDE.replace("[2, 3], mesh: {a: 2}", "[0], mesh: {}").replace(", fsdp: [a]", "")
    .replace("4\n", "6\n")
)  # fmt: skip


UNEQUAL = """\
format: shardpar-plan/1
cluster: here
global_batch: 6
pipelines:
- sequences: 4
  microbatch: 1
  schedule: 1f1b
  stages:
  - {devices: [0], mesh: {}, layers: [{layers: "embed..blocks[0]"}]}
  - {devices: [1], mesh: {}, layers: [{layers: "blocks[1]..outside"}]}
- sequences: 2
  microbatch: 2
  schedule: 1f1b
  stages:
  - {devices: [2], mesh: {}, layers: [{layers: embed..outside}]}
"""


def write_files(folder):
    texts(folder)
    for name, text in {"wide": WIDE, "six": SIX, "unequal": UNEQUAL}.items():
        (folder / f"{name}.yaml").write_text(text)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The rows of a run with everything padded to one length on one device."""
    folder = tmp_path_factory.mktemp("calm")
    write_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        one = ("buckets.lengths=[32]", "buckets.plans=[six.yaml]", "plan.file=six.yaml")
        train(GPT, *TINY, *one, "train.steps=4", "train.run_dir=calm")
    return steps_and_end(folder / "calm")


def steps_and_end(run):
    """A run's rows of steps, and its last evaluation."""
    found = rows((run / "metrics.jsonl").read_text())
    return [row for row in found if "loss" in row], found[-1]["eval_loss"]


def require_same(found, expected):
    assert [row["samples"] for row in found[0]] == [row["samples"] for row in expected[0]]
    assert len(expected[0]) == 4
    got, want = ([row["loss"] for row in run[0]] for run in (found, expected))
    np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.slow
@LONG
def test_buckets_have_the_losses_of_one_length_and_go_on_where_they_stopped(here, calm):
    two = ("buckets.lengths=[8,32]", "buckets.plans=[wide.yaml,six.yaml]")
    train(GPT, *TINY, *two, "plan.file=six.yaml", "train.steps=2", "train.run_dir=wild")
    # The run keeps what it needs: the files it began with may go.
    (here / "wide.yaml").unlink()
    said = train("--resume", "wild", "train.steps=4", "--json")
    found = steps_and_end(here / "wild")
    require_same(found, calm)
    np.testing.assert_allclose(found[1], calm[1], rtol=2e-5)
    for row, one in zip(found[0], calm[0], strict=True):
        assert row["bucket_8_tokens"] > 0
        assert row["bucket_8_tokens"] + row["bucket_32_tokens"] == one["bucket_32_tokens"]
    assert '"bucket_8_tokens"' in said
    with pytest.raises(ConfigError, match="buckets or none was 'buckets', now 'none'"):
        train("--resume", "wild", "train.steps=5", "buckets.lengths=[]", "buckets.plans=[]")


@pytest.mark.slow
@LONG
def test_dispatched_steps_have_the_losses_of_one_device_and_go_on_where_they_stopped(here, calm):
    shared = ("data.dispatch=true", "dispatch.row_tokens=[32,16]", "plan.file=unequal.yaml")
    train(GPT, *TINY, *shared, "train.steps=2", "train.run_dir=wild")
    train("--resume", "wild", "train.steps=4")
    found = steps_and_end(here / "wild")
    require_same(found, calm)
    # Evaluated packed: other documents are among as many rows.
    assert found[1] < found[0][0]["loss"]
    counts = {(r["pipeline_0_microbatches"], r["pipeline_1_microbatches"]) for r in found[0]}
    assert len(counts) > 1
    assert all(row["dispatch_gap"] <= 0.01 for row in found[0])
    with pytest.raises(PlanError, match="the plan is one stage that takes them all"):
        train(GPT, *TINY, "data.dispatch=true", "plan.file=six.yaml", "train.run_dir=other")


@pytest.mark.slow
@LONG
@pytest.mark.parametrize("how", ["dispatched", "buckets"])
def test_two_processes_have_the_losses_of_one_device(here, calm, how):
    """The long pipeline reaches over both; every process finds the same assignment."""
    over_both = UNEQUAL.replace("devices: [1]", "devices: [3]")
    (here / "unequal.yaml").write_text(over_both)
    (here / "wide.yaml").write_text(WIDE.replace("[2, 3]", "[1, 2]"))
    given = {
        "dispatched": ("data.dispatch=true", "dispatch.row_tokens=[32,16]"),
        "buckets": ("buckets.lengths=[8,32]", "buckets.plans=[wide.yaml,unequal.yaml]"),
    }[how]
    shardpar(
        "launch", "-n", "2", "--", "train", GPT, *TINY, *given, "plan.file=unequal.yaml",
        "--devices", "2", "train.steps=4", "--run-dir", "both", cwd=here,
    )  # fmt: skip
    require_same(steps_and_end(here / "both"), calm)


def test_a_plan_that_does_not_fit_is_refused(here):
    (here / "wide.yaml").write_text(WIDE.replace("[2, 3]", "[2, 13]"))
    given = ("buckets.lengths=[8,32]", "buckets.plans=[wide.yaml,null]", "plan.file=six.yaml")
    with pytest.raises(PlanError) as caught:
        train(GPT, *TINY, *given, "train.steps=1", "--dry-run")
    assert str(caught.value) == (
        f"buckets.plans: {here / 'wide.yaml'} uses device 13, and there are 8 devices, counted "
        "from 0; plan for these"
    )
