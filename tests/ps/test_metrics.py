"""Metrics are those of scikit-learn, and a NaN is never averaged away."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from shardpar.errors import DataError, RunError
from shardpar.ps.metrics import Evaluation, accuracy, auc, expected_auc, log_loss

SAMPLES = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 1.0]), st.integers(0, 3)),
    min_size=1, max_size=40,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(SAMPLES)
def test_metrics_are_those_of_scikit_learn(samples):
    labels, chances, weights = (np.array(part, float) for part in zip(*samples, strict=True))
    kept = weights > 0
    if not kept.any():
        assert math.isnan(auc(labels, chances, weights))
        return
    of_kept = {"sample_weight": weights[kept]}
    assert accuracy(labels, chances, weights) == pytest.approx(
        oracle.accuracy_score(labels[kept], chances[kept] > 0.5, **of_kept)
    )
    clipped = np.clip(chances, 1e-7, 1 - 1e-7)
    assert log_loss(labels, clipped, weights) == pytest.approx(
        oracle.log_loss(labels[kept], clipped[kept], labels=[0, 1], **of_kept), rel=1e-9
    )
    if len(set(labels[kept])) == 2:
        expected = oracle.roc_auc_score(labels[kept], chances[kept], **of_kept)
        assert auc(labels, chances, weights) == pytest.approx(expected)
    else:
        assert math.isnan(auc(labels, chances, weights))


def drawn(count=20_000):
    rng = np.random.default_rng(0)
    chances = rng.beta(1, 3, count)
    return (rng.random(count) < chances).astype(np.float32), chances.astype(np.float32)


def test_batches_add_up_to_the_whole():
    labels, chances = drawn()
    evaluation, other = Evaluation(), Evaluation()
    for start in range(0, labels.size, 512):
        part = slice(start, start + 512)
        pad = np.zeros(3, np.float32)
        (evaluation if start % 1024 else other).add(
            np.concatenate((labels[part], pad)), np.concatenate((chances[part], pad)),
            np.concatenate((np.ones_like(labels[part]), pad)),
        )  # fmt: skip
    result = evaluation.merge(other).result()
    assert result.auc == pytest.approx(oracle.roc_auc_score(labels, chances), abs=1e-12)
    assert result.logloss == pytest.approx(oracle.log_loss(labels, chances.astype(float)), rel=1e-6)
    assert result.accuracy == pytest.approx(((chances > 0.5) == (labels > 0)).mean())
    assert result.samples == labels.size
    assert result.positive_share == pytest.approx(labels.mean())


@pytest.mark.parametrize("buckets", [10, 1000])
def test_bucketed_auc_is_within_its_own_bound(buckets):
    labels, chances = drawn()
    evaluation = Evaluation(buckets)
    evaluation.add(labels[:9000], chances[:9000])
    evaluation.add(labels[9000:], chances[9000:])
    difference = abs(evaluation.result().auc - oracle.roc_auc_score(labels, chances))
    assert 0 < difference <= evaluation.auc_error < 1.5 / buckets


def test_expected_auc_is_the_mean_over_all_labels():
    chances = np.array([0.1, 0.4, 0.4, 0.85])
    area = weight = 0.0
    for pattern in range(16):
        labels = np.array([pattern >> bit & 1 for bit in range(4)])
        likely = np.where(labels, chances, 1 - chances).prod()
        pairs = labels.sum() * (1 - labels).sum()
        if pairs:
            area += likely * pairs * oracle.roc_auc_score(labels, chances)
            weight += likely * pairs
    assert expected_auc(chances) == pytest.approx(area / weight)


def test_predictions_that_are_no_probabilities_are_refused():
    labels = np.array([0.0, 1.0, 1.0])
    for metric in (auc, log_loss, accuracy, lambda y, p: Evaluation().add(y, p)):
        with pytest.raises(RunError, match="1 of 3 predictions are NaN, the first for sample 1"):
            metric(labels, np.array([0.1, np.nan, 0.2]))
    for metric in (log_loss, lambda y, p: Evaluation().add(y, p)):
        with pytest.raises(RunError, match="put the scores through a sigmoid"):
            metric(labels, np.array([0.1, 0.2, 1.5]))
    with pytest.raises(ValueError, match="one shape"):
        auc(labels, np.zeros(2))
    with pytest.raises(DataError, match="no sample to evaluate"):
        Evaluation().result()
    with pytest.raises(ValueError, match="cannot be merged"):
        Evaluation(10).merge(Evaluation())


def test_a_nan_in_a_row_that_does_not_count_is_no_matter():
    labels, chances = np.array([0.0, 1.0, 0.0]), np.array([0.1, 0.9, np.nan])
    assert auc(labels, chances, np.array([1.0, 1.0, 0.0])) == 1
