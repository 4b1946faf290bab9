"""`shardpar train` as people run it: plans, kills, stops, resumes, wrong input."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cli.command import ROOT, TINY, losses, rows, shardpar, start

GPT = str(ROOT / "configs" / "gpt.gin")
ALL = bool(os.environ.get("SHARDPAR_LONG"))
"""Whether to run what takes minutes in full: every plan, 20 steps, ten kills."""

STEPS = 20 if ALL else 6
PLANS = {
    "dp8": ("plan.data=8",),
    "fsdp8": ("plan.fsdp=8",),
    "tp8": ("plan.tensor=8",),
    "dp2 fsdp2 tp2": ("plan.data=2", "plan.fsdp=2", "plan.tensor=2"),
    "every layer another": (
        "plan.fix=embed tensor=2; blocks[0] tensor=1 fsdp=4 zero1=2; "
        "blocks[1] tensor=4 sequence_parallel=true recompute=full; "
        "blocks[2] tensor=8 sequence_parallel=false; "
        "blocks[3] tensor=2 fsdp=2 zero1=2 recompute=selective; head tensor=1 zero1=8",
    ),
    "unequal pipelines of unequal stages": (
        "--plan", str(ROOT / "tests" / "data" / "unequal_pipelines.yaml"),
    ),
}  # fmt: skip
BRIEF = ["unequal pipelines of unequal stages"]


def some_steps(cwd: Path, *extra: str) -> list[float]:
    done = shardpar(
        "train", GPT, f"train.steps={STEPS}", "optimizer.decay_steps=20", "train.eval_every=0",
        "train.sample_prompt=null", "checkpoint.every_steps=0", "--json", *extra, cwd=cwd,
    )  # fmt: skip
    return [row["loss"] for row in rows(done.stdout) if "loss" in row]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return some_steps(tmp_path_factory.mktemp("one"), "--devices", "1")


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS if ALL else BRIEF)
def test_the_demo_on_eight_devices_has_the_losses_of_one(name, one_device, tmp_path):
    assert len(one_device) == STEPS
    got = some_steps(tmp_path, "--devices", "8", *PLANS[name])
    np.testing.assert_allclose(got, one_device, rtol=2e-5)


KILLS, LAST = (10, 600) if ALL else (4, 300)
LONG = (
    *TINY, f"train.steps={LAST}", "train.log_samples=true",
    "checkpoint.every_steps=25", "train.log_every=100", "train.eval_every=150",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_killed_often_anywhere_is_the_run_that_was_never_killed(tmp_path):
    shardpar("train", GPT, *LONG, "train.run_dir=calm", "--devices", "1", cwd=tmp_path)
    moments = random.Random(20)
    killed, metrics = 0, tmp_path / "wild" / "metrics.jsonl"
    reached = []
    while killed < KILLS:
        run = start("train", GPT, *LONG, "train.run_dir=wild", "--devices", "1", cwd=tmp_path)
        if killed % 5 == 0:
            # Now and then while it is still starting, restoring or compiling.
            time.sleep(moments.uniform(0.5, 4.0))
        else:
            before = metrics.stat().st_size if metrics.exists() else 0
            deadline = time.monotonic() + 120
            # Growth beyond what was there before: steps are running again.
            while time.monotonic() < deadline and run.poll() is None:
                size = metrics.stat().st_size if metrics.exists() else 0
                if size > before or (size and size < before):
                    break
                time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.25))
        assert run.poll() is None, f"finished before kill {killed}: {run.stderr.read()}"
        run.send_signal(signal.SIGKILL)
        run.wait()
        killed += 1
        reached.append(metrics.stat().st_size if metrics.exists() else 0)
    shardpar("train", GPT, *LONG, "train.run_dir=wild", "--devices", "1", cwd=tmp_path)
    assert len(set(reached)) > KILLS // 2, "the kills did not hit different moments"
    calm, wild = losses(tmp_path / "calm"), losses(tmp_path / "wild")
    assert [step for step, _, _ in wild] == list(range(1, LAST + 1))
    assert wild == calm  # bitwise: JSON prints floats so that they read back equal
    evaluations = [
        [(r["step"], r["eval_loss"]) for r in rows((tmp_path / d / "metrics.jsonl").read_text())
         if "eval_loss" in r]
        for d in ("calm", "wild")
    ]  # fmt: skip
    assert evaluations[0] == evaluations[1]
    # Every sample of an epoch once before any comes again.
    ids = [int(i) for _, _, samples in wild for i in samples.split(",")]
    data = json.loads((tmp_path / "wild" / "checkpoints" / str(LAST) / "position.json").read_text())
    assert data
    assert len(set(ids)) == len(ids)


SHORT = (*TINY, "train.steps=40", "checkpoint.every_steps=10", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    shardpar("train", GPT, *SHORT, "train.run_dir=run", "--devices", "8", "plan.fsdp=8", cwd=folder)
    return folder / "run"


def copy_of(run: Path, tmp_path: Path, steps: tuple[int, ...] = (10, 20)) -> Path:
    """The run as it was after some checkpoints."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for directory in (copy / "checkpoints").iterdir():
        if directory.name.isdigit() and int(directory.name) not in steps:
            shutil.rmtree(directory)
    return copy


@pytest.mark.slow
def test_a_flipped_byte_is_named_and_the_step_before_is_used(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    arrays = max((run / "checkpoints" / "20").rglob("d/*"), key=lambda f: f.stat().st_size)
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)
    done = shardpar("train", "--resume", "run", "--devices", "8", cwd=tmp_path)
    assert arrays.name in done.stderr
    assert "resumed from step 10" in done.stderr
    assert losses(run) == losses(finished)
    assert (run / "checkpoints" / "20").is_dir()
    assert (run / "checkpoints" / "20.damaged").is_dir()


CONTRADICTIONS = {
    "--run-dir elsewhere": "drop the other",
    "train.run_dir=elsewhere": "drop the other",
    "configs/gpt.gin": "write: shardpar train configs/gpt.gin --run-dir run",
}


@pytest.mark.parametrize("extra", CONTRADICTIONS)
def test_resuming_a_run_in_two_places_or_with_two_configs_is_refused(extra, tmp_path):
    done = shardpar("train", "--resume", "run", *extra.split(), cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert CONTRADICTIONS[extra] in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_run_keeps_its_plan_until_devices_or_pins_change(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    stored = run / "plan.yaml"
    # A plan that no search of today would find: an edited one stays the plan of the run.
    stored.write_text(stored.read_text().replace("fsdp: [a, b, c]", "zero1: [a, b, c]"))
    shown = {}
    for name, extra in {
        "same": ("--devices", "8"),
        "fewer": ("--devices", "4"),
        "pinned": ("--devices", "8", "plan.tensor=8"),
    }.items():
        shown[name] = shardpar("train", "--resume", "run", "--dry-run", *extra, cwd=tmp_path).stdout
    assert "zero1-8" in shown["same"]
    assert "zero1" not in shown["fewer"] + shown["pinned"]
    assert "0-3" in shown["fewer"]
    assert "tp8" in shown["pinned"]


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_another_plan(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    for devices, pins in (("2", "plan.fsdp=1"), ("4", "plan.fsdp=2")):
        done = shardpar("train", "--resume", "run", "--devices", devices, pins, cwd=tmp_path)
        assert "resumed from step" in done.stderr
    now, then = losses(run), losses(finished)
    assert [step for step, *_ in now] == list(range(1, 41))
    np.testing.assert_allclose([x[1] for x in now], [x[1] for x in then], rtol=2e-5)


def test_sigterm_saves_and_exits_0_and_the_run_goes_on_exactly(tmp_path):
    calm = (*TINY, "train.steps=150", "checkpoint.every_steps=0", "--devices", "1")
    shardpar("train", GPT, *calm, "train.run_dir=calm", cwd=tmp_path)
    run = start("train", GPT, *calm, "train.run_dir=wild", cwd=tmp_path)
    metrics = tmp_path / "wild" / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.stat().st_size > 500):
        time.sleep(0.002)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    assert "go on with: shardpar train --resume wild" in errors
    assert len(losses(tmp_path / "wild")) < 150
    shardpar("train", "--resume", "wild", cwd=tmp_path)
    assert losses(tmp_path / "wild") == losses(tmp_path / "calm")


def test_two_trainers_cannot_share_a_run_directory(tmp_path):
    arguments = ("train", GPT, *TINY, "train.steps=100000", "train.run_dir=run", "--devices", "1")
    first = start(*arguments, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        while first.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        second = shardpar(*arguments, cwd=tmp_path, check=False)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 1
    assert "Traceback" not in second.stderr


def test_a_run_directory_of_another_model_is_refused(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    before = (run / "metrics.jsonl").read_bytes()
    done = shardpar(
        "train", "--resume", "run", "model.width=64", "--devices", "1", cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: run holds another run: model.width was 128, now 64; "
        "use the old values, or another train.run_dir"
    )
    assert (run / "metrics.jsonl").read_bytes() == before


WRONG = {
    "train.stpes=3": "there is no key train.stpes (got 3); did you mean train.steps?",
    "train.steps=0": "train.steps must be an integer >= 1; got 0",
    "optimizer.learning_rate=fast": "optimizer.learning_rate must be",
    "model.width=30": "width (30) must be a multiple of heads (8)",
    "plan.file=nowhere.yaml": "nowhere.yaml",
    "plan.tensor=3": "data x fsdp x tensor must be 1",
    "model.vocab_size=200": "vocab_size",
    "train.seed=4294967296": "train.seed must be an integer >= 0",
    "plan.cluster=configs/clusters/h100x8.yaml": "has 8 devices, and there are 1 to train on",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_input_is_one_clear_line_and_exit_code_2(override, tmp_path):
    done = shardpar("train", GPT, override, "--devices", "1", cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert WRONG[override] in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("metrics.jsonl"))


def test_help_and_config_errors_answer_without_jax():
    code = (
        "import sys\n"
        "sys.argv = ['shardpar', {!r}]\n"
        "from shardpar.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit as e:\n    status = e.code\n"
        "assert not {{'jax', 'flax', 'orbax'}} & set(sys.modules), 'jax was imported'\n"
        "print(status)"
    )
    import sys

    for argument in ("--help", "train.stpes=3"):
        script = code.format(argument) if argument == "--help" else code.format("train").replace(
            "['shardpar', 'train']", "['shardpar', 'train', 'train.stpes=3']"
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == ("0" if argument == "--help" else "2")


def test_everything_a_run_leaves_behind_is_there_and_trains_again(finished, tmp_path):
    for name in ("config.yaml", "config.gin", "plan.yaml", "metrics.jsonl", "report.html",
                 "tokenizer.json", "tensorboard"):  # fmt: skip
        assert (finished / name).exists(), name
    page = (finished / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script src" not in page
    for config in ("config.yaml", "config.gin"):
        done = shardpar(
            "train", str(finished / config), "train.run_dir=again", "train.steps=5",
            "checkpoint.every_steps=0", "--devices", "1", "plan.fsdp=null", "--json", cwd=tmp_path,
        )  # fmt: skip
        got = [row["loss"] for row in rows(done.stdout) if "loss" in row]
        expected = [loss for _, loss, _ in losses(finished)[:5]]
        np.testing.assert_allclose(got, expected, rtol=2e-5)
        shutil.rmtree(tmp_path / "again")


@pytest.mark.slow
def test_everything_that_is_needed_to_go_on_is_in_the_run(tmp_path):
    text, plan = tmp_path / "text.txt", tmp_path / "plan.yaml"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 200)
    tiny = (*TINY, "train.steps=4", "checkpoint.every_steps=2", "--devices", "2")
    shardpar("plan", GPT, *tiny, "plan.fsdp=2", "--out", "plan.yaml", cwd=tmp_path)
    first = (GPT, *tiny, "--plan", "plan.yaml", "data.source=text", "data.path=text.txt")
    shardpar("train", *first, "--run-dir", "run", cwd=tmp_path)
    plan.unlink()
    text.rename(tmp_path / "moved.txt")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    # Three devices divide nothing of this model: to sample from it, nothing has to be planned.
    done = shardpar("generate", "elsewhere", "--devices", "3", "--tokens", "5", cwd=tmp_path)
    assert done.stdout.startswith("The ")
    resume = ("train", "--resume", "elsewhere", "--devices", "2")
    before = {p: p.read_bytes() for p in (tmp_path / "elsewhere").glob("*.*") if p.is_file()}
    refused = shardpar(*resume, "train.steps=6", cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "data.path" in refused.stderr
    wrong = shardpar(
        *resume, "data.path=moved.txt", "train.global_batch=2000000", cwd=tmp_path, check=False
    )
    assert wrong.returncode == 2
    # What was refused has changed nothing of the run.
    assert {p: p.read_bytes() for p in before} == before
    done = shardpar(*resume, "train.steps=6", "data.path=moved.txt", cwd=tmp_path)
    assert "resumed from step 4" in done.stderr
    assert [step for step, *_ in losses(tmp_path / "elsewhere")] == [1, 2, 3, 4, 5, 6]
    assert "fsdp: [a]" in (tmp_path / "elsewhere" / "plan.yaml").read_text()


def test_a_run_that_diverges_fails_and_says_so(tmp_path):
    done = shardpar(
        "train", GPT, *TINY, "train.steps=4", "optimizer.learning_rate=1e30", "--devices", "1",
        "optimizer.schedule=constant", "train.run_dir=run", cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "the run diverged" in done.stderr.splitlines()[-1]
    assert "lower optimizer.learning_rate" in done.stderr
    assert "tensorboardX" not in done.stderr
    assert "diverged" in (tmp_path / "run" / "report.html").read_text()
