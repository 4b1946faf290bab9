"""Trees: parts and sparse slots give what LightGBM gives on the whole matrix."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import sparse

from shardpar.errors import ConfigError, DataError
from shardpar.ps.algorithms.trees import TreeOptions, csr_of_slots, fit

lightgbm = pytest.importorskip("lightgbm")
metrics = pytest.importorskip("sklearn.metrics")

RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.standard_normal((800, 6)) * (RANDOM.random((800, 6)) < 0.7)
LABELS = (FEATURES[:, 0] + FEATURES[:, 1] + 0.3 * RANDOM.standard_normal(800) > 0).astype(float)
OPTIONS = TreeOptions(trees=30, leaves=8, threads=1)


def parts(of, size=170):
    cuts = range(size, len(of[0]), size)
    return list(zip(*(np.split(array, cuts) for array in of), strict=True))


def test_parts_give_the_trees_of_the_whole():
    found = fit(OPTIONS, parts((FEATURES[:600], LABELS[:600])))
    want = lightgbm.LGBMClassifier(
        n_estimators=30, num_leaves=8, n_jobs=1, verbosity=-1, deterministic=True,
        force_row_wise=True,
    ).fit(sparse.csr_matrix(FEATURES[:600], dtype=np.float32), LABELS[:600])  # fmt: skip
    guess = found.predict(FEATURES[600:])
    np.testing.assert_allclose(guess, want.predict_proba(FEATURES[600:])[:, 1], atol=1e-6)
    assert metrics.roc_auc_score(LABELS[600:], guess) > 0.85
    assert found.importance()[:2].sum() > 0.8 * found.importance().sum()


def test_samples_of_weight_zero_do_not_count():
    weights = np.ones(600)
    weights[::3] = 0
    kept = weights > 0
    want = fit(OPTIONS, [(FEATURES[:600][kept], LABELS[:600][kept])])
    spoiled = np.where(kept, LABELS[:600], 7.0)
    found = fit(OPTIONS, parts((FEATURES[:600], spoiled, weights)))
    np.testing.assert_allclose(found.predict(FEATURES), want.predict(FEATURES))


def test_growing_ends_when_the_evaluation_gets_no_better():
    options = TreeOptions(trees=400, learning_rate=0.5, patience=5, threads=1)
    data, held = (FEATURES[:500], LABELS[:500]), (FEATURES[500:], LABELS[500:])
    found = fit(options, [data], [held])
    assert len(found.losses) < 400
    loss = metrics.log_loss(held[1], found.predict(held[0]))
    assert loss == pytest.approx(min(found.losses), rel=1e-6)


def test_classes_and_values():
    three = fit(TreeOptions("multiclass", 5, threads=1), [(FEATURES, np.arange(800) % 3)])
    assert three.predict(FEATURES).shape == (800, 3)
    values = fit(TreeOptions("regression", 60, threads=1), [(FEATURES, 10 * FEATURES[:, 2])])
    assert np.corrcoef(values.predict(FEATURES), FEATURES[:, 2])[0, 1] > 0.98


def test_slots_become_columns():
    ids, values = (
        RANDOM.integers(0, 9, (50, 4)),
        RANDOM.random((50, 4)) * (RANDOM.random((50, 4)) < 0.6),
    )
    want = np.zeros((50, 9))
    for row in range(50):
        for slot in range(4):
            want[row, ids[row, slot]] += values[row, slot]
    np.testing.assert_allclose(csr_of_slots(ids, values, 9).toarray(), want)
    with pytest.raises(DataError, match="a matrix of 3 columns"):
        csr_of_slots(ids, values, 3)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "the data has no samples"),
        ([(FEATURES, LABELS + 1)], "labels are 1 to 2"),
        ([(FEATURES, LABELS[:-1])], "part 0 of the data has 800 samples, 799 labels"),
        ([(np.full((4, 2), np.nan), np.zeros(4))], "a feature is not finite"),
    ],
)
def test_data_that_is_none_is_refused(data, says):
    with pytest.raises(DataError, match=says):
        fit(OPTIONS, data)


def test_wider_features_than_were_learnt_are_refused():
    with pytest.raises(DataError, match="7 features, but the model knows 6"):
        fit(TreeOptions(trees=1, threads=1), [(FEATURES, LABELS)]).predict(np.zeros((1, 7)))


def test_options_are_checked():
    with pytest.raises(ConfigError, match="'ranking'"):
        TreeOptions("ranking")
    with pytest.raises(ConfigError, match="patience"):
        fit(TreeOptions(patience=3), [(FEATURES, LABELS)])


def test_without_lightgbm_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ConfigError, match="shardpar\\[trees\\]"):
        fit(OPTIONS, [(FEATURES, LABELS)])
