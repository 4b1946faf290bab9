"""Decides what the small data sets that scikit-learn carries look like as sparse samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from shardpar.errors import DataError
from shardpar.ps.data.batch import SparseBatch
from shardpar.ps.data.hashing import mix

DEMOS = ("breast_cancer", "diabetes", "digits", "iris", "wine")

_EVAL_SHARE = 0.2


def demo_data(name: str, seed: int = 0) -> tuple[SparseBatch, SparseBatch]:
    """One of scikit-learn's data sets, a fifth of it for evaluation.

    Features are shifted and scaled to mean 0 and deviation 1 over the training part, but those
    of digits, which are mostly 0, only scaled to 0 … 1. The id of a feature is its column.

    Args:
      name: one of `DEMOS`. The labels of diabetes are real numbers, those of breast_cancer 0
        and 1, and the others' are classes from 0.
      seed: of the split.

    Raises:
      DataError: there is no such set, or scikit-learn is not installed.
    """
    if name not in DEMOS:
        raise DataError(f"there is no demo data {name!r}; there are {', '.join(DEMOS)}")
    try:
        from sklearn import datasets
    except ImportError:
        raise DataError(
            f"the demo data {name} comes with scikit-learn, which is not installed; run "
            "`pip install 'shardpar[demo]'`, or use data.format=clicks"
        ) from None
    loaded: Any = getattr(datasets, f"load_{name}")()
    features, labels = np.asarray(loaded.data, np.float64), np.asarray(loaded.target, np.float64)
    order = np.argsort(mix(np.arange(len(labels)).astype(np.uint64) ^ np.uint64(seed << 32)))
    cut = round(len(labels) * (1 - _EVAL_SHARE))
    train, test = np.sort(order[:cut]), np.sort(order[cut:])
    if name == "digits":
        features = features / features.max()
    else:
        features = (features - features[train].mean(axis=0)) / features[train].std(axis=0)
    return _sparse(features[train], labels[train]), _sparse(features[test], labels[test])


def _sparse(features: np.ndarray, labels: np.ndarray) -> SparseBatch:
    """Only what is not 0, as a file of sparse samples has it."""
    there = features != 0
    slots = int(there.sum(axis=1).max())
    # A stable sort brings what is there to the front and keeps its order.
    order = np.argsort(~there, axis=1, kind="stable")[:, :slots]
    kept = np.take_along_axis(there, order, axis=1)
    values = np.take_along_axis(features, order, axis=1)
    return SparseBatch(
        np.where(kept, order, 0), values, labels, np.ones(len(labels)), np.arange(len(labels))
    )
