"""Regression on shares beside the same integers in the clear."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from shardpar.errors import DataError, PartyError, RunError
from shardpar.fl.vertical.linear import batches_of
from shardpar.fl.vertical.linear_model import LinearHalf, fit, predict
from shardpar.fl.vertical.options import KeyOptions, LinearOptions
from shardpar.fl.vertical.ring import MODULUS, signed
from tests.fl.vertical.parties import SHORT, together


def trained(x, y, split, options, keys=SHORT, epochs=None):
    return together(
        lambda end: fit(
            end,
            "guest",
            x[:, :split],
            y,
            options,
            keys,
            on_epoch=[].append if epochs is None else epochs.append,
        ),
        lambda end: fit(end, "host", x[:, split:], None, options, keys),
    )


def weights_of(guest, host):
    """The weights that nobody sees, as integers, the intercept first."""
    own = signed((guest.weights.own + host.weights.other) % MODULUS)
    return own + signed((guest.weights.other + host.weights.own) % MODULUS)


def in_the_clear(x, y, options, epochs):
    """The same fixed point with Python's integers, in one place; floor where shares shorten."""
    f, b = options.feature_bits, options.weight_bits
    scaled = (x - x.mean(0)) / x.std(0)
    columns = np.rint(np.clip(scaled, -8, 8) * 2**f).astype(int)
    if options.intercept:
        columns = np.hstack([np.full((len(x), 1), 1 << f), columns])
    rows_of = [[int(v) for v in row] for row in columns]
    gain = 4 if (options.kind, options.sigmoid) == ("logistic", "linear") else 1
    w, change, moved = [0] * columns.shape[1], [0] * columns.shape[1], []
    for epoch in range(epochs):
        before = list(w)
        for rows in batches_of(len(x), options, epoch):
            gradient = [0] * len(w)
            for row in rows:
                values = rows_of[row]
                z = sum(v * each for v, each in zip(values, w, strict=True)) // 2**f
                e = z
                if options.sigmoid == "cubic":
                    cube = (z // 2 ** (b - 20)) ** 3 // 2 ** (60 - b)
                    one, three = round(0.197 * 2**16), round(-0.004 * 2**16)
                    e = (one * z + three * cube) // 2**16
                if options.kind == "logistic":
                    e += gain * 2 ** (b - 1)
                e -= gain * round(float(y[row]) * 2**b)
                gradient = [g + v * e for g, v in zip(gradient, values, strict=True)]
            rate = round(options.learning_rate / (len(rows) * gain) * 2**32)
            decay = round(options.learning_rate * options.l2 * 2**32)
            for j, g in enumerate(gradient):
                shrink = 0 if options.intercept and j == 0 else decay * w[j]
                last = round(options.momentum * 2**32) * change[j]
                change[j] = (rate * (g // 2**f) + shrink + last) // 2**32
            w = [each - c for each, c in zip(w, change, strict=True)]
        moved.append(sum((p - q) ** 2 for p, q in zip(w, before, strict=True)) ** 0.5 / 2**b)
    return w, moved


CASES = {
    "logistic": LinearOptions(epochs=2, batch=40, momentum=0.5, l2=0.1, tolerance=1e-9),
    "no intercept": LinearOptions(epochs=1, batch=64, intercept=False, tolerance=0, seed=3),
    "cubic": LinearOptions(epochs=2, batch=50, sigmoid="cubic", learning_rate=0.1),
    "linear": LinearOptions(kind="linear", epochs=2, batch=32, learning_rate=0.1),
    "few bits": LinearOptions(epochs=2, batch=64, feature_bits=6, weight_bits=18, mask_bits=40),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_same_integers_in_the_clear(name):
    options = CASES[name]
    random = np.random.default_rng(5)
    x = random.normal(size=(100, 5)) * 3 + 1
    y = x @ [1, -1, 0.5, 0, 2] + random.normal(size=100)
    y = (y > y.mean()).astype(float) if options.kind == "logistic" else y / 4
    epochs = []
    guest, host = trained(x, y, 2, options, epochs=epochs)
    expected, moved = in_the_clear(x, y, options, options.epochs)
    steps = options.epochs * -(-100 // options.batch)
    # A step shortens z, g and the change, each off by a unit at most, and |x| averages below 1.
    assert np.abs(np.array(weights_of(guest, host)) - expected).max() <= 3 * steps
    assert len(set(expected)) == len(expected)
    for epoch, far in zip(epochs, moved, strict=True):
        if options.tolerance:
            assert epoch.moved == pytest.approx(far, abs=2.0 ** (8 - options.weight_bits))
        else:
            assert epoch.moved is None


def test_breast_cancer_is_told_as_well_as_pooled(tmp_path):
    x, y = load_breast_cancer(return_X_y=True)
    options = LinearOptions(epochs=3, batch=128, learning_rate=0.5)
    for half, name in zip(trained(x, y, 10, options), ("guest", "host"), strict=True):
        half.save(tmp_path / name)
    kept = [LinearHalf.load(tmp_path / name) for name in ("guest", "host")]
    told, nothing = together(
        lambda end: predict(end, kept[0], x[:, :10], SHORT),
        lambda end: predict(end, kept[1], x[:, 10:], SHORT),
    )
    assert nothing is None
    scaled = (x - x.mean(0)) / x.std(0)
    pooled = LogisticRegression(max_iter=500).fit(scaled, y).predict_proba(scaled)[:, 1]
    # After three epochs; docs/howto/vertical.md trains to the end.
    assert roc_auc_score(y, told) > roc_auc_score(y, pooled) - 0.01
    # The prediction is that of the hidden weights.
    expected, _ = in_the_clear(x, y, options, 3)
    z = (
        np.hstack([np.ones((len(x), 1)), np.clip(scaled, -8, 8)])
        @ np.array(expected, float)
        / 2**32
    )
    np.testing.assert_allclose(told, 1 / (1 + np.exp(-z)), atol=2e-3)


def test_linear_regression_finds_least_squares():
    x, y = load_diabetes(return_X_y=True)
    x, y = x[:200, :4], (y[:200] - y[:200].mean()) / y[:200].std()
    options = LinearOptions(kind="linear", epochs=12, batch=200, learning_rate=0.6, l2=0)
    guest, host = trained(x, y, 2, options)
    scaled = (x - x.mean(0)) / x.std(0)
    best, *_ = np.linalg.lstsq(np.hstack([np.ones((200, 1)), scaled]), y)
    assert np.abs(np.array(weights_of(guest, host)) / 2**32 - best).max() < 0.01


def test_training_ends_when_the_weights_rest():
    x = np.random.default_rng(0).normal(size=(40, 3))
    epochs = []
    options = LinearOptions(kind="linear", epochs=50, batch=40, learning_rate=0.9, tolerance=0.01)
    trained(x, x @ [1.0, 2, 3], 1, options, epochs=epochs)
    assert 2 <= len(epochs) < 30
    assert epochs[-1].moved <= 0.01 < epochs[-2].moved


def test_weights_that_run_away_are_noticed():
    x = np.random.default_rng(0).normal(size=(20, 3))
    options = LinearOptions(kind="linear", epochs=9, batch=5, learning_rate=60.0)
    with pytest.raises(RunError, match="lower learning_rate"):
        trained(x, x @ [1.0, 2, 3], 1, options)


def test_okamoto_uchiyama_comes_to_the_same_weights():
    x = np.random.default_rng(0).normal(size=(30, 4))
    y = (x.sum(1) > 0).astype(float)
    options = LinearOptions(epochs=1, batch=30)
    keys = KeyOptions("okamoto_uchiyama", 1024, processes=1, unsafe_small_keys_for_tests=True)
    expected, _ = in_the_clear(x, y, options, 1)
    found = weights_of(*trained(x, y, 2, options, keys))
    assert max(abs(Fraction(a - b)) for a, b in zip(found, expected, strict=True)) <= 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": LinearOptions(l2=0.5)}, "other options"),
        ({"rows": 19}, "19 rows"),
        ({"ids": [str(i) for i in range(1, 21)]}, "another order"),
        ({"role": "guest"}, "guest too"),
    ],
)
def test_parties_that_do_not_fit_do_not_train(change, words):
    x, y = np.ones((20, 2)), np.zeros(20)
    rows, role = change.get("rows", 20), change.get("role", "host")
    ids = [str(i) for i in range(20)]

    def host(end):
        labels = y if role == "guest" else None
        return fit(
            end, role, x[:rows], labels, change.get("options", LinearOptions()), SHORT,
            row_ids=change.get("ids", ids)[:rows] if "rows" not in change else ids[:rows],
        )  # fmt: skip

    with pytest.raises(PartyError, match=words):
        together(lambda end: fit(end, "guest", x, y, LinearOptions(), SHORT, row_ids=ids), host)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ([[1.0], [np.nan]], [0, 1], "no finite number in row 1"),
        ([[1.0], [2.0]], [0, 2], "are 0 and 1"),
        ([[1.0], [2.0]], [0], "shaped"),
        ([[1.0], [2.0]], None, "give them"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(x, y, words):
    labels = None if y is None else np.array(y)
    with pytest.raises(DataError, match=words):
        fit(None, "guest", np.array(x), labels, LinearOptions(), SHORT)
