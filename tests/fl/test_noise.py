"""Samplers against their exact probabilities."""

import math

import numpy as np
import pytest
from scipy import stats

from shardpar.errors import SpecError
from shardpar.fl import noise
from shardpar.fl.noise import discrete_gaussian, discrete_laplace, grid_loss, sum_loss
from shardpar.fl.streams import Randomness

COUNT = 200_000


def fits(drawn: np.ndarray, weight, reach: int) -> float:
    """The chi-square p-value of integers against weights, tails put together."""
    at = np.arange(-reach, reach + 1)
    every = np.arange(-60 * reach, 60 * reach + 1)
    weights = np.array([weight(x) for x in at])
    chance = np.append(weights, sum(map(weight, every)) - weights.sum())
    seen = [np.count_nonzero(drawn == x) for x in at]
    seen.append(drawn.size - sum(seen))
    return float(stats.chisquare(seen, chance / chance.sum() * drawn.size).pvalue)


@pytest.mark.parametrize("sigma", [1, 2, 7])
def test_the_gaussian_has_its_probabilities(sigma):
    drawn = discrete_gaussian(sigma, COUNT, Randomness(bytes([sigma]) * 32))
    assert drawn.dtype == np.int64
    assert fits(drawn, lambda x: math.exp(-x * x / (2 * sigma**2)), 3 * sigma) > 1e-4


@pytest.mark.parametrize("scale", [1, 3])
def test_the_laplace_has_its_probabilities(scale):
    drawn = discrete_laplace(scale, COUNT, Randomness(bytes([scale]) * 32))
    assert fits(drawn, lambda x: math.exp(-abs(x) / scale), 4 * scale) > 1e-4


def test_a_test_of_fit_finds_what_does_not():
    # The slips that samplers are known for: zero twice as likely, a rounded Gaussian for a
    # discrete one, a sigma off by a hundredth.
    random = np.random.default_rng(0)
    double = discrete_gaussian(2, COUNT, Randomness(bytes(32)))
    double[: COUNT // 50] = 0
    weight = lambda x: math.exp(-x * x / 8)  # noqa: E731
    assert fits(double, weight, 6) < 1e-4
    assert fits(np.rint(random.normal(0, 2, COUNT)).astype(int), weight, 6) < 1e-4


def test_large_sigmas_are_as_wide_as_said_and_fine():
    drawn = discrete_gaussian(noise.MOST_SIGMA, 100_000, Randomness(bytes(32)))
    assert stats.kstest(drawn / noise.MOST_SIGMA, "norm").pvalue > 1e-4
    assert np.unique(drawn % 2, return_counts=True)[1].min() > 49_000
    assert np.unique(drawn).size > 99_000


def test_draws_repeat_under_a_key_alone():
    first, second = (discrete_gaussian(9, 50, Randomness(bytes(32))) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(
        discrete_gaussian(1 << 20, 9, Randomness()), discrete_gaussian(1 << 20, 9, Randomness())
    )


def test_the_bound_on_the_grids_loss_holds():
    sigma = 4
    reach = math.sqrt(2 * math.log(2 / 1e-6)) * sigma
    total = sum(math.exp(-x * x / (2 * sigma**2)) for x in range(-200, 201))
    for x in range(int(reach) + 1):
        discrete = math.exp(-x * x / (2 * sigma**2)) / total
        rounded = stats.norm.cdf((x + 0.5) / sigma) - stats.norm.cdf((x - 0.5) / sigma)
        assert abs(math.log(discrete / rounded)) <= grid_loss(sigma, 1, 1e-6) / 2
    assert grid_loss(noise.MOST_SIGMA, 10**6, 1e-12) < 1e-6


def test_the_bound_on_sums_holds():
    sigma, clients = 1, 3
    x = np.arange(-40, 41)
    one = np.exp(-(x**2) / (2 * sigma**2))
    one /= one.sum()
    total = np.convolve(np.convolve(one, one), one)
    wide = np.exp(-(np.arange(-120, 121) ** 2) / (2 * clients * sigma**2))
    wide /= wide.sum()
    near = slice(110, 131)
    ratio = np.abs(np.log(total[near] / wide[near])).max()
    assert 0 < ratio <= sum_loss(sigma, clients, 1) / 2
    assert sum_loss(100, 100, 10**6) < 1e-200


@pytest.mark.parametrize("sigma", [0, 1.5, (1 << 24) + 1])
def test_sigmas_off_the_grid_are_refused(sigma):
    with pytest.raises(SpecError, match="whole number"):
        discrete_gaussian(sigma, 1, Randomness())
