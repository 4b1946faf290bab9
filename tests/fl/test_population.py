"""Whose examples are whose, from a config; and how a model is evaluated on what is held out."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, log_loss

from shardpar.config.model_source import load_model_source
from shardpar.errors import DataError
from shardpar.fl.clients import write_clients
from shardpar.fl.evaluation import Evaluation
from shardpar.fl.options import FederatedDataOptions
from shardpar.fl.population import population
from shardpar.fl.task import Task
from tests.docs.tables import ROOT

MLP = load_model_source(ROOT / "models" / "mlp.py")


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards"])
def test_every_digit_is_a_client_s_or_held_out(partition):
    found = population(FederatedDataOptions(clients=9, partition=partition, held_share=0.3))
    rows = np.concatenate([found.data.fields["inputs"], found.held["inputs"]])
    digits = load_digits()
    assert len(found.held["labels"]) == round(0.3 * len(digits.target))
    pixels = (digits.data / 16).astype(np.float32)
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], pixels[np.lexsort(pixels.T)])
    labels = np.concatenate([found.data.fields["labels"], found.held["labels"]])
    assert np.bincount(labels).tolist() == np.bincount(digits.target).tolist()
    again = population(FederatedDataOptions(clients=9, partition=partition, held_share=0.3))
    np.testing.assert_array_equal(again.data.offsets, found.data.offsets)
    np.testing.assert_array_equal(again.data.fields["inputs"], found.data.fields["inputs"])
    other = population(FederatedDataOptions(clients=9, partition=partition, seed=1))
    assert not np.array_equal(other.data.fields["labels"][:20], found.data.fields["labels"][:20])


def test_nothing_need_be_held_out():
    assert population(FederatedDataOptions(held_share=0.0)).held is None


def test_folders_of_clients_are_taken_as_they_are(tmp_path):
    clients = [{"x": np.full((n, 2), n, np.float32)} for n in (2, 1)]
    write_clients(tmp_path / "train", clients)
    write_clients(tmp_path / "eval", clients[1:])
    options = FederatedDataOptions("clients", str(tmp_path / "train"), str(tmp_path / "eval"))
    found = population(options)
    assert found.data.counts.tolist() == [2, 1]
    assert found.held["x"].tolist() == [[1.0, 1.0]]
    write_clients(tmp_path / "other", [{"y": np.zeros(1)}])
    with pytest.raises(DataError, match="write both with the same fields"):
        population(FederatedDataOptions("clients", options.path, str(tmp_path / "other")))
    assert population(FederatedDataOptions("clients", options.path)).held is None


def test_without_scikit_learn_one_is_told_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'shardpar\[demo\]'"):
        population(FederatedDataOptions())


def test_scores_are_those_of_scikit_learn():
    random = np.random.default_rng(0)
    # More rows than one batch, and not a whole number of batches.
    held = {
        "inputs": random.normal(size=(1500, 5)).astype(np.float32),
        "labels": random.integers(0, 3, 1500).astype(np.int32),
    }
    task = Task.of(lambda rngs: MLP.build(MLP.MLPOptions(5, (), 3), rngs), MLP.loss)
    params = task.init(3)
    found = Evaluation(task, held, MLP.predict)(params)
    logits = held["inputs"] @ params["layers.0.weight"] + params["layers.0.bias"]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["accuracy"] == pytest.approx(accuracy_score(held["labels"], logits.argmax(1)))
    assert found["eval_loss"] == pytest.approx(log_loss(held["labels"], p), rel=1e-5)
    assert Evaluation(task, held)(params).keys() == {"eval_loss"}
    weighted = {**held, "weights": (held["labels"] == 1).astype(np.float32)}
    ones = held["labels"] == 1
    assert Evaluation(task, weighted)(params)["eval_loss"] == pytest.approx(
        log_loss(held["labels"][ones], p[ones], labels=[0, 1, 2]), rel=1e-5
    )
