"""The data sets of scikit-learn arrive whole."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import datasets

from shardpar.errors import DataError
from shardpar.ps.data.batches import eval_batches
from shardpar.ps.data.demo import DEMOS, demo_data
from shardpar.ps.data.open import open_data, open_parts
from shardpar.ps.data.options import SparseDataOptions


def dense(batch, columns):
    found = np.zeros((len(batch), columns))
    for row in range(len(batch)):
        np.add.at(found[row], batch.ids[row], batch.values[row])
    return found


@pytest.mark.parametrize("name", DEMOS)
def test_all_samples_are_there_once(name):
    features, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    train, test = demo_data(name)
    assert len(train) + len(test) == len(labels)
    assert sorted([*train.labels, *test.labels]) == sorted(labels.astype(np.float32))
    found = np.vstack([dense(part, features.shape[1]) for part in (train, test)])
    if name == "digits":
        assert sorted(map(tuple, (found * 16).round().tolist())) == sorted(
            map(tuple, features.tolist())
        )
        assert train.slots < 64
    else:
        assert np.abs(found[: len(train)].mean(axis=0)).max() < 1e-4
        assert np.allclose(found[: len(train)].std(axis=0), 1, atol=1e-3)


def test_a_demo_is_opened_by_its_name():
    options = SparseDataOptions(format="sklearn", path="wine")
    train, test = open_parts(options)
    batches = list(eval_batches(test, options, 16))
    assert sum(int(batch.weights.sum()) for batch in batches) == len(test.batch)
    assert train.shape.slots == 13
    with pytest.raises(DataError, match="no demo data 'boston'; there are breast_cancer"):
        open_parts(SparseDataOptions(format="sklearn", path="boston"))
    with pytest.raises(DataError, match="reads no file"):
        open_data(options)
