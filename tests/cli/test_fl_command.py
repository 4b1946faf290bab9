"""`shardpar fl` between real processes, and what it says of bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from shardpar.cli.main import app
from shardpar.config.load import load_any
from shardpar.config.model_source import build_options, find_model, load_model_source
from shardpar.errors import ConfigError, UserError
from shardpar.fl.net.keys import make_test_keys
from shardpar.fl.population import population
from shardpar.fl.simulated_federation import simulated_federation
from shardpar.fl.simulated_rounds import state_after
from shardpar.fl.task import Task
from tests.cli.command import LONG, ROOT, environment, rows

SECURE = str(ROOT / "configs" / "fedavg_secure.gin")
PLAIN = ["privacy.kind=none", "federated.learning_rate=0.1", "federated.epochs=1"]
RUNNER = CliRunner()


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shardpar", "fl", *arguments],
        cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def simulated(overrides: list[str], rounds: int) -> dict[str, np.ndarray]:
    """The model of the same config in one program."""
    config = load_any(SECURE, overrides)
    module = load_model_source(find_model(config.model.source))
    options = build_options(module, config.model)
    task = Task.of(lambda rngs: module.build(options, rngs), module.loss)
    federation = simulated_federation(
        task, population(config.data).data, config.federated, config.privacy, config.secagg,
        devices=jax.devices()[:1],
    )  # fmt: skip
    return state_after(federation.rounds, rounds)["params"]


def test_processes_under_masks_and_a_kill_come_to_the_model_of_the_simulation(tmp_path):
    """Three parties, mutual TLS, secure aggregation; one is killed in a round and joins again."""
    overrides = [
        *PLAIN, "data.clients=3", "federated.rounds=5", "net.lost=wait", "net.patience_s=60",
        "secagg.threshold=1.0",
    ]  # fmt: skip
    run_dir = tmp_path / "run"
    running = start(
        "run", SECURE, "-n", "3", "--json", "--run-dir", str(run_dir), *overrides, cwd=tmp_path
    )
    again = None
    found = []
    try:
        assert running.stdout is not None
        for line in running.stdout:
            found.append(json.loads(line))
            if again is None:
                pids = json.loads((run_dir / "pids.json").read_text())
                command = Path(f"/proc/{pids['b']}/cmdline").read_text().split("\0")[3:-1]
                os.kill(pids["b"], signal.SIGKILL)
                again = start(*command[1:], cwd=tmp_path)
        code = running.wait(60)
        assert code == 0, running.stderr.read()
        assert again.wait(60) == 0, again.stderr.read()
    finally:
        for process in (running, again):
            if process is not None and process.poll() is None:
                process.terminate()
    assert [row["round"] for row in found] == [1, 2, 3, 4, 5]
    assert {"accuracy", "loss", "sent_bytes", "epsilon", "dropped"} <= found[0].keys()
    assert [row["dropped"] for row in found] == [""] * 5
    expected = simulated(overrides, 5)
    for name in ("aggregator", "a", "b", "c"):
        with np.load(run_dir / name / "model.npz") as model:
            assert model.keys() == expected.keys()
            for key, value in expected.items():
                np.testing.assert_array_equal(model[key], value, err_msg=f"{name} {key}")
    assert not any(_alive(pid) for pid in pids.values())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@LONG
def test_the_secure_config_is_as_accurate_as_the_docs_say_with_one_killed(tmp_path):
    run_dir = tmp_path / "run"
    running = start("run", SECURE, "-n", "4", "--json", "--run-dir", str(run_dir), cwd=tmp_path)
    found = []
    assert running.stdout is not None
    for line in running.stdout:
        found.append(json.loads(line))
        if len(found) == 4:
            os.kill(json.loads((run_dir / "pids.json").read_text())["c"], signal.SIGKILL)
    assert running.wait(60) == 0, running.stderr.read()
    assert found[-1]["round"] == 20
    assert found[-1]["dropped"] == "c"
    assert found[-1]["accuracy"] > 0.82
    assert 3.9 < found[-1]["epsilon"] <= 4.0


@LONG
def test_a_ring_of_processes_comes_to_the_same_model(tmp_path):
    overrides = [*PLAIN, "data.clients=3", "federated.rounds=3"]
    run_dir = tmp_path / "run"
    running = start(
        "run", SECURE, "-n", "3", "--json", "--run-dir", str(run_dir), *overrides,
        "net.topology=ring", cwd=tmp_path,
    )  # fmt: skip
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert [row["round"] for row in rows(out)] == [1, 2, 3]
    expected = simulated(overrides, 3)
    for name in "abc":
        with np.load(run_dir / name / "model.npz") as model:
            for key, value in expected.items():
                np.testing.assert_array_equal(model[key], value)


def test_an_interrupt_ends_all_processes(tmp_path):
    run_dir = tmp_path / "run"
    running = start("run", SECURE, "-n", "3", "--run-dir", str(run_dir), cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (run_dir / "pids.json").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert running.wait(30) == 130
    pids = json.loads((run_dir / "pids.json").read_text())
    assert len(pids) == 4
    assert not any(_alive(pid) for pid in pids.values())


# What needs no processes.


def invoke(*arguments: str):
    return RUNNER.invoke(app, ["fl", *arguments])


def test_the_help_teaches_the_flow_in_order():
    text = " ".join(invoke("--help").output.split())
    order = ["shardpar train CONFIG", "shardpar fl run", "shardpar fl keys", "shardpar fl serve"]
    at = [text.index(words) for words in order]
    assert at == sorted(at)


def test_a_dry_run_shows_who_would_run_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("run", SECURE, "-n", "4", "--dry-run", "--json")
    assert done.exit_code == 0
    (shown,) = rows(done.output)
    assert [process["process"] for process in shown["processes"]] == ["aggregator", *"abcd"]
    assert [process["dials"] for process in shown["processes"]] == ["", *["aggregator"] * 4]
    ring = invoke("run", SECURE, "-n", "3", "--dry-run", "net.topology=ring", "--json")
    assert [p["dials"] for p in rows(ring.output)[0]["processes"]] == ["", "a", "a, b"]
    assert list(tmp_path.iterdir()) == []


def test_dry_runs_of_one_process_say_what_it_would_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_test_keys(tmp_path / "keys", ["aggregator", "a", "b", "c", "d"])
    shared = [SECURE, "net.parties=[a, b, c, d]", "net.addresses=['aggregator=127.0.0.1:7400']"]
    served = invoke("serve", *shared, "--dry-run", "privacy.kind=none")
    assert "aggregator would listen at 127.0.0.1:7400 for a, b, c, d" in served.output
    joined = invoke("join", *shared, "--party", "b", "--dry-run", "privacy.kind=none")
    assert "b would dial aggregator at 127.0.0.1:7400, train on its" in " ".join(
        joined.output.split()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", str(ROOT / "configs" / "gpt.gin")], "is not the config of a federation"),
        (["run", SECURE, "-n", "3", "net.parties=[a, b, c, d]"], "net.parties names 4"),
        (["run", "federated.rounds=3"], "name a config before federated.rounds=3"),
        (["serve", SECURE], "net.parties is empty"),
        (["join", SECURE, "--party", "x", "net.parties=[a, b, c, d]"], "--party x is none of"),
        (["serve", SECURE, "net.parties=[a, b, c, d]"], "a.sign.pub"),
        (["serve", SECURE, "net.parties=[a, b, c, d]", "net.topology=ring"], "has no aggregator"),
        (["run", SECURE, "federated.algorithm=krum"], "krum"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert isinstance(done.exception, UserError | ConfigError)
    assert done.exception.exit_code == 2
    assert words in str(done.exception)
    assert list(tmp_path.iterdir()) == []
