"""Mechanisms: sensitivity by brute force, noise by its spread, distributed sums under masks."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shardpar.errors import SpecError
from shardpar.fl.noise import MOST_SIGMA
from shardpar.fl.privacy import (
    DistributedNoise,
    UserMechanism,
    clip_update,
    local_noise,
    noised,
    release_of,
)
from shardpar.fl.streams import Randomness
from tests.fl.federation import Federation, play


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10), st.integers(1, 100))
def test_no_update_is_beyond_the_clip(seed, clip, weight):
    random = np.random.default_rng(seed)
    mean = {"a": random.normal(0, 1, (3, 2)), "b": random.normal(0, 1, 4)}
    sent = {k: jnp.float32(weight * v) for k, v in mean.items()}
    clipped, within = clip_update({**sent, "weight": jnp.float32(weight), "loss": 1.0}, clip)
    norm = math.sqrt(sum((v**2).sum() for v in mean.values()))
    got = math.sqrt(sum(float((v**2).sum()) for v in clipped.values()))
    assert got == pytest.approx(min(norm, clip), rel=1e-5)
    if abs(norm - clip) > 1e-4:
        assert float(within) == (0.5 if norm < clip else -0.5)
    assert set(clipped) == {"a", "b"}


def test_clients_without_examples_count_for_nothing():
    zero = {"delta": jnp.zeros(3), "weight": jnp.float32(0), "loss": jnp.float32(0)}
    clipped, within = clip_update(zero, 1.0)
    assert not clipped["delta"].any()
    assert float(within) == 0.0


def test_central_noise_has_one_unit_on_a_grid_that_does_not_depend_on_the_sum():
    random = Randomness(bytes(32))
    vector = np.linspace(-3, 3, 50_000)
    z = 1.3
    out = noised(vector, z, random)
    assert stats.kstest(out - vector, "norm").pvalue > 1e-4
    steps = MOST_SIGMA - z * math.sqrt(vector.size)
    on_grid = out * steps
    np.testing.assert_allclose(on_grid, np.rint(on_grid), atol=1e-6)
    with pytest.raises(SpecError, match="too coarse"):
        release_of(100.0, 10**9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 5))
def test_with_a_count_the_whole_rounds_sensitivity_is_as_accounted(seed, z):
    mechanism = UserMechanism(z, clients=100, quantile=0.5)
    random = np.random.default_rng(seed)
    update = {"delta": jnp.float32(random.normal(0, 5, 8)), "weight": jnp.float32(1), "loss": 0.0}
    clipped, within = clip_update(update, 0.7)
    vector = np.append(np.asarray(clipped["delta"], np.float64), float(within))
    # What a user moves, in units of the noise on each coordinate.
    assert np.linalg.norm(vector / mechanism.units(0.7, 8)) <= (1 + 1e-5) / z
    # At the clip itself it is all of it: no more noise than is needed.
    most = np.append(0.7 * np.eye(8)[0], 0.5)
    assert np.linalg.norm(most / mechanism.units(0.7, 8)) == pytest.approx(1 / z)
    with pytest.raises(SpecError, match="spends all"):
        UserMechanism(z, clients=100, quantile=0.5, count_noise=z / 2)


def test_central_noise_on_trees():
    mechanism = UserMechanism(2.0, clients=10, quantile=0.5)
    tree = {"w": np.full((100, 50), 3.0), "b": np.zeros(7)}
    out, within = mechanism.central(tree, 4.0, 0.5, Randomness(bytes(32)))
    spread = mechanism.update_multiplier * 0.5
    assert stats.kstest((out["w"] - 3.0).ravel() / spread, "norm").pvalue > 1e-4
    assert out["b"].shape == (7,)
    assert within not in (0.0, 4.0)
    assert abs(within - 4.0) < 8 * mechanism.sigma_count
    assert UserMechanism(2.0, 10).central(tree, 4.0, 0.5, Randomness())[1] == 0.0


def test_the_clip_follows_the_quantile():
    mechanism = UserMechanism(0.01, clients=400, quantile=0.7, count_noise=5.0)
    norms = np.random.default_rng(0).lognormal(0, 1, 400)
    random = Randomness(bytes(32))
    clip = 0.05
    for _ in range(60):
        within = float(np.where(norms <= clip, 0.5, -0.5).sum())
        _, noisy = mechanism.central({"w": np.zeros(1)}, within, clip, random)
        clip = float(mechanism.next_clip(clip, noisy))
    assert clip == pytest.approx(np.quantile(norms, 0.7), rel=0.2)


def updates(clients: int, dims: int, clip: float):
    random = np.random.default_rng(0)
    rows = random.normal(0, 1, (clients, dims))
    return clip * rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_survivors_at_the_threshold_have_all_of_the_noise_under_masks():
    clients, least, dims, clip, z = 5, 3, 20_000, 2.0, 0.8
    mechanism = UserMechanism(z, clients=clients, quantile=0.5)
    noise = DistributedNoise(mechanism, dims, most=clients, least=least)
    federation = Federation.of(clients, noise.words, threshold=least)
    rows = updates(clients, dims, clip)
    vectors = {
        name: noise.encode({"w": row}, 0.5, clip, Randomness(bytes([at]) * 32))
        for at, (name, row) in enumerate(zip(federation.identities, rows, strict=True))
    }
    names = list(vectors)
    for gone in ([], names[:2]):
        one = Federation(
            {n: type(i)(n, i.key) for n, i in federation.identities.items()}, federation.session
        )
        total, survivors = play(one, vectors, dict.fromkeys(gone, "masked")).server.total()
        tree, within = noise.decode(total, {"w": rows[0]}, clip)
        exact = rows[len(gone) :].sum(axis=0)
        unit = mechanism.update_multiplier * clip
        expected = math.sqrt(len(survivors) / least)
        drawn = (tree["w"] - exact) / unit
        assert drawn.std() == pytest.approx(expected, rel=0.02)
        assert stats.kstest(drawn / expected, "norm").pvalue > 1e-4
        assert abs(within - 0.5 * len(survivors)) < 8 * expected * mechanism.sigma_count


def enough_noise(sigma: int, noise: DistributedNoise) -> bool:
    """Whether the fewest survivors have the noise that is accounted for, rounding included."""
    rounding = math.sqrt(noise.words) / 2
    sensitivity = noise.steps / noise.mechanism.noise_multiplier + rounding
    return sigma * math.sqrt(noise.least) >= noise.mechanism.noise_multiplier * sensitivity


def test_noise_scaled_to_the_clients_that_were_expected_is_caught():
    noise = DistributedNoise(UserMechanism(1.0, 100), 10_000, most=100, least=67)
    assert enough_noise(noise.sigma, noise)
    for_everyone = math.ceil(noise.steps / math.sqrt(noise.most))
    assert not enough_noise(for_everyone, noise)


@pytest.mark.parametrize(
    ("z", "dims", "most", "least"),
    [(1.0, 10**6, 100, 67), (0.3, 10, 2, 2), (8.0, 10**5, 1000, 501), (1.0, 100, 10**4, 5001)],
)
def test_sums_do_not_wrap_around(z, dims, most, least):
    noise = DistributedNoise(UserMechanism(z, most), dims, most, least)
    largest = noise.steps / z + 0.5
    assert most * largest + 12 * math.sqrt(most) * noise.sigma < 1 << 31
    assert enough_noise(noise.sigma, noise)
    release = noise.release()
    assert release.extra_epsilon < 0.05
    assert release.noise_multiplier == z


def test_too_many_for_32_bits_say_so():
    with pytest.raises(SpecError, match="use fewer of any"):
        DistributedNoise(UserMechanism(8.0, 10**6), 10**7, 10**6, 600_000)


def test_an_update_beyond_the_clip_is_cut_again_before_it_is_sent():
    noise = DistributedNoise(UserMechanism(1.0, 3), 4, 3, 2)
    huge = noise.encode({"w": np.full(4, 1e6)}, 0.0, 1.0, Randomness())
    tree, _ = noise.decode(huge, {"w": np.zeros(4)}, 1.0)
    assert np.abs(tree["w"]).max() < 1 + 10 / math.sqrt(2)
    with pytest.raises(SpecError, match="not finite"):
        noise.encode({"w": np.array([0, np.inf, 0, 0])}, 0.0, 1.0, Randomness())


def test_local_noise_hides_any_two_updates_from_each_other():
    update = {"w": np.full(40_000, 0.1)}  # norm 20
    out, release = local_noise(update, 1.0, 1.5, Randomness(bytes(32)))
    drawn = (out["w"] - 0.1 / 20) / (2 * 1.0 * 1.5)
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    assert release.noise_multiplier == 1.5
    assert release.sampling_rate == 1.0
