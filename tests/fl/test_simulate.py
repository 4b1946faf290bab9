"""Simulated rounds against NumPy, against clients alone in their programs, and over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_digits

from shardpar.config.model_source import load_model_source
from shardpar.fl.algorithms import krum
from shardpar.fl.algorithms.coordinatewise import Coordinatewise
from shardpar.fl.algorithms.ditto import Ditto
from shardpar.fl.algorithms.fedavg import FedAvg
from shardpar.fl.algorithms.fedavgm import FedAvgM
from shardpar.fl.algorithms.fedbuff import FedBuff
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
    "adam": FedOpt("adam", RATE),
    "yogi": FedOpt("yogi", RATE),
    "adagrad": FedOpt("adagrad", RATE),
    "scaffold": Scaffold(9, RATE),
    "fednova": FedNova(RATE, momentum=0.5),
    "ditto": Ditto(learning_rate=RATE),
    "median": Coordinatewise(learning_rate=RATE),
    "trimmed": Coordinatewise("trimmed", 0.2, learning_rate=RATE),
    "krum": Krum(byzantine=2, chosen=3, learning_rate=RATE),
    "fedbuff": FedBuff(learning_rate=RATE),
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
    return np.append(x.T @ p / len(y), p.mean(0)[None], axis=0)


def numpy_sgd(start, client, round_, *, momentum=0.0, pull=0.0, towards=None, correction=0.0):
    """A client's model after its round, [65, 10] with the bias last, and how many steps it took."""
    x, y = INPUTS[PARTS[client]].astype(np.float64), LABELS[PARTS[client]]
    order = order_of(len(y), batch=16, epochs=2, seed=7, round_=round_, client=int(client))
    model, velocity = start.copy(), np.zeros_like(start)
    for rows in order:
        rows = rows[rows >= 0]
        gradient = softmax_gradient(model[:-1], model[-1], x[rows], y[rows]) + correction
        gradient += pull * (model - (start if towards is None else towards))
        velocity = momentum * velocity + gradient
        model = model - RATE * velocity
    return model, len(order)


def weighted(deltas, sizes):
    return np.average(deltas, axis=0, weights=sizes)


class Numpy:
    """The papers' algorithms once more, as loops over float64 arrays."""

    def __init__(self, start):
        self.model, self.own = start, dict.fromkeys(range(9), start)
        self.control, self.controls = np.zeros_like(start), dict.fromkeys(range(9), 0 * start)
        self.first, self.second = np.zeros_like(start), np.full_like(start, 1e-3**2)

    def deltas(self, cohort, round_, **how):
        found = [numpy_sgd(self.model, c, round_, **how)[0] - self.model for c in cohort]
        return np.stack(found), [len(PARTS[c]) for c in cohort]

    def fedavg(self, cohort, round_):
        self.model = self.model + weighted(*self.deltas(cohort, round_, momentum=0.5))

    def fedprox(self, cohort, round_):
        self.model = self.model + weighted(*self.deltas(cohort, round_, pull=0.3))

    def fedavgm(self, cohort, round_):
        self.first = 0.9 * self.first + weighted(*self.deltas(cohort, round_))
        self.model = self.model + self.first

    def adaptive(self, cohort, round_, rule):
        d = weighted(*self.deltas(cohort, round_))
        self.first = 0.9 * self.first + 0.1 * d
        self.second = {
            "adagrad": lambda v: v + d**2,
            "yogi": lambda v: v - 0.01 * d**2 * np.sign(v - d**2),
            "adam": lambda v: 0.99 * v + 0.01 * d**2,
        }[rule](self.second)
        self.model = self.model + 0.03 * self.first / (np.sqrt(self.second) + 1e-3)

    def scaffold(self, cohort, round_):
        deltas, changes = [], []
        for c in cohort:
            drift = self.control - self.controls[c]
            after, steps = numpy_sgd(self.model, c, round_, correction=drift)
            control = self.controls[c] - self.control + (self.model - after) / (steps * RATE)
            changes.append(control - self.controls[c])
            deltas.append(after - self.model)
            self.controls[c] = control
        self.model = self.model + np.mean(deltas, axis=0)
        self.control = self.control + np.sum(changes, axis=0) / 9

    def fednova(self, cohort, round_):
        units, per_unit, sizes = [], [], []
        for c in cohort:
            after, steps = numpy_sgd(self.model, c, round_, momentum=0.5)
            # A gradient of step i is in the velocity of that step and of every later one.
            size = sum(0.5**later for i in range(steps) for later in range(steps - i))
            units.append(size)
            per_unit.append((after - self.model) / size)
            sizes.append(len(PARTS[c]))
        self.model = self.model + weighted(units, sizes) * weighted(per_unit, sizes)

    def ditto(self, cohort, round_):
        for c in cohort:
            how = {"pull": 0.1, "towards": self.model}
            self.own[c] = numpy_sgd(self.own[c], c, round_, **how)[0]
        self.model = self.model + weighted(*self.deltas(cohort, round_))

    def median(self, cohort, round_):
        self.model = self.model + np.median(self.deltas(cohort, round_)[0], axis=0)

    def trimmed(self, cohort, round_):
        self.model = self.model + stats.trim_mean(self.deltas(cohort, round_)[0], 0.2)

    def krum(self, cohort, round_):
        deltas, _ = self.deltas(cohort, round_)
        self.model = self.model + deltas[np.argsort(krum_scores(deltas, 2))[:3]].mean(0)

    def fedbuff(self, cohort, round_):
        self.model = self.model + self.deltas(cohort, round_)[0].mean(0)


def krum_scores(updates, byzantine):
    """Each one's distances to its n - f - 2 nearest others, the first of all being itself."""
    found = []
    for one in updates:
        distances = sorted(np.sum((one - other) ** 2) for other in updates)
        found.append(sum(distances[1 : 1 + len(updates) - byzantine - 2]))
    return found


def joined(params):
    leaves = [np.asarray(params[f"layers.0.{name}"], np.float64) for name in ("weight", "bias")]
    return np.append(leaves[0], leaves[1][None], axis=0)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rounds_are_those_of_numpy_and_of_clients_alone_in_their_programs(task, name):
    found, loss, kept = simulated(task, ALGORITHMS[name], ONE)
    assert np.isfinite(loss)
    for leaf, wanted in alone(task, ALGORITHMS[name]).items():
        np.testing.assert_array_equal(found[leaf], wanted)
    oracle = Numpy(joined(task.init(0)))
    for round_ in range(ROUNDS):
        cohort = [int(c) for c in sample_cohort(9, 6, seed=1, round_=round_)]
        if name in ("adagrad", "yogi", "adam"):
            oracle.adaptive(cohort, round_, name)
        else:
            getattr(oracle, name)(cohort, round_)
    np.testing.assert_allclose(joined(found), oracle.model, atol=2e-5)
    if name == "ditto":
        for client in range(9):
            own = joined(kept.of_client(client)["params"])
            np.testing.assert_allclose(own, oracle.own[client], atol=2e-5)


def test_stale_updates_are_of_their_own_model_and_count_less(task):
    sim = simulation(task, FedBuff(learning_rate=RATE, exponent=0.5), WORK, devices=ONE)
    old, new = task.init(0), task.init(1)
    placed = sim.pack(DATA, [2, 5], 0)
    sent = {"params": jax.tree.map(lambda a, b: np.stack([a, b]), old, new)}
    places = len(placed.cohort.clients)
    versions, staleness = np.zeros((2, places), np.int32)
    versions[1], staleness[0] = 1, 3
    state, _ = sim.stale_round(sim.init(new), sent, versions, staleness, placed)
    moves = [
        numpy_sgd(joined(params), client, 0)[0] - joined(params)
        for params, client in ((old, 2), (new, 5))
    ]
    wanted = joined(new) + (moves[0] / np.sqrt(1 + 3) + moves[1]) / 2
    np.testing.assert_allclose(joined(jax.device_get(state["params"])), wanted, atol=2e-5)


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


@pytest.mark.parametrize("byzantine", [0, 1, 3])
def test_krums_scores_are_those_of_brute_force(byzantine):
    updates = np.random.default_rng(1).normal(size=(8, 2, 3)).astype(np.float32)
    there = np.array([True] * 7 + [False])
    found = krum.scores({"w": jnp.array(updates)}, jnp.array(there), byzantine)
    np.testing.assert_allclose(found[:7], krum_scores(updates[:7], byzantine), rtol=1e-5)
    assert np.isinf(found[7])


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
