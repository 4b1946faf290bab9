"""Private algorithms against NumPy and against what they are without noise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from shardpar.fl.algorithms.algorithm import Algorithm
from shardpar.fl.algorithms.fedavg import FedAvg
from shardpar.fl.algorithms.private_sgd import PrivateSGD, clipped_gradients, sample_capacity
from shardpar.fl.algorithms.private_users import PrivateUsers
from shardpar.fl.examples import Examples, order_of
from shardpar.fl.privacy import UserMechanism
from shardpar.fl.task import Task

DIMS, ROWS = 6, 40


class Line(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(jnp.zeros(DIMS))

    def __call__(self, x):
        return x @ self.w[...]


def loss(model, batch):
    miss = model(batch["x"]) - batch["y"]
    return jnp.sum(batch["weights"] * miss**2) / 2, jnp.sum(batch["weights"])


@pytest.fixture(scope="module")
def task():
    return Task.of(Line, loss)


def data(seed: int, rows: int = ROWS, padding: int = 5) -> Examples:
    random = np.random.default_rng(seed)
    x = random.normal(0, 1, (rows + padding, DIMS)).astype(np.float32)
    y = (x @ np.arange(DIMS) + random.normal(0, 0.1, rows + padding)).astype(np.float32)
    order = order_of(rows, batch=8, epochs=1, seed=0, round_=0, client=seed)
    return Examples({"x": jnp.asarray(x), "y": jnp.asarray(y)}, jnp.asarray(order))


def numpy_clipped(w, x, y, clip):
    gradients = (x @ w - y)[:, None] * x
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    return (gradients * np.minimum(1, clip / norms)).sum(axis=0)


def test_gradients_are_cut_one_by_one(task):
    examples = data(0)
    w = np.random.default_rng(1).normal(0, 1, DIMS).astype(np.float32)
    rows = np.array([3, 0, -1, 17, 39, -1, *range(20, 36), *[-1] * 40])
    got = clipped_gradients(task, {"w": jnp.asarray(w)}, examples, jnp.asarray(rows), 2.0)
    real = rows[rows >= 0]
    x, y = examples.arrays["x"][real], examples.arrays["y"][real]
    np.testing.assert_allclose(got["w"], numpy_clipped(w, x, y, 2.0), rtol=1e-4, atol=1e-4)
    one = clipped_gradients(task, {"w": jnp.asarray(w)}, examples, jnp.array([3]), 0.5)
    assert 0.499 < np.linalg.norm(one["w"]) <= 0.5


@pytest.mark.parametrize("noise", ["secure", "simulated"])
def test_samples_are_poisson_and_noise_is_as_wide_as_accounted(task, noise):
    # Gradients of records without a signal are 0: what moves the model is the noise alone.
    steps, rate, z, clip = 50, 0.3, 1.7, 0.5
    algorithm = PrivateSGD(
        records=10,
        learning_rate=1.0,
        clip=clip,
        noise_multiplier=z,
        sampling_rate=rate,
        steps=steps,
        noise=noise,
    )
    assert isinstance(algorithm, Algorithm)
    examples = Examples({"x": jnp.zeros((10, DIMS)), "y": jnp.zeros(10)}, data(0).order[:1])
    client = jax.jit(lambda b: algorithm.client(task, b, (), examples)[0])
    moved = [
        client({"params": {"w": jnp.zeros(DIMS)}, "round": jnp.int32(at)})["delta"]["w"]
        for at in range(40)
    ]
    drawn = np.concatenate(moved) / (z * clip * math.sqrt(steps) / (rate * 10))
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    draw, _ = algorithm._secure(50) if noise == "secure" else algorithm._simulated(50)
    key = jax.random.key(0)
    sample = jax.jit(lambda at: draw(key, at, jnp.int32(40)))
    drawn = np.array([sample(jnp.int32(at)) for at in range(400)])
    assert not drawn[:, 40:].any()
    counts = drawn.sum(axis=1)
    # A shuffled batch of a fixed size would have no spread.
    assert counts.mean() == pytest.approx(12, abs=0.6)
    assert counts.var() == pytest.approx(40 * 0.3 * 0.7, rel=0.3)
    assert drawn[:, :40].mean(axis=0).max() < 0.42


def test_with_everyone_drawn_and_little_noise_steps_are_those_of_numpy(task):
    algorithm = PrivateSGD(
        records=ROWS, learning_rate=0.2, clip=1.0, noise_multiplier=1e-4, sampling_rate=1.0, steps=3
    )
    examples = data(3)
    state = algorithm.server_init({"w": jnp.zeros(DIMS)})
    sent, _ = algorithm.client(task, algorithm.broadcast(state), (), examples)
    w = np.zeros(DIMS, np.float32)
    x, y = examples.arrays["x"][:ROWS], examples.arrays["y"][:ROWS]
    for _ in range(3):
        w = w - 0.2 / ROWS * numpy_clipped(w, x, y, 1.0)
    np.testing.assert_allclose(sent["delta"]["w"], w, atol=1e-4)
    assert float(sent["weight"]) == 1.0
    after = algorithm.server(state, sent, 1)
    np.testing.assert_allclose(after["params"]["w"], w, atol=1e-4)


def test_simulated_noise_repeats_and_differs_between_clients_and_rounds(task):
    algorithm = PrivateSGD(records=ROWS, steps=2, noise="simulated", seed=3)

    def move(seed, round_):
        state = {"params": {"w": jnp.zeros(DIMS)}, "round": jnp.int32(round_)}
        return algorithm.client(task, state, (), data(seed))[0]["delta"]["w"].tolist()

    assert move(0, 0) == move(0, 0)
    assert len({tuple(move(s, r)) for s in range(3) for r in range(3)}) == 9
    secure = PrivateSGD(records=ROWS, steps=2)
    state = {"params": {"w": jnp.zeros(DIMS)}, "round": jnp.int32(0)}
    first, second = (secure.client(task, state, (), data(0))[0]["delta"]["w"] for _ in range(2))
    assert (first != second).all()


def test_what_a_round_of_dp_sgd_costs():
    release = PrivateSGD(records=600, noise_multiplier=1.1, sampling_rate=0.05, steps=20).release(9)
    assert (release.noise_multiplier, release.sampling_rate, release.count) == (1.1, 0.05, 20)
    assert release.extra_delta > 0
    assert stats.binom.sf(sample_capacity(600, 0.05), 600, 0.05) <= 1e-12


def test_users_are_clipped_and_averaged_over_the_expected_number(task):
    algorithm = PrivateUsers(FedAvg(0.1), UserMechanism(1.0, clients=4), clip=0.3)
    assert isinstance(algorithm, Algorithm)
    state = algorithm.server_init({"w": jnp.zeros(DIMS)})
    sent = []
    for seed in range(3):
        update, _ = algorithm.client(task, algorithm.broadcast(state), (), data(seed))
        assert np.linalg.norm(update["update"]["delta"]["w"]) <= 0.3 * (1 + 1e-5)
        sent.append(update)
    total = jax.tree.map(lambda *leaves: sum(leaves), *sent)
    assert float(total["loss"]) == 0.0
    after = algorithm.server(state, total, 3)
    # Three came where four were expected: the number that came must not show.
    np.testing.assert_allclose(after["params"]["w"], total["update"]["delta"]["w"] / 4, rtol=1e-5)
    assert float(after["privacy"]["clip"]) == pytest.approx(0.3)


def test_simulated_users_noise_is_as_wide_as_accounted_and_repeats(task):
    mechanism = UserMechanism(2.0, clients=10, quantile=0.5)
    algorithm = PrivateUsers(FedAvg(), mechanism, clip=0.5, simulated_seed=1)
    state = algorithm.server_init({"w": jnp.zeros(20_000)})
    zero = {"update": {"delta": {"w": jnp.zeros(20_000)}}, "within": jnp.float32(0)}
    after = algorithm.server(state, zero, 10)
    drawn = np.asarray(after["params"]["w"]) / (mechanism.update_multiplier * 0.5 / 10)
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    again = algorithm.server(state, zero, 10)
    np.testing.assert_array_equal(after["params"]["w"], again["params"]["w"])
    later = algorithm.server(after, zero, 10)
    assert not np.allclose(later["params"]["w"], 2 * after["params"]["w"])
    assert float(after["privacy"]["clip"]) != 0.5


def test_algorithms_that_see_each_update_are_refused():
    class Median(FedAvg):
        aggregate = "each"

    with pytest.raises(ValueError, match="sees every update"):
        PrivateUsers(Median(), UserMechanism(1.0, 1))
