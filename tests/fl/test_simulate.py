"""Simulated rounds against NumPy, against clients alone in their programs, and over devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from shardpar.config.model_source import load_model_source
from shardpar.fl.algorithms.coordinatewise import Coordinatewise
from shardpar.fl.algorithms.ditto import Ditto
from shardpar.fl.algorithms.fedavg import FedAvg
from shardpar.fl.algorithms.fedavgm import FedAvgM
from shardpar.fl.algorithms.fednova import FedNova
from shardpar.fl.algorithms.fedopt import FedOpt
from shardpar.fl.algorithms.fedprox import FedProx
from shardpar.fl.algorithms.krum import Krum
from shardpar.fl.algorithms.scaffold import Scaffold
from shardpar.fl.clients import ClientData, write_clients
from shardpar.fl.cohort import LocalWork, sample_cohort
from shardpar.fl.examples import Examples, order_of
from shardpar.fl.partition import dirichlet
from shardpar.fl.rounds import client_update, gathered, server_update
from shardpar.fl.simulate import simulation
from shardpar.fl.task import Task
from tests.docs.tables import ROOT

MLP = load_model_source(ROOT / "models" / "mlp.py")
DIGITS = load_digits()
INPUTS = (DIGITS.data / 16).astype(np.float32)
LABELS = DIGITS.target.astype(np.int32)
PARTS = dirichlet(LABELS[:600], 9, alpha=0.3, seed=0)
DATA = ClientData.of({"inputs": INPUTS, "labels": LABELS}, PARTS)
WORK = LocalWork(batch=16, epochs=2, seed=7)
RATE, ROUNDS = 0.2, 2
ONE = jax.devices()[:1]

ALGORITHMS = {
    "fedavg": FedAvg(RATE, momentum=0.5),
    "fedprox": FedProx(mu=0.3, learning_rate=RATE),
    "fedavgm": FedAvgM(learning_rate=RATE),
    "fedadam": FedOpt(learning_rate=RATE),
    "scaffold": Scaffold(9, RATE),
    "fednova": FedNova(RATE, momentum=0.5),
    "ditto": Ditto(learning_rate=RATE),
    "median": Coordinatewise(learning_rate=RATE),
    "krum": Krum(byzantine=2, chosen=3, learning_rate=RATE),
}


@pytest.fixture(scope="module")
def task():
    options = MLP.MLPOptions(64, (), 10)
    return Task.of(lambda rngs: MLP.build(options, rngs), MLP.loss)


def simulated(task, algorithm, devices, rounds=ROUNDS, **how):
    sim = simulation(task, algorithm, WORK, devices=devices, **how)
    params = task.init(0)
    state, kept = sim.init(params), sim.kept(params)
    for round_ in range(rounds):
        cohort = sample_cohort(9, 6, seed=1, round_=round_)
        state, sums = sim.round(state, kept, sim.pack(DATA, cohort, round_))
    return jax.device_get(state["params"]), float(sums["loss"] / sums["weight"]), kept


def alone(task, algorithm, rounds=ROUNDS):
    """As parties do it: each in a program of its own, over its own rows only."""
    params = task.init(0)
    state = algorithm.server_init(params)
    kept = {client: algorithm.client_init(params) for client in range(9)}
    for round_ in range(rounds):
        sent = []
        for client in sample_cohort(9, 6, seed=1, round_=round_):
            rows = DATA.of_client(int(client))
            order = order_of(
                len(rows["labels"]), batch=16, epochs=2, seed=7, round_=round_, client=int(client)
            )
            examples = Examples(jax.device_put(rows), jax.device_put(order))
            update, kept[client] = client_update(
                task, algorithm, algorithm.broadcast(state), kept[client], examples
            )
            sent.append(update)
        total, count = gathered(algorithm, sent)
        state = server_update(algorithm, state, total, count)
    return jax.device_get(state["params"])


def softmax_gradient(weight, bias, x, y):
    logits = x @ weight + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return x.T @ p / len(y), p.mean(0)


def numpy_rounds(params, mu=0.0, control=False):
    """FedAvg, FedProx or SCAFFOLD of multinomial logistic regression, in float64."""
    names = ("layers.0.weight", "layers.0.bias")
    w, b = (np.asarray(params[name], np.float64) for name in names)
    server = [np.zeros_like(w), np.zeros_like(b)]
    own = {c: [np.zeros_like(w), np.zeros_like(b)] for c in range(9)}
    for round_ in range(ROUNDS):
        deltas, weights, changes = [], [], []
        for client in sample_cohort(9, 6, seed=1, round_=round_):
            x, y = INPUTS[PARTS[client]].astype(np.float64), LABELS[PARTS[client]]
            order = order_of(len(y), batch=16, epochs=2, seed=7, round_=round_, client=int(client))
            cw, cb = w.copy(), b.copy()
            for rows in order:
                rows = rows[rows >= 0]
                gw, gb = softmax_gradient(cw, cb, x[rows], y[rows])
                gw, gb = gw + mu * (cw - w), gb + mu * (cb - b)
                if control:
                    gw, gb = gw + server[0] - own[client][0], gb + server[1] - own[client][1]
                cw, cb = cw - RATE * gw, cb - RATE * gb
            deltas.append((cw - w, cb - b))
            weights.append(1.0 if control else len(y))
            new = [
                own[client][i] - server[i] + (old - mine) / (len(order) * RATE)
                for i, (old, mine) in enumerate(((w, cw), (b, cb)))
            ]
            changes.append([n - o for n, o in zip(new, own[client], strict=True)])
            own[client] = new
        share = np.array(weights) / np.sum(weights)
        w = w + sum(s * d[0] for s, d in zip(share, deltas, strict=True))
        b = b + sum(s * d[1] for s, d in zip(share, deltas, strict=True))
        for i in range(2):
            server[i] = server[i] + sum(c[i] for c in changes) / 9
    return {names[0]: w, names[1]: b}


@pytest.mark.parametrize(
    ("algorithm", "oracle"),
    [
        (FedAvg(RATE), {}),
        (FedProx(mu=0.3, learning_rate=RATE), {"mu": 0.3}),
        (Scaffold(9, RATE), {"control": True}),
    ],
    ids=["fedavg", "fedprox", "scaffold"],
)
def test_rounds_are_those_of_loops_in_numpy(task, algorithm, oracle):
    found, _, _ = simulated(task, algorithm, ONE)
    for name, wanted in numpy_rounds(task.init(0), **oracle).items():
        np.testing.assert_allclose(found[name], wanted, atol=2e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_clients_alone_in_their_programs_make_the_simulated_model(task, name):
    found, loss, _ = simulated(task, ALGORITHMS[name], ONE)
    assert np.isfinite(loss)
    for leaf, wanted in alone(task, ALGORITHMS[name]).items():
        np.testing.assert_allclose(found[leaf], wanted, atol=1e-6)
        assert not np.array_equal(wanted, task.init(0)[leaf])


@pytest.mark.parametrize("how", [{}, {"chunk": 2}], ids=["one by one", "two at a time"])
@pytest.mark.parametrize("name", ["fedavg", "scaffold", "median"])
def test_eight_devices_and_chunks_make_the_model_of_one(task, name, how):
    one, _, _ = simulated(task, ALGORITHMS[name], ONE)
    found, _, _ = simulated(task, ALGORITHMS[name], jax.devices(), **how)
    for leaf, wanted in one.items():
        np.testing.assert_allclose(found[leaf], wanted, atol=2e-6)


def test_fednova_of_equal_clients_is_fedavg(task):
    rows = np.array_split(np.arange(288), 9)
    data = ClientData.of({"inputs": INPUTS, "labels": LABELS}, rows)
    found = []
    for algorithm in (FedAvg(RATE), FedNova(RATE)):
        sim = simulation(task, algorithm, WORK, devices=ONE)
        params = task.init(0)
        state, _ = sim.round(sim.init(params), sim.kept(params), sim.pack(data, range(9), 0))
        found.append(jax.device_get(state["params"]))
    for leaf in found[0]:
        np.testing.assert_allclose(found[0][leaf], found[1][leaf], atol=1e-6)


def test_one_wrong_client_moves_the_mean_and_neither_median_nor_krum(task):
    updates = np.random.default_rng(0).normal(1.0, 0.1, (7, 5)).astype(np.float32)
    updates[3] = 1e6
    weight = np.ones(7, np.float32)
    total = {"delta": {"w": updates}, "weight": weight, "loss": weight}
    state = {"params": {"w": np.zeros(5, np.float32)}}
    honest = np.delete(updates, 3, axis=0)
    for algorithm in (Coordinatewise(), Coordinatewise("trimmed", 0.2), Krum(1, 1)):
        moved = server_update(algorithm, state, total, np.int32(7))["params"]["w"]
        assert np.all((honest.min(0) <= moved) & (moved <= honest.max(0)))
    np.testing.assert_allclose(
        server_update(Coordinatewise(), state, total, np.int32(7))["params"]["w"],
        np.median(updates, axis=0),
        rtol=1e-6,
    )


def test_clients_streamed_from_disk_make_the_model_of_those_in_memory(task, tmp_path):
    write_clients(tmp_path / "clients", (DATA.of_client(c) for c in range(9)))
    stored = ClientData.open(tmp_path / "clients")
    sim = simulation(task, FedAvg(RATE), WORK, devices=ONE)
    params = task.init(0)
    models = [
        sim.round(sim.init(params), sim.kept(params), sim.pack(data, [1, 4, 8], 3))[0]["params"]
        for data in (DATA, stored)
    ]
    for leaf in models[0]:
        np.testing.assert_array_equal(models[0][leaf], models[1][leaf])
    counts = [len(part) for part in PARTS]
    assert stored.counts.tolist() == counts


def test_digits_are_learnt(task):
    sim = simulation(task, FedAvg(RATE), WORK, devices=ONE)
    params = task.init(0)
    state, kept = sim.init(params), sim.kept(params)
    for round_ in range(15):
        state, _ = sim.round(state, kept, sim.pack(DATA, range(9), round_))
    weight, bias = state["params"]["layers.0.weight"], state["params"]["layers.0.bias"]
    right = (INPUTS[600:] @ weight + bias).argmax(1) == LABELS[600:]
    assert right.mean() > 0.82
