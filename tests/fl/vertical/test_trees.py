"""Boosted trees of two parties beside a plain booster that has all columns."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from shardpar.errors import DataError, PartyError
from shardpar.fl.vertical import histograms, tree_model
from shardpar.fl.vertical.guest import GuestOfTrees
from shardpar.fl.vertical.host import HostOfTrees
from shardpar.fl.vertical.options import KeyOptions, TreeOptions
from shardpar.fl.vertical.tree_model import TreesHalf, fit, predict
from shardpar.fl.vertical.trees import GuestSplit, Leaf
from tests.fl.vertical.parties import SHORT, together
from tests.fl.vertical.pooled import pooled


def grown(x, y, split, options, keys=SHORT, progress=None):
    told = [].append if progress is None else progress.append
    return together(
        lambda end: fit(end, "guest", x[:, :split], y, options, keys, on_tree=told),
        lambda end: fit(end, "host", x[:, split:], None, options, keys),
    )


def put_together(guest, host):
    """The trees as `pooled` writes them."""
    trees = []
    for tree in guest.trees:
        whole = {}
        for node, held in tree.nodes.items():
            if isinstance(held, Leaf):
                whole[node] = held.value
            elif isinstance(held, GuestSplit):
                whole[node] = ("guest", held.column, held.edge, held.missing_left)
            else:
                cut = host.cuts[held.split]
                whole[node] = ("host", cut.column, cut.edge, cut.missing_left)
        trees.append(whole)
    return trees


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for node, held in one.items():
            if isinstance(held, float):
                assert held == pytest.approx(other[node], rel=1e-12, abs=1e-15)
            else:
                assert held == other[node]


def sample(seed, rows=80, columns=5, missing=0.0, objective="logistic"):
    random = np.random.default_rng(seed)
    x = np.round(random.normal(size=(rows, columns)), 1)
    y = x[:, 0] + x[:, -1] * x[:, 1] + 0.5 * random.normal(size=rows)
    x[random.random(x.shape) < missing] = np.nan
    return x, (y > 0).astype(float) if objective == "logistic" else y


CASES = {
    "logistic": ({"trees": 3, "max_depth": 3}, 0.0),
    "missing numbers": ({"trees": 2, "max_depth": 3, "max_bins": 6}, 0.3),
    "squared": ({"objective": "squared", "trees": 2, "max_depth": 3, "max_bins": 7}, 0.0),
    "few rows": ({"trees": 2, "max_depth": 5, "min_samples": 9, "min_child_weight": 1.5}, 0.1),
    "dear splits": ({"trees": 2, "max_depth": 4, "min_gain": 1.0, "l2": 3.0}, 0.0),
    "no optimism": ({"trees": 2, "max_depth": 3, "optimistic": False, "batch": 17}, 0.1),
    "one split": ({"trees": 2, "max_depth": 1}, 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_trees_are_those_of_a_booster_that_has_all_columns(name):
    changes, missing = CASES[name]
    options = TreeOptions(**changes)
    x, y = sample(7, missing=missing, objective=options.objective)
    guest, host = grown(x, y, 2, options)
    trees, scores = pooled(x, y, options, 2)
    assert_same(put_together(guest, host), trees)
    owners = {held[0] for tree in trees for held in tree.values() if isinstance(held, tuple)}
    assert owners == {"guest", "host"} or name == "one split"
    told, _ = together(
        lambda end: predict(end, guest, x[:, :2], SHORT),
        lambda end: predict(end, host, x[:, 2:], SHORT),
    )
    expected = scores if options.objective == "squared" else 1 / (1 + np.exp(-scores))
    np.testing.assert_allclose(told, expected, rtol=1e-12)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    split=st.integers(0, 4),
    depth=st.integers(1, 5),
    optimistic=st.booleans(),
    missing=st.sampled_from([0.0, 0.4]),
)
def test_whoever_has_a_column_trees_are_the_same(seed, split, depth, optimistic, missing):
    x, y = sample(seed, rows=30, columns=4, missing=missing)
    y[:2] = 0, 1
    options = TreeOptions(trees=1, max_depth=depth, max_bins=5, optimistic=optimistic)
    guest, host = grown(x, y, split, options)
    assert_same(put_together(guest, host), pooled(x, y, options, split)[0])


def test_wrong_guesses_are_taken_back_and_right_ones_stay():
    x, y = sample(3, rows=120, columns=6)
    progress = []
    grown(x, y, 3, TreeOptions(trees=3, max_depth=4), progress=progress)
    assert 0 < progress[-1].taken_back < progress[-1].guesses
    progress = []
    grown(x, y, 3, TreeOptions(trees=1, optimistic=False), progress=progress)
    assert progress[-1].guesses == 0


@pytest.mark.parametrize("slow", ["guest", "host"])
def test_trees_do_not_depend_on_who_is_slow(monkeypatch, slow):
    """A slow host still sums when its work is taken back, a slow guest finds outdated sums."""
    hosts, outdated = [], []

    class Host(HostOfTrees):
        def __init__(self, *how):
            super().__init__(*how)
            hosts.append(self)

    def late(work):
        def working(*how):
            time.sleep(0.02)
            return work(*how)

        return working

    take = GuestOfTrees._take

    def noted(self, tree):
        parent = take(self, tree)
        outdated.extend([1] if parent is None else [])
        return parent

    monkeypatch.setattr(tree_model, "HostOfTrees", Host)
    monkeypatch.setattr(GuestOfTrees, "_take", noted)
    if slow == "host":
        monkeypatch.setattr(histograms, "_job", late(histograms._job))
    else:
        monkeypatch.setattr(GuestOfTrees, "_opened", late(GuestOfTrees._opened))
    x, y = sample(3, rows=120, columns=6)
    options = TreeOptions(trees=2, max_depth=4)
    assert_same(put_together(*grown(x, y, 3, options)), pooled(x, y, options, 3)[0])
    assert hosts[0].dropped > 0 if slow == "host" else outdated


def test_trainings_may_follow_each_other_on_one_channel():
    x, y = sample(3, rows=60, columns=6)
    options = TreeOptions(trees=1, max_depth=3)

    def twice(role, columns, labels):
        return lambda end: [fit(end, role, columns, labels, options, SHORT) for _ in range(2)]

    guests, hosts = together(twice("guest", x[:, :3], y), twice("host", x[:, 3:], None))
    expected = pooled(x, y, options, 3)[0]
    for guest, host in zip(guests, hosts, strict=True):
        assert_same(put_together(guest, host), expected)


def test_breast_cancer_is_told_as_well_as_by_scikit_learn(tmp_path):
    x, y = load_breast_cancer(return_X_y=True)
    random = np.random.default_rng(0)
    order = random.permutation(len(y))
    train, test = order[:380], order[380:]
    options = TreeOptions(trees=8, max_depth=3, max_bins=16)
    for half, name in zip(grown(x[train], y[train], 10, options), ("guest", "host"), strict=True):
        half.save(tmp_path / name)
    kept = [TreesHalf.load(tmp_path / name) for name in ("guest", "host")]
    told, _ = together(
        lambda end: predict(end, kept[0], x[test, :10], SHORT),
        lambda end: predict(end, kept[1], x[test, 10:], SHORT),
    )
    peer = HistGradientBoostingClassifier(
        max_iter=8, learning_rate=0.3, max_depth=3, l2_regularization=1.0, max_bins=16,
        min_samples_leaf=1,
    ).fit(x[train], y[train])  # fmt: skip
    theirs = roc_auc_score(y[test], peer.predict_proba(x[test])[:, 1])
    assert roc_auc_score(y[test], told) > theirs - 0.005


def test_processes_come_to_the_same_trees():
    x, y = sample(5, rows=60)
    options = TreeOptions(trees=1, max_depth=2, max_bins=3)
    keys = KeyOptions(bits=512, processes=2, unsafe_small_keys_for_tests=True)
    one, two = (put_together(*grown(x, y, 2, options, each)) for each in (SHORT, keys))
    assert one == two


def test_halves_tell_neither_the_others_columns_nor_cuts():
    x, y = sample(5, rows=60)
    guest, host = grown(x, y, 2, TreeOptions(trees=2))
    assert guest.cuts == ()
    assert host.trees == ()
    assert guest.splits == len(host.cuts) > 0


def test_the_guest_sees_sums_in_an_order_of_their_own_each_time(monkeypatch):
    x, y = sample(5, rows=60)
    seen, opened = [], GuestOfTrees._opened

    def noted(self, tree, message):
        sums = opened(self, tree, message)
        if message.node == 1:
            seen.append(sums[0].tolist())
        return sums

    monkeypatch.setattr(GuestOfTrees, "_opened", noted)
    for _ in range(2):
        grown(x, y, 2, TreeOptions(trees=1, max_depth=1))
    one, two = seen
    assert one != two
    assert sorted(one) == sorted(two)
    assert len(set(one)) > 40


@pytest.mark.parametrize(
    ("labels", "words"),
    [(np.zeros(3), "both of them"), (np.array([0, 1, 2.0]), "0 and 1"), (np.ones(2), "shaped")],
)
def test_labels_that_cannot_be_learned_are_refused(labels, words):
    with pytest.raises(DataError, match=words):
        fit(None, "guest", np.ones((3, 1)), labels, TreeOptions(), SHORT)


def test_another_model_or_half_is_refused(tmp_path):
    x, y = sample(5, rows=40)
    options = TreeOptions(trees=1, max_depth=1)
    guest, _ = grown(x, y, 2, options)
    _, host = grown(x, y, 2, options)
    with pytest.raises(PartyError, match="other options"):
        together(
            lambda end: predict(end, guest, x[:, :2], SHORT),
            lambda end: predict(end, host, x[:, 2:], SHORT),
        )
    (tmp_path / "x").write_bytes(b"no")
    with pytest.raises(DataError, match="no half"):
        TreesHalf.load(tmp_path / "x")
    with pytest.raises(PartyError, match="other options"):
        together(
            lambda end: fit(end, "guest", x, y, options, SHORT),
            lambda end: fit(end, "host", x, None, TreeOptions(l2=9.0), SHORT),
        )
