"""`shardpar train` with servers and workers: the run of one process, stopped and gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from shardpar.ps.data.clicks import ClickLog
from tests.cli.command import LONG, ROOT, rows, shardpar

FM = str(ROOT / "configs" / "fm.gin")
SIZES = ("model.factors=2", "train.global_batch=100", "train.epochs=20")
STEPS = 200
SERVED = ("ps.servers=2", "ps.workers=2")


@pytest.fixture
def data(tmp_path):
    """A file of 1,000 clicks, the last of which is unreadable in another."""
    batch = ClickLog(1000).batch(0, 1000)
    lines = [
        f"{int(label)} " + " ".join(f"{f}:{i}:1" for f, i in enumerate(ids))
        for label, ids in zip(batch.labels, batch.ids, strict=True)
    ]
    (tmp_path / "clicks.ffm").write_text("\n".join(lines) + "\n")
    lines[-1] = "1 3:nonsense:1"
    (tmp_path / "bad.ffm").write_text("\n".join(lines) + "\n")
    return ("data.path=clicks.ffm", "data.eval_path=clicks.ffm", "data.format=libffm", *SIZES)


def metrics(path) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for row in rows(path.read_text()):
        found.setdefault(row["step"], {}).update(row)
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_servers_and_workers_train_as_one_process_does_through_a_stop(tmp_path, data):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    shardpar("train", FM, *data, "--run-dir", "whole", cwd=tmp_path)
    command = [sys.executable, "-m", "shardpar", "train", FM, *data, *SERVED, "--run-dir", "served"]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        until_s = time.monotonic() + 120
        while f"/{STEPS}" not in (line := process.stderr.readline()):
            assert line, "it ended before its first step"
            assert time.monotonic() < until_s
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(60) == 0, said
    assert "--resume served" in said
    assert 0 < len(metrics(tmp_path / "served" / "metrics.jsonl")) < STEPS
    data = (tmp_path / "clicks.ffm").read_text()
    (tmp_path / "other.ffm").write_text(data.replace(":1\n", ":2\n", 1))
    done = shardpar("train", "--resume", "served", "data.path=other.ffm", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "the data is not what the run began with" in done.stderr
    done = shardpar("train", "--resume", "served", "--json", cwd=tmp_path)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["step"] == STEPS
    assert "Traceback" not in done.stderr
    whole, served = (metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "served"))
    assert sorted(whole) == sorted(served) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(
        [served[step]["loss"] for step in served], [whole[step]["loss"] for step in served],
        rtol=1e-3,
    )  # fmt: skip
    for score in ("auc", "logloss", "eval_loss"):
        assert last[score] == pytest.approx(whole[STEPS][score], abs=1e-3)
    assert (tmp_path / "served" / "report.html").is_file()
    # Another number of workers would give each other batches.
    done = shardpar("train", "--resume", "served", "ps.workers=4", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "ps.workers" in done.stderr


@LONG
@pytest.mark.xdist_group("ray")
def test_a_line_that_a_worker_cannot_read_is_named(tmp_path, data):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    done = shardpar(
        "train", FM, *data, *SERVED, "data.path=bad.ffm", "ps.consistency=asp", cwd=tmp_path,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "bad.ffm:1000" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("ps.workers=3",), "ps.servers is 0; write ps.servers=2"),
        ((*SERVED, "ps.workers=3"), "write train.global_batch=4095"),
        ((*SERVED, "ps.consistency=fast"), "'bsp', 'ssp(N)' or 'asp', not 'fast'"),
        ((*SERVED, "ps.delay_scaled=true"), "in 'bsp' none is late"),
        (
            (*SERVED, "ps.cache_rows=9", "ps.push_bound=1", "table.optimizer=adam"),
            "which 'adam' does not allow",
        ),
        (
            (*SERVED, "ps.cache_rows=9", "ps.push_bound=1"),
            "write ps.consistency='ssp(4)', or ps.push_bound=0",
        ),
        ((*SERVED, "ps.pull_bound=5"), "write ps.cache_rows="),
        ((*SERVED, "table.ids=mapped"), "write data.hashed=true and table.ids=rows"),
        ((*SERVED, "table.placement=columns"), "servers hold rows"),
        ((*SERVED, "--devices", "2"), "drop --devices"),
        ((*SERVED, "ps.servers=-1"), "ps.servers"),
    ],
)
def test_what_servers_cannot_do_is_refused_in_words(tmp_path, given, message):
    done = shardpar("train", FM, *given, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_who_does_what_and_starts_nothing(tmp_path):
    done = shardpar("train", FM, *SERVED, "ps.consistency=SSP(4)", "--dry-run", cwd=tmp_path)
    assert "245 steps of 2 workers with 2048 samples each, 2 servers, ssp(4)" in done.stderr
    assert not (tmp_path / "runs").exists()
