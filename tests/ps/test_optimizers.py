"""Row rules against loops over single numbers, and against torch where it is installed."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from shardpar import ps

STEPS, DIM = 5, 3


def gradients() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(STEPS, DIM)).astype(np.float32)


def followed(rule: Any, start: np.ndarray) -> np.ndarray:
    """One row after a few steps of a rule."""
    rows = start[None, :]
    slots = tuple(np.full((1, width), first, np.float32) for width, first in rule.slots(DIM))
    for step, gradient in enumerate(gradients(), 1):
        rows, slots = rule.update(rows, slots, gradient[None, :], step, 1.0)
    return np.asarray(rows)[0]


def sgd(w: float, column: list[float]) -> float:
    for g in column:
        w -= 0.1 * g
    return w


def momentum(w: float, column: list[float]) -> float:
    v = 0.0
    for g in column:
        v = 0.9 * v + g
        w -= 0.1 * v
    return w


def nesterov(w: float, column: list[float]) -> float:
    v = 0.0
    for g in column:
        v = 0.9 * v + g
        w -= 0.1 * (g + 0.9 * v)
    return w


def adagrad(w: float, column: list[float]) -> float:
    total = 0.5
    for g in column:
        total += g * g
        w -= 0.1 * g / (math.sqrt(total) + 1e-10)
    return w


def adam(w: float, column: list[float]) -> float:
    m = v = 0.0
    for t, g in enumerate(column, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return w


def ftrl(w: float, column: list[float]) -> float:
    """Algorithm 1 of McMahan et al., 2013."""
    alpha, beta, l1, l2 = 0.1, 1.0, 0.3, 0.2
    z = n = 0.0
    for g in column:
        sigma = (math.sqrt(n + g * g) - math.sqrt(n)) / alpha
        z += g - sigma * w
        n += g * g
        shrunk = 0.0 if abs(z) <= l1 else z - math.copysign(l1, z)
        w = -shrunk / ((beta + math.sqrt(n)) / alpha + l2)
    return w


@pytest.mark.parametrize(
    ("rule", "by_hand", "start"),
    [
        (ps.SGD(0.1), sgd, 1.0),
        (ps.Momentum(0.1, 0.9), momentum, 1.0),
        (ps.Momentum(0.1, 0.9, nesterov=True), nesterov, 1.0),
        (ps.AdaGrad(0.1, initial=0.5), adagrad, 1.0),
        (ps.LazyAdam(0.1), adam, 1.0),
        (ps.FTRL(0.1, 1.0, 0.3, 0.2), ftrl, 0.0),
    ],
    ids=["sgd", "momentum", "nesterov", "adagrad", "adam", "ftrl"],
)
def test_a_rule_does_to_each_number_what_its_paper_says(
    rule: Any, by_hand: Any, start: float
) -> None:
    found = followed(rule, np.full(DIM, start, np.float32))
    expected = [by_hand(start, gradients()[:, i].tolist()) for i in range(DIM)]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_the_row_wise_rule_divides_a_whole_row_by_one_number() -> None:
    found = followed(ps.RowWiseAdaGrad(0.1), np.ones(DIM, np.float32))
    total, row = 0.0, np.ones(DIM)
    for g in gradients():
        total += float((g.astype(np.float64) ** 2).mean())
        row -= 0.1 * g / (math.sqrt(total) + 1e-10)
    np.testing.assert_allclose(found, row, rtol=1e-5)


def test_a_rate_scales_the_step() -> None:
    one = np.ones((1, DIM), np.float32)
    rows, _ = ps.SGD(0.1).update(one, (), one, 1, 0.5)
    np.testing.assert_allclose(rows, 1 - 0.05)


def test_ftrl_without_beta_leaves_rows_that_have_no_gradient_yet():
    rule = ps.FTRL(alpha=0.5, beta=0.0)
    rows, zero = jnp.array([[0.0], [0.7]]), jnp.zeros((2, 1))
    new, slots = rule.update(rows, (zero, zero), zero, 1, 1.0)
    np.testing.assert_array_equal(new, rows)
    new, _ = rule.update(new, slots, jnp.ones((2, 1)), 2, 1.0)
    # The first step is as long as alpha, whatever the gradient.
    np.testing.assert_allclose(new[0], -0.5)
