"""Factorisation: planted factors are found, and one step equals the formula of the paper."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from shardpar.errors import ConfigError, DataError
from shardpar.ps.algorithms.matrix_factorization import FactorOptions, fit
from shardpar.ps.optimizers import SGD

ONE = jax.devices()[:1]


def planted(users=120, items=80, factors=3, seed=0):
    """Ratings of rank 3 and biases, with noise of 0.1; a fifth of those known are held out."""
    random = np.random.default_rng(seed)
    u, v = random.standard_normal((users, factors)), random.standard_normal((items, factors))
    whole = 3 + random.standard_normal((users, 1)) + random.standard_normal((1, items)) + u @ v.T
    at = np.argwhere(random.random(whole.shape) < 0.5)
    ratings = whole[tuple(at.T)] + 0.1 * random.standard_normal(len(at))
    held = random.random(len(at)) < 0.2
    return (users, items), at[~held], ratings[~held], at[held], ratings[held]


def test_planted_ratings_are_predicted_almost_to_their_noise():
    shape, known, ratings, held, truth = planted()
    found = fit(FactorOptions(3, passes=30, batch=200), shape, *known.T, ratings, devices=ONE)
    spread = np.std(truth)
    assert spread > 2
    assert found.rmse(*held.T, truth) < 0.4
    assert found.losses[-1] < found.losses[0]


def test_a_pass_is_that_of_the_paper():
    """Koren's updates, all ratings in one step: from the state before it to that after it."""
    users, items, ratings = np.array([0, 0, 2]), np.array([1, 0, 1]), np.array([5.0, 1.0, 3.0])

    def learnt(passes):
        options = FactorOptions(2, passes, penalty=0.1, optimizer=SGD(0.05), batch=4)
        return fit(options, (3, 2), users, items, ratings, devices=ONE, seed=3)

    one, two = learnt(1), learnt(2)
    bu, bi = one.user_bias.copy(), one.item_bias.copy()
    p, q = one.user_factors.copy(), one.item_factors.copy()
    assert one.mean == 3.0
    for u, i, r in zip(users, items, ratings, strict=True):
        e = r - (
            3.0 + one.user_bias[u] + one.item_bias[i] + one.user_factors[u] @ one.item_factors[i]
        )
        bu[u] += 0.05 * (e - 0.1 * one.user_bias[u])
        bi[i] += 0.05 * (e - 0.1 * one.item_bias[i])
        p[u] += 0.05 * (e * one.item_factors[i] - 0.1 * one.user_factors[u])
        q[i] += 0.05 * (e * one.user_factors[u] - 0.1 * one.item_factors[i])
    for got, want in [
        (two.user_bias, bu), (two.item_bias, bi), (two.user_factors, p), (two.item_factors, q),
    ]:  # fmt: skip
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert two.losses[0] == pytest.approx(np.mean((ratings - 3.0) ** 2), rel=0.05)


@pytest.mark.parametrize(
    ("ratings", "says"),
    [
        (([0, 3], [0, 1], [1.0, 2.0]), "id 3"),
        (([0, 1], [0, -1], [1.0, 2.0]), "id -1"),
        (([0, 1], [0, 1], [1.0, np.nan]), "rating 1 is nan"),
        (([0], [0, 1], [1.0, 2.0]), "one of each per rating"),
        (([], [], []), "at least one"),
    ],
)
def test_ratings_that_are_none_are_refused(ratings, says):
    with pytest.raises(DataError, match=says):
        fit(FactorOptions(2), (3, 2), *ratings, devices=ONE)


def test_options_are_checked():
    with pytest.raises(ConfigError, match="factors"):
        FactorOptions(0)
