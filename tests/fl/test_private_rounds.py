"""Whole private trainings: to the budget and no further, in the clear and under masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpar.errors import ConfigError, RunError
from shardpar.fl.algorithms.fedavg import FedAvg
from shardpar.fl.algorithms.private_sgd import PrivateSGD
from shardpar.fl.algorithms.private_users import PrivateUsers
from shardpar.fl.ledger import Ledger, Release, epsilon_of
from shardpar.fl.privacy_options import PrivacyOptions
from shardpar.fl.private_rounds import (
    begin_distributed,
    budget_of,
    distributed_noise,
    example_noise,
    released_sum,
    user_mechanism,
)
from shardpar.fl.streams import Randomness
from shardpar.fl.task import Task
from tests.fl.algorithms.test_private import DIMS, Line, data, loss
from tests.fl.federation import Federation, run_threads


def test_central_rounds_train_and_stop_at_the_budget(tmp_path):
    options = PrivacyOptions(kind="central", epsilon=8.0, clip=0.5, sampling_rate=0.5)
    clients, rounds = 200, 3
    mechanism = user_mechanism(options, clients=clients * 0.5, rounds=rounds, dims=DIMS)
    task = Task.of(Line, loss)
    algorithm = PrivateUsers(FedAvg(0.05), mechanism, clip=options.clip)
    client = jax.jit(lambda b, e: algorithm.client(task, b, (), e)[0])
    examples, random = [data(seed) for seed in range(clients // 20)], Randomness(bytes(32))
    state, done = algorithm.server_init({"w": jnp.zeros(DIMS)}), 0
    with Ledger(tmp_path / "ledger", budget_of(options)) as ledger:
        while ledger.allows(mechanism.release(DIMS, 0.5)):
            drawn = np.flatnonzero(random.words(clients) < np.uint64(1 << 63))
            sent = [client(algorithm.broadcast(state), examples[at // 20]) for at in drawn]
            total = jax.tree.map(lambda *leaves: sum(leaves), *sent)
            noisy = released_sum(
                ledger,
                mechanism,
                total,
                clip=float(state["privacy"]["clip"]),
                sampling_rate=0.5,
                random=random,
                what=f"round {done}",
            )
            assert (noisy["update"]["delta"]["w"] != total["update"]["delta"]["w"]).all()
            state = algorithm.server(state, noisy, len(drawn))
            done += 1
        assert 7.9 < ledger.spent() <= 8.0
        with pytest.raises(RunError, match="stop training"):
            released_sum(
                ledger, mechanism, total, clip=0.5, sampling_rate=0.5, random=random, what="more"
            )
    assert done == rounds
    truth, w = np.arange(DIMS), np.asarray(state["params"]["w"])
    assert np.linalg.norm(w - truth) < np.linalg.norm(truth) - 1.0


def test_distributed_rounds_under_masks_with_a_client_that_dies(tmp_path):
    clip = 1.0
    options = PrivacyOptions(kind="distributed", epsilon=10.0, clip=clip)
    noise = distributed_noise(options, rounds=2, dims=3000, most=5, least=3)
    federation = Federation.of(5, noise.words, threshold=3)
    names = list(federation.identities)
    rows = np.random.default_rng(0).normal(0, 1, (5, 3000))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with Ledger(tmp_path / "ledger", budget_of(options)) as ledger:
        begin_distributed(ledger, noise, "round 0")
        vectors = {
            name: noise.encode({"w": row}, 0.0, clip, Randomness())
            for name, row in zip(names, rows, strict=True)
        }
        aggregate, _ = run_threads(federation, vectors, {names[1]: "masked"}, 1.0)
        tree, _ = noise.decode(aggregate.total, {"w": rows[0]}, clip)
        begin_distributed(ledger, noise, "round 1")
        assert not ledger.allows(noise.release())
    exact = rows[[0, 2, 3, 4]].sum(axis=0)
    unit = noise.mechanism.noise_multiplier * clip
    assert (tree["w"] - exact).std() == pytest.approx(unit * (4 / 3) ** 0.5, rel=0.06)


def test_example_noise_is_the_least_that_the_budget_allows():
    options = PrivacyOptions(kind="example", epsilon=3.0)
    algorithm = PrivateSGD(records=1000, sampling_rate=0.05, steps=20)
    z = example_noise(options, algorithm, rounds=10, dims=50)
    assert 2.99 < epsilon_of([Release(z, 0.05, 200)], 1e-5) <= 3.0


def test_options_that_would_promise_too_much_are_refused():
    with pytest.raises(ConfigError, match="sampling hides nobody from it; use 1"):
        distributed_noise(
            PrivacyOptions(kind="distributed", sampling_rate=0.1), rounds=1, dims=1, most=3, least=2
        )
    with pytest.raises(ConfigError, match="this is for 'central'"):
        user_mechanism(PrivacyOptions(kind="local"), clients=2, rounds=1, dims=1)
    given = PrivacyOptions(kind="central", noise_multiplier=3.5)
    assert user_mechanism(given, clients=9, rounds=1, dims=1).noise_multiplier == 3.5
