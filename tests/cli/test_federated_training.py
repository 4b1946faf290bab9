"""`shardpar train` of federations: what a user sees, and what a kill leaves."""

from __future__ import annotations

import json
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpar.cli.federated_training import _require_same_run, federated_task
from shardpar.config import to_yaml
from shardpar.config.load import load_any
from shardpar.errors import ConfigError, DataError
from shardpar.fl.clients import ClientData, write_clients
from shardpar.fl.population import population
from shardpar.fl.simulated_federation import simulated_federation
from shardpar.fl.simulated_rounds import state_after
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.directory import RunDirectory
from tests.cli.command import ROOT, rows, shardpar, start

FEDAVG = str(ROOT / "configs" / "fedavg.gin")
SMALL = (
    "data.clients=6", "federated.cohort=3", "model.hidden=[]", "federated.algorithm=scaffold",
    "checkpoint.every_steps=1",
)  # fmt: skip


def model(run, step):
    shape = {"state": {"params": {"layers.0.weight": jnp.zeros((64, 10))}}}
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(step, shape, partial=True).state
    return np.asarray(state["state"]["params"]["layers.0.weight"])


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_bits_of_one_that_was_not(tmp_path):
    # Rounds without an end, so that it is killed in one.
    endless = (*SMALL, "federated.rounds=100000", "--run-dir", "run")
    process = start("train", FEDAVG, *endless, cwd=tmp_path)
    run = tmp_path / "run"
    for _ in range(3000):
        time.sleep(0.02)
        if (run / "checkpoints" / "3" / "manifest.json").exists():
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = max(row["round"] for row in rows((run / "metrics.jsonl").read_text()))
    assert 3 <= reached < 100000
    end = reached + 3
    again = ("--resume", "run", f"federated.rounds={end}", "--json")
    done = shardpar("train", *again, cwd=tmp_path)
    *printed, last = rows(done.stdout)
    assert {"round", "loss", "accuracy", "bytes", "clients"} <= printed[0].keys()
    assert last["round"] == printed[-1]["round"] == end
    assert last["accuracy"] > 0.5
    kept = rows((run / "metrics.jsonl").read_text())
    assert [row["round"] for row in kept] == list(range(1, end + 1))
    assert (run / "report.html").is_file()
    config = load_any(FEDAVG, [*SMALL, f"federated.rounds={end}"])
    data = population(config.data).data
    task, _ = federated_task(config, data)
    one = simulated_federation(task, data, config.federated, devices=jax.devices()[:1])
    wanted = state_after(one.rounds, end)["params"]["layers.0.weight"]
    np.testing.assert_array_equal(model(run, end), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["federated.learning_rate=0.3"], "federated.learning_rate was 0.1, now 0.3; use the old"),
        (["privacy.kind=local"], "privacy.kind was 'none', now 'local'; use the old"),
        (["model.hidden=[8]"], r"model.hidden was \(64,\), now \(8,\)"),
        (["federated.rounds=99", "federated.chunk=2", "net.job=other"], None),
    ],
)
def test_a_run_goes_on_with_what_it_began_with_only(tmp_path, changes, message):
    directory = RunDirectory(tmp_path)
    directory.config_yaml.write_text(to_yaml(load_any(FEDAVG)))
    config = load_any(FEDAVG, [*changes, f"train.run_dir={tmp_path}"])
    if message is None:
        _require_same_run(config)
        return
    with pytest.raises(ConfigError, match=message):
        _require_same_run(config)


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
        (("--processes", "2", "--process", "0", "--coordinator", "h:1"), "trains in one process"),
    ],
    ids=["key", "folder", "secagg", "supervise", "processes"],
)
def test_what_cannot_be_is_refused_in_words(tmp_path, given, message):
    done = shardpar("train", FEDAVG, *given, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(tmp_path):
    given = ("privacy.kind=central", "privacy.noise_multiplier=8.0", "model.hidden=[]")
    done = shardpar("train", FEDAVG, *given, "--dry-run", cwd=tmp_path)
    assert "30 clients hold 1438 examples" in done.stderr
    assert "privacy: noise multiplier" in done.stderr
    assert not list(tmp_path.iterdir())
