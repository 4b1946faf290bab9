"""A simulated round of federated averaging beside FedJAX and Flower with Ray.

An MLP 784-128-10, clients with 100 examples each, one epoch in batches of 20, plain SGD. Rounds of
shardpar and FedJAX alternate in one process; Flower's follow, in a simulation of its own with an
actor to each core. CPU seconds are those of this process and all that it started. Each peer gets
what is fast in it: FedJAX its jit backend, Flower clients whose epoch is one compiled scan. Peers
that are not installed are left out and said to be. FedJAX needs the alias `jax.tree_map` again.

    python -m benchmarks.fl_simulate --clients 100 --rounds 5 --repeats 5
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from shardpar.config.bundled import bundled_models
from shardpar.config.model_source import load_model_source
from shardpar.fl.clients import ClientData
from shardpar.fl.options import FederatedOptions
from shardpar.fl.simulated_federation import simulated_federation
from shardpar.fl.task import Task

INPUTS, HIDDEN, CLASSES, EXAMPLES, BATCH, RATE = 784, 128, 10, 100, 20, 0.1


@dataclass(frozen=True)
class Cost:
    """Of one round."""

    cpu_s: float
    wall_s: float


def cpu_s() -> float:
    """CPU seconds of this process and its descendants, those that are alive."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def examples(client: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a client: classes lie around centres of their own; each client has more of some."""
    random = np.random.default_rng(client)
    centres = np.random.default_rng(2**20).normal(0, 0.1, (CLASSES, INPUTS))
    labels = random.choice(CLASSES, EXAMPLES, p=random.dirichlet(np.full(CLASSES, 0.5)))
    inputs = centres[labels] + random.normal(0, 0.3, (EXAMPLES, INPUTS))
    return inputs.astype(np.float32), labels.astype(np.int32)


def first_params() -> dict[str, np.ndarray]:
    """The model that all begin with."""
    random = np.random.default_rng(7)
    return {
        "w1": random.normal(0, (2 / INPUTS) ** 0.5, (INPUTS, HIDDEN)).astype(np.float32),
        "b1": np.zeros(HIDDEN, np.float32),
        "w2": random.normal(0, (2 / HIDDEN) ** 0.5, (HIDDEN, CLASSES)).astype(np.float32),
        "b2": np.zeros(CLASSES, np.float32),
    }


def mean_loss(params: Any, x: Any, y: Any) -> Any:
    """The same model as models/mlp.py, as the peers' users write it."""
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
    return -jnp.mean(picked)


@jax.jit
def trained(params: Any, x: Any, y: Any) -> Any:
    """One epoch as one program: x [steps, batch, inputs], y [steps, batch]."""

    def step(params: Any, batch: Any) -> tuple[Any, None]:
        grads = jax.grad(mean_loss)(params, *batch)
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads), None

    return jax.lax.scan(step, params, (x, y))[0]


Run = Callable[[], None]


def ours(clients: int) -> tuple[Run, Callable[[], Any]]:
    """(one round, the model so far)."""
    module = load_model_source(bundled_models()["mlp"])
    options = module.MLPOptions(INPUTS, (HIDDEN,), CLASSES)
    task = Task.of(lambda rngs: module.build(options, rngs), module.loss)
    parts = [examples(client) for client in range(clients)]
    rows = np.arange(clients * EXAMPLES).reshape(clients, EXAMPLES)
    inputs, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
    data = ClientData.of({"inputs": inputs, "labels": labels}, list(rows))
    federated = FederatedOptions(rounds=10**6, batch=BATCH, learning_rate=RATE)
    rounds = simulated_federation(task, data, federated).rounds
    begun = rounds.begin()
    names = ("layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias")
    params = dict(zip(names, map(jnp.asarray, first_params().values()), strict=True))
    state = {**begun.state, "params": jax.device_put(params, begun.params[names[0]].sharding)}
    position = type(begun)(0, state, begun.kept)
    coming = rounds.after(position)

    def run() -> None:
        nonlocal position
        position, _ = next(coming)
        jax.block_until_ready(position.params)

    def model() -> Any:
        return dict(zip(first_params(), (position.params[name] for name in names), strict=True))

    return run, model


def fedjax_rounds(clients: int) -> tuple[Run, Callable[[], Any]] | None:
    """(one round, the model so far), or None where FedJAX is not installed."""
    jax.tree_map = jax.tree.map  # what FedJAX calls, and JAX has dropped
    try:
        import fedjax
    except ImportError:
        return None
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        lambda params, batch, _: jax.grad(mean_loss)(params, batch["x"], batch["y"]),
        fedjax.optimizers.sgd(RATE),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH, num_epochs=1, seed=0),
    )
    cohort = []
    for client in range(clients):
        x, y = examples(client)
        dataset = fedjax.ClientDataset({"x": x, "y": y})
        cohort.append((client, dataset, jax.random.PRNGKey(client)))
    state = algorithm.init(jax.tree.map(jnp.asarray, first_params()))

    def run() -> None:
        nonlocal state
        state, _ = algorithm.apply(state, cohort)
        jax.block_until_ready(state.params)

    return run, lambda: state.params


def flower_rounds(clients: int, rounds: int) -> tuple[list[Cost], Any] | None:
    """Costs of a whole simulation's rounds but the first, and its model."""
    try:
        import ray
        from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
        from flwr.clientapp import ClientApp
        from flwr.serverapp import ServerApp
        from flwr.serverapp.strategy import FedAvg
        from flwr.simulation import run_simulation
    except ImportError:
        return None
    del ray
    names, first = list(first_params()), first_params()
    app = ClientApp()
    # Actors import this module once and keep its compiled program; what they are sent from
    # __main__ they would compile anew for every message.
    imported = importlib.import_module("benchmarks.fl_simulate")

    @app.train()
    def train(message: Any, context: Any) -> Any:
        client = int(context.node_config["partition-id"])
        x, y = imported.examples(client)
        order = np.random.default_rng(client).permutation(EXAMPLES)
        params = dict(zip(names, message.content["arrays"].to_numpy_ndarrays(), strict=True))
        after = imported.trained(
            params, x[order].reshape(-1, BATCH, INPUTS), y[order].reshape(-1, BATCH)
        )
        arrays = ArrayRecord([np.asarray(after[name]) for name in names])
        told = MetricRecord({"num-examples": EXAMPLES})
        return Message(RecordDict({"arrays": arrays, "metrics": told}), reply_to=message)

    marks: list[tuple[float, float]] = []
    found: list[Any] = []

    class Marked(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            out = super().aggregate_train(server_round, replies)
            marks.append((cpu_s(), time.perf_counter()))
            return out

    server = ServerApp()

    @server.main()
    def main(grid: Any, _: Any) -> None:
        strategy = Marked(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=clients)
        arrays = ArrayRecord([first[name] for name in names])
        result = strategy.start(grid, arrays, num_rounds=rounds + 1)
        found.append(dict(zip(names, result.arrays.to_numpy_ndarrays(), strict=True)))

    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, app, clients, backend_config=backend)
    costs = [Cost(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks)]
    return costs, found[0]


def timed(run: Run, rounds: int) -> Cost:
    """Of a round, the mean over some."""
    cpu, wall = cpu_s(), time.perf_counter()
    for _ in range(rounds):
        run()
    return Cost((cpu_s() - cpu) / rounds, (time.perf_counter() - wall) / rounds)


def loss_of(params: Any, clients: int) -> float:
    """Of a model, over all examples."""
    x, y = (np.concatenate(z) for z in zip(*map(examples, range(clients)), strict=True))
    return float(mean_loss(params, x, y))


def rows(clients: int, rounds: int, repeats: int) -> Iterator[tuple[str, Cost, float]]:
    """What was measured: name, median cost of a round, loss after as many rounds as ran."""
    mine, model = ours(clients)
    peer = fedjax_rounds(clients)
    runs = {"shardpar": mine} | ({"FedJAX, jit": peer[0]} if peer else {})
    models = {"shardpar": model} | ({"FedJAX, jit": peer[1]} if peer else {})
    for run in runs.values():
        run()
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            costs[name].append(timed(run, rounds))
    losses = {name: loss_of(models[name](), clients) for name in runs}
    flower = flower_rounds(clients, rounds * repeats)
    if flower is not None:
        costs["Flower, Ray"], losses["Flower, Ray"] = flower[0], loss_of(flower[1], clients)
    for name, found in costs.items():
        middle = Cost(
            statistics.median(cost.cpu_s for cost in found),
            statistics.median(cost.wall_s for cost in found),
        )
        yield name, middle, losses[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5, help="between two looks at the clock")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    found = list(rows(given.clients, given.rounds, given.repeats))
    base = found[0][1]
    count = given.rounds * given.repeats + 1
    print(f"{given.clients} clients, median of {given.repeats} times {given.rounds} rounds")
    print(f"| | CPU ms a round | wall ms | shardpar's share of its CPU | loss after {count} |")
    print("|---|---|---|---|---|")
    for name, cost, loss in found:
        share = base.cpu_s / cost.cpu_s
        print(
            f"| {name} | {1e3 * cost.cpu_s:,.1f} | {1e3 * cost.wall_s:,.1f} | {share:.3f} | "
            f"{loss:.4f} |"
        )
    for name in {"FedJAX, jit", "Flower, Ray"} - {name for name, *_ in found}:
        print(f"{name} is not installed")


if __name__ == "__main__":
    main()
