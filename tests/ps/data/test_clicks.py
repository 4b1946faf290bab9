"""The generated click log is the same everywhere, and its best AUC is known."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from shardpar.ps.data.batches import train_batches
from shardpar.ps.data.clicks import EVAL_FROM, FIELDS, ROWS, ClickLog
from shardpar.ps.data.memory import ClickSource
from shardpar.ps.data.open import open_parts
from shardpar.ps.data.options import SparseDataOptions
from shardpar.ps.metrics import auc, expected_auc

LOG = ClickLog(samples=20_000)


def test_every_machine_gets_these_samples():
    batch = LOG.batch(0, 2000)
    digest = hashlib.blake2b(batch.ids.astype("<i8").tobytes(), digest_size=8)
    digest.update(batch.labels.astype("<f4").tobytes())
    assert digest.hexdigest() == "0be720e134d0eb65"


def test_a_sample_does_not_depend_on_the_part_it_is_made_in():
    whole = LOG.batch(0, 300)
    parts = [LOG.batch(start, start + 75) for start in range(0, 300, 75)]
    assert np.concatenate([part.ids for part in parts]).tolist() == whole.ids.tolist()
    assert np.concatenate([part.labels for part in parts]).tolist() == whole.labels.tolist()
    picked = LOG.of_samples(np.array([299, 5]))
    assert picked.ids.tolist() == whole.ids[[299, 5]].tolist()


def test_seeds_and_parts_differ():
    first = LOG.batch(0, 100).ids
    assert (ClickLog(samples=100, seed=1).batch(0, 100).ids != first).any()
    later = ClickLog(samples=100, first=EVAL_FROM).batch(0, 100)
    assert (later.ids != first).any(axis=1).all()


def test_ids_are_as_uneven_as_zipf_says():
    ids = LOG.batch(0, 4096).ids
    assert 0 <= ids.min() < ids.max() < ROWS
    counts = np.sort(np.unique(ids, return_counts=True)[1])[::-1]
    assert 25_000 < counts.size < 35_000
    # Over a decade of ranks, ten times the rank has about a tenth of the count.
    rank = np.arange(1, counts.size + 1)
    slope = np.polyfit(np.log(rank[100:3000]), np.log(counts[100:3000]), 1)[0]
    assert -1.3 < slope < -0.7


def test_labels_follow_the_probabilities():
    labels, chances = LOG.batch(0, 20_000).labels, LOG.probabilities(0, 20_000)
    edges = np.quantile(chances, np.linspace(0, 1, 6))
    for low, high in itertools.pairwise(edges):
        inside = (chances >= low) & (chances <= high)
        spread = np.sqrt((chances * (1 - chances))[inside].sum()) / inside.sum()
        assert abs(labels[inside].mean() - chances[inside].mean()) < 4 * spread
    assert auc(labels, chances) == pytest.approx(expected_auc(chances), abs=0.01)
    assert expected_auc(chances) == pytest.approx(0.859, abs=0.005)


def test_log_odds_are_weights_and_pairs_of_factors():
    log = ClickLog(samples=3)
    chances, ids = log.probabilities(0, 3), log.batch(0, 3).ids
    paired = log.paired_fields
    for row in range(3):
        score = sum(int(log._weights[i]) for i in ids[row])
        for factor, means in zip(log._factors, log._means, strict=True):
            vector = [int(factor[ids[row, f]]) - int(m) for f, m in zip(paired, means, strict=True)]
            score += sum(a * b for n, a in enumerate(vector) for b in vector[:n])
        assert chances[row] == pytest.approx(1 / (1 + np.exp(-(log.bias + score / 2**16))))


def test_pairs_have_no_linear_part():
    # Averaged over all else, no frequent id of a paired field moves the sum over pairs much.
    log = ClickLog(samples=20_000, linear=0.0)
    chances, ids = log.probabilities(0, 20_000), log.batch(0, 20_000).ids
    odds = np.log(chances / (1 - chances)) - log.bias
    for field in log.paired_fields[:5]:
        values, counts = np.unique(ids[:, field], return_counts=True)
        for value in values[counts > 1000]:
            assert abs(odds[ids[:, field] == value].mean()) < 0.2 * odds.std()


def test_the_options_make_a_log_for_training_and_one_for_evaluation():
    options = SparseDataOptions(format="clicks", samples=300, eval_samples=50, shuffle=100)
    train, test = open_parts(options)
    assert isinstance(train, ClickSource)
    batches = list(train_batches(train, options, 64, epochs=1))
    assert sum(int(batch.weights.sum()) for batch in batches) == 300
    assert batches[0].ids.shape == (64, FIELDS)
    assert test.log.first == EVAL_FROM
    assert open_parts(SparseDataOptions(format="clicks", eval_samples=0))[1] is None
