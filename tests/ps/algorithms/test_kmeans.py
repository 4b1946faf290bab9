"""K-means: from the same beginning the same centres as scikit-learn, on one device or four."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from shardpar.errors import ConfigError, DataError
from shardpar.ps.algorithms.kmeans import KMeansOptions, first_centres, fit

cluster = pytest.importorskip("sklearn.cluster")
datasets = pytest.importorskip("sklearn.datasets")

POINTS, _ = datasets.make_blobs(700, 5, centers=7, cluster_std=2.0, random_state=0)
POINTS = POINTS.astype(np.float32) + 100
BEGIN = POINTS[:7]


@pytest.mark.parametrize("devices", [1, 4])
def test_lloyds_steps_are_scikit_learns(devices):
    want = cluster.KMeans(7, init=BEGIN, n_init=1, algorithm="lloyd", tol=0, max_iter=100)
    want.fit(POINTS)
    said = []
    found = fit(
        KMeansOptions(7, tolerance=0.0),
        POINTS,
        begin=BEGIN,
        devices=jax.devices()[:devices],
        progress=lambda *told: said.append(told),
    )
    np.testing.assert_allclose(found.centres, want.cluster_centers_, atol=1e-3)
    np.testing.assert_array_equal(found.labels, want.labels_)
    assert found.inertia == pytest.approx(want.inertia_, rel=1e-4)
    assert len(said) == found.iterations < 100
    assert [loss for _, _, loss in said] == sorted((loss for _, _, loss in said), reverse=True)


def test_first_centres_are_as_good_as_scikit_learns():
    ours, theirs = [], []
    for seed in range(10):
        for outcome, centres in (
            (ours, first_centres(POINTS, 7, np.random.default_rng(seed))),
            (theirs, cluster.kmeans_plusplus(POINTS, 7, random_state=seed)[0]),
        ):
            distances = ((POINTS[:, None] - centres) ** 2).sum(axis=2)
            outcome.append(distances.min(axis=1).sum())
    assert np.median(ours) < 1.1 * np.median(theirs)


def test_mini_batches_come_near_to_what_all_points_give():
    one = jax.devices()[:1]
    whole = fit(KMeansOptions(7), POINTS, devices=one)
    best = cluster.KMeans(7, n_init=10, random_state=0).fit(POINTS).inertia_
    assert whole.inertia < 1.02 * best
    small = fit(KMeansOptions(7, iterations=3, batch=64), POINTS, devices=one)
    assert small.inertia < 1.1 * best
    assert small.iterations == 3


def test_more_devices_than_clusters_leave_places_empty():
    found = fit(KMeansOptions(2), [[0.0], [1], [10], [11], [12]], devices=jax.devices()[:4])
    assert sorted(found.centres[:, 0].tolist()) == [0.5, 11.0]
    assert found.inertia == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ([[1.0]], "at least 2"),
        ([1.0, 2.0], "give \\[n, d\\]"),
        ([[1.0], [np.inf]], "point 1 has inf in column 0"),
    ],
)
def test_points_that_are_none_are_refused(points, says):
    with pytest.raises(DataError, match=says):
        fit(KMeansOptions(2), points)


def test_options_are_checked():
    with pytest.raises(ConfigError, match="clusters"):
        KMeansOptions(0)
