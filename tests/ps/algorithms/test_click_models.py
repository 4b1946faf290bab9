"""Scores of the click models against loops over features; what they learn against sklearn."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.optimize import minimize
from scipy.special import huber

from shardpar import ps
from shardpar.ps.algorithms import dcn, deepfm, ffm, fm, linear, softmax, wide_deep
from shardpar.ps.rules import with_rule

ROWS, FIELDS, BATCH = 23, 4, 6
SIZES = {"rows": ROWS, "fields": FIELDS, "dense": 2, "factors": 3, "hidden": (5, 4)}


def batch() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    ids = draw.integers(0, ROWS, (BATCH, FIELDS)).astype(np.int32)
    ids[1, 2] = -1
    return {
        "ids": ids,
        "values": draw.uniform(0.5, 2, (BATCH, FIELDS)).astype(np.float32),
        "fields": np.tile(np.arange(FIELDS, dtype=np.int32), (BATCH, 1)),
        "dense": draw.normal(size=(BATCH, 2)).astype(np.float32),
        "labels": (np.arange(BATCH) % 2).astype(np.float32),
        "weights": np.ones(BATCH, np.float32),
    }


def shaken(model: Any) -> Any:
    """The model with every parameter and row away from 0, so that no term can hide."""
    draw = np.random.default_rng(1)
    graph, state = nnx.split(model)

    def other(x: Any) -> Any:
        if not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
            return x
        return jax.numpy.asarray(draw.normal(0, 0.5, x.shape).astype(np.float32))

    return nnx.merge(graph, jax.tree.map(other, state))


def features(model: Any, sample: int) -> list[tuple[int, np.ndarray]]:
    """(field, row times value) of each feature that a sample has."""
    rows, given = np.asarray(model.features.rows[...], np.float64), batch()
    return [
        (field, rows[given["ids"][sample, field]] * given["values"][sample, field])
        for field in range(FIELDS)
        if given["ids"][sample, field] >= 0
    ]


def pairs(model: Any, sample: int) -> float:
    return sum(
        float(one[1:] @ other[1:])
        for (_, one), (_, other) in itertools.combinations(features(model, sample), 2)
    )


def weights(model: Any, sample: int) -> float:
    return sum(float(row[0]) for _, row in features(model, sample))


def layer(x: np.ndarray, linear_: Any) -> np.ndarray:
    bias = 0 if linear_.bias is None else np.asarray(linear_.bias[...], np.float64)
    return x @ np.asarray(linear_.kernel[...], np.float64) + bias


def network(net: Any, x: np.ndarray) -> float:
    for one in net.layers:
        x = np.maximum(layer(x, one), 0)
    return float(layer(x, net.out)[0])


def flat(model: Any, sample: int, first: int) -> np.ndarray:
    """What the network sees: each field's factors, zeros for none, and the dense features."""
    width = model.features.table.dim - first
    found = dict(features(model, sample))
    parts = [found[f][first:] if f in found else np.zeros(width) for f in range(FIELDS)]
    return np.concatenate([*parts, batch()["dense"][sample]])


def test_a_factorisation_machine_adds_up_all_pairs() -> None:
    model = shaken(fm.build(fm.FMOptions(rows=ROWS, factors=3), nnx.Rngs(0)))
    bias = float(model.bias[...])
    want = [bias + weights(model, s) + pairs(model, s) for s in range(BATCH)]
    np.testing.assert_allclose(model(batch()), want, rtol=1e-4)


def test_a_field_aware_one_takes_the_factors_towards_the_others_field() -> None:
    options = ffm.FFMOptions(rows=ROWS, fields=FIELDS, factors=3)
    model = shaken(ffm.build(options, nnx.Rngs(0)))
    want = []
    for sample in range(BATCH):
        total = float(model.bias[...]) + weights(model, sample)
        for (a, one), (b, other) in itertools.combinations(features(model, sample), 2):
            total += one[1:].reshape(FIELDS, 3)[b] @ other[1:].reshape(FIELDS, 3)[a]
        want.append(total)
    np.testing.assert_allclose(model(batch()), want, rtol=1e-4)


@pytest.mark.parametrize("file", [deepfm, wide_deep], ids=["deepfm", "wide_deep"])
def test_deep_models_add_their_networks_score(file: Any) -> None:
    options = deepfm.DeepFMOptions if file is deepfm else wide_deep.WideDeepOptions
    model = shaken(file.build(options(**SIZES), nnx.Rngs(0)))
    want = []
    for sample in range(BATCH):
        deep = float(model.bias[...]) + network(model.network, flat(model, sample, 1))
        wide = weights(model, sample)
        want.append(deep + wide + (pairs(model, sample) if file is deepfm else 0))
    np.testing.assert_allclose(model(batch()), want, rtol=1e-4)


def test_cross_layers_multiply_the_first_input_in_again() -> None:
    model = shaken(dcn.build(dcn.DCNOptions(**SIZES, crosses=2, rank=2), nnx.Rngs(0)))
    want = []
    for sample in range(BATCH):
        first = crossed = flat(model, sample, 0)
        for cross in model.crosses:
            low, high = cross.layers
            crossed = first * layer(layer(crossed, low), high) + crossed
        want.append(float(layer(crossed, model.out)[0]) + network(model.network, first))
    np.testing.assert_allclose(model(batch()), want, rtol=1e-4)


def learned(file: Any, options: Any, given: dict[str, np.ndarray], rate: float = 1.0) -> Any:
    program, state = after_steps(file, options, given, rate, 400)
    return np.asarray(program.apply(state, given, file.predict))


def after_steps(
    file: Any, options: Any, given: dict[str, np.ndarray], rate: float, steps: int
) -> Any:
    program = ps.SparseProgram(
        file.loss,
        lambda rngs: with_rule(file.build(options, rngs), ps.SGD(rate)),
        optax.sgd(rate),
        batch=given,
        devices=jax.devices()[:1],
    )
    state = program.init(0)
    for _ in range(steps):
        state, _ = program.step(state, given)
    return program, state


def samples(classes: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Samples of one-hot fields, and the same as a matrix of features."""
    draw = np.random.default_rng(2)
    ids = draw.integers(0, 4, (120, 3)) + np.array([0, 4, 8])
    labels = (ids[:, 0] + draw.integers(0, 3, 120)) % classes
    matrix = np.zeros((120, 12))
    np.put_along_axis(matrix, ids, 1, axis=1)
    return {
        "ids": ids.astype(np.int32),
        "values": np.ones(ids.shape, np.float32),
        "labels": labels.astype(np.float32),
        "weights": np.ones(120, np.float32),
    }, matrix


@pytest.mark.parametrize(("file", "classes"), [(linear, 2), (softmax, 3)], ids=["two", "three"])
def test_probabilities_become_those_of_scikit_learns_logistic_regression(
    file: Any, classes: int
) -> None:
    regression = pytest.importorskip("sklearn.linear_model")
    given, matrix = samples(classes)
    options = (
        linear.LinearOptions(rows=12) if file is linear else softmax.SoftmaxOptions(12, classes)
    )
    found = learned(file, options, given)
    model = regression.LogisticRegression(C=np.inf, tol=1e-8, max_iter=2000)
    want = model.fit(matrix, given["labels"]).predict_proba(matrix)
    np.testing.assert_allclose(found, want[:, 1] if classes == 2 else want, atol=2e-3)


def test_hinge_loss_finds_the_support_vector_machine_of_scikit_learn() -> None:
    svm = pytest.importorskip("sklearn.svm")
    given, matrix = samples(2)
    l2 = 0.05
    options = linear.LinearOptions(rows=12, loss="hinge", l2=l2)
    program, state = after_steps(linear, options, given, 0.05, 2000)
    found = np.asarray(program.apply(state, given, linear.predict))
    (name,) = program.tables
    weights = program.tables[name].whole(state.tables[name])[0][:, 0]
    # Each sample pulls at its own features: in columns scaled by how frequent they are, evenly.
    scale = np.sqrt(matrix.sum(0))
    signs = np.where(given["labels"] > 0, 1.0, -1.0)
    model = svm.SVC(kernel="linear", C=1 / l2, tol=1e-5).fit(matrix / scale, signs)

    def cost(scores: np.ndarray, scaled: np.ndarray) -> float:
        return np.maximum(0, 1 - signs * scores).sum() + 0.5 * l2 * (scaled**2).sum()

    best = cost(model.decision_function(matrix / scale), model.coef_)
    assert best <= cost(found, weights * scale) < best * 1.01
    assert cost(0 * found, 0 * weights) > best * 1.5


def test_huber_loss_finds_its_minimum_beside_outliers() -> None:
    given, matrix = samples(2)
    given["labels"][:10] += 30
    options = linear.LinearOptions(rows=12, loss="huber", huber_delta=0.7)
    found = learned(linear, options, given)
    with_one = np.concatenate([matrix, np.ones((120, 1))], axis=1)

    def cost(weights: np.ndarray) -> float:
        return huber(0.7, with_one @ weights - given["labels"]).sum()

    best = minimize(cost, np.zeros(13), options={"gtol": 1e-9}).x
    assert cost(np.linalg.lstsq(with_one, found, rcond=None)[0]) < cost(best) * 1.0001
    least = with_one @ np.linalg.lstsq(with_one, given["labels"], rcond=None)[0]
    assert np.abs(found[10:] - given["labels"][10:]).mean() < 0.5
    assert np.abs(least[10:] - given["labels"][10:]).mean() > 1


def test_ftrl_on_a_factorisation_machine_is_that_of_each_coordinate() -> None:
    """FTRL-proximal in NumPy, over gradients that loops over pairs of features give."""
    given = samples(2)[0]
    alpha, beta, l1, l2, steps = 0.3, 0.01, 0.001, 0.1, 6
    program = ps.SparseProgram(
        fm.loss,
        lambda rngs: with_rule(
            fm.build(fm.FMOptions(rows=12, factors=2, init_std=0.5), rngs),
            ps.FTRL(alpha, beta, l1, l2),
        ),
        optax.sgd(0.0),
        batch=given,
        devices=jax.devices()[:1],
    )
    state = program.init(0)
    rows = np.asarray(program.tables["features"].whole(state.tables["features"])[0], np.float64)
    z = np.where(rows == 0, 0, -(beta / alpha + l2) * rows - l1 * np.sign(rows))
    n = np.zeros_like(rows)
    for _ in range(steps):
        gradient = np.zeros_like(rows)
        for ids, label in zip(given["ids"], given["labels"], strict=True):
            score = sum(rows[i, 0] for i in ids)
            score += sum(rows[i, 1:] @ rows[j, 1:] for i, j in itertools.combinations(ids, 2))
            slope = (1 / (1 + np.exp(-score)) - label) / len(given["ids"])
            for i in ids:
                gradient[i, 0] += slope
                gradient[i, 1:] += slope * sum(rows[j, 1:] for j in ids if j != i)
        sigma = (np.sqrt(n + gradient**2) - np.sqrt(n)) / alpha
        z += gradient - sigma * rows
        n += gradient**2
        kept = np.sign(z) * np.maximum(np.abs(z) - l1, 0)
        rows = -kept / ((beta + np.sqrt(n)) / alpha + l2)
        state, _ = program.step(state, given)
    found = program.tables["features"].whole(state.tables["features"])[0]
    assert np.abs(rows[:, 1:]).min() > 0
    np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-6)


def test_squared_loss_finds_the_least_squares() -> None:
    given, matrix = samples(2)
    found = learned(linear, linear.LinearOptions(rows=12, loss="squared"), given, rate=0.3)
    with_one = np.concatenate([matrix, np.ones((120, 1))], axis=1)
    best = with_one @ np.linalg.lstsq(with_one, given["labels"], rcond=None)[0]
    np.testing.assert_allclose(found, best, atol=2e-3)
