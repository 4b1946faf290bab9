"""`shardpar train` of federations: what a user sees, and what a kill leaves."""

from __future__ import annotations

import json
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest

from shardpar.cli.federated_training import federated_task
from shardpar.config.load import load_any
from shardpar.errors import DataError
from shardpar.fl.clients import ClientData, write_clients
from shardpar.run.checkpoints import Checkpoints
from tests.cli.command import ROOT, rows, shardpar, start

FEDAVG = str(ROOT / "configs" / "fedavg.gin")
SMALL = (
    "data.clients=6", "federated.cohort=3", "model.hidden=[]", "federated.algorithm=scaffold",
    "checkpoint.every_steps=1",
)  # fmt: skip


def without_times(text):
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows(text)]


def model(run, step):
    shape = {"state": {"params": {"layers.0.weight": jnp.zeros((64, 10))}}}
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(step, shape, partial=True).state
    return np.asarray(state["state"]["params"]["layers.0.weight"])


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    done = shardpar(
        "train", FEDAVG, *SMALL, "federated.rounds=12", "--json", "--run-dir", "whole", cwd=tmp_path
    )
    printed = rows(done.stdout)
    assert printed[-1]["round"] == 12
    assert printed[-1]["accuracy"] > 0.5
    assert {"round", "loss", "accuracy", "bytes", "clients"} <= printed[0].keys()
    # Rounds without an end, so that it is killed in one.
    process = start(
        "train", FEDAVG, *SMALL, "federated.rounds=100000", "--run-dir", "killed", cwd=tmp_path
    )
    killed = tmp_path / "killed"
    for _ in range(600):
        time.sleep(0.1)
        if (killed / "checkpoints" / "3" / "manifest.json").exists():
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = max(row["round"] for row in rows((killed / "metrics.jsonl").read_text()))
    assert 3 <= reached < 100000
    end = str(max(12, reached + 3))
    shardpar("train", "--resume", "killed", f"federated.rounds={end}", cwd=tmp_path)
    again = without_times((killed / "metrics.jsonl").read_text())
    whole = without_times((tmp_path / "whole" / "metrics.jsonl").read_text())
    assert [row["round"] for row in again] == list(range(1, int(end) + 1))
    assert again[:12] == whole
    if end == "12":
        np.testing.assert_array_equal(model(killed, 12), model(tmp_path / "whole", 12))
    assert (killed / "report.html").is_file()
    other = ("federated.learning_rate=0.3", "--run-dir", "killed")
    done = shardpar("train", FEDAVG, *SMALL, *other, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "federated.learning_rate was 0.1, now 0.3" in done.stderr


@pytest.mark.slow
def test_one_s_own_clients_train_one_s_own_model_on_any_devices(tmp_path):
    random = np.random.default_rng(0)
    slope = np.arange(4.0)

    def client(count):
        x = random.normal(size=(count, 4)).astype(np.float32)
        return {"x": x, "y": (x @ slope).astype(np.float32)}

    write_clients(tmp_path / "train", (client(count) for count in (30, 5, 11)))
    write_clients(tmp_path / "eval", [client(20)])
    (tmp_path / "line.py").write_text(
        "from dataclasses import dataclass\n"
        "import jax.numpy as jnp\n"
        "from flax import nnx\n"
        "@dataclass(frozen=True)\n"
        "class LineOptions:\n"
        "    width: int = 4\n"
        "class Line(nnx.Module):\n"
        "    def __init__(self, width):\n"
        "        self.w = nnx.Param(jnp.zeros(width))\n"
        "def build(options, rngs):\n"
        "    return Line(options.width)\n"
        "def loss(model, batch):\n"
        "    miss = batch['weights'] * (batch['x'] @ model.w[...] - batch['y']) ** 2\n"
        "    return jnp.sum(miss), jnp.sum(batch['weights'])\n"
    )
    (tmp_path / "line.yaml").write_text(
        "model: {source: line.py}\n"
        "data: {format: clients, path: train, eval_path: eval}\n"
        "federated: {rounds: 30, batch: 5, learning_rate: 0.05}\n"
    )
    given = ("--devices", "2", "--json", "--run-dir", "run")
    done = shardpar("train", "line.yaml", *given, cwd=tmp_path)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["round"] == 30
    assert last["eval_loss"] < 1e-3
    assert "accuracy" not in last


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mlp", r"mlp asks for batch\['inputs'\], which the examples have not: they have x, y"),
        ("narrow", r"does not take these examples \(inputs \(4,\), labels \(\) each\)"),
    ],
)
def test_a_model_that_does_not_take_the_examples_is_refused_in_words(model, message):
    names = ("x", "y") if model == "mlp" else ("inputs", "labels")
    arrays = (np.zeros((3, 4), np.float32), np.zeros(3, np.int32))
    data = ClientData.of(dict(zip(names, arrays, strict=True)), [[0, 1, 2]])
    with pytest.raises(DataError, match=message):
        federated_task(load_any(FEDAVG), data)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("federated.algoritm=krum",), "did you mean federated.algorithm?"),
        (("data.format=clients", "data.path=nowhere"), "there is no folder 'nowhere'"),
        (("secagg.enabled=true", "federated.algorithm=median"), "median looks at every update"),
        (("--supervise",), "run a federation without it"),
        (("--plan", "plan.yaml"), "there is no section plan"),
        (("--processes", "2", "--process", "0", "--coordinator", "h:1"), "trains in one process"),
    ],
    ids=["key", "folder", "secagg", "supervise", "plan", "processes"],
)
def test_what_cannot_be_is_refused_in_words(tmp_path, given, message):
    done = shardpar("train", FEDAVG, *given, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(tmp_path):
    given = ("privacy.kind=central", "privacy.noise_multiplier=3.0", "--dry-run")
    done = shardpar("train", FEDAVG, *given, cwd=tmp_path)
    assert "30 clients hold 1438 examples" in done.stderr
    assert "privacy: noise multiplier" in done.stderr
    assert not list(tmp_path.iterdir())
