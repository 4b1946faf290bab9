"""Decides how good predictions of clicks are: AUC, log loss, accuracy.

AUC is the share of pairs of a positive and a negative sample in which the positive one has the
higher score, ties counting half (J. Hanley, B. McNeil: The meaning and use of the area under
a ROC curve, Radiology 1982).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from shardpar.errors import DataError, RunError

_SMALLEST = 1e-15


def auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Exact area under the ROC curve.

    Args:
      labels: [samples]: above 0 is positive.
      scores: [samples], of any scale.
      weights: [samples]; None is all 1. Rows of weight 0 do not count.

    Returns:
      0 … 1; NaN where all samples have one label.

    Raises:
      RunError: a score is NaN.
      ValueError: the shapes differ.

    >>> auc(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8]))
    0.75
    """
    labels, scores, weights = _checked(labels, scores, weights)
    return _area(scores, np.where(labels > 0, weights, 0.0), np.where(labels > 0, 0.0, weights))


def expected_auc(probabilities: np.ndarray) -> float:
    """AUC of a model that knows the probabilities, averaged over all labels they may give.

    >>> expected_auc(np.array([0.5, 0.5])), round(expected_auc(np.array([0.1, 0.9])), 2)
    (0.5, 0.99)
    """
    chances = np.asarray(probabilities, np.float64)
    # A sample is not paired with itself: what that adds is a tie of weight p (1 - p).
    same = (chances * (1 - chances)).sum()
    pairs = chances.sum() * (1 - chances).sum()
    if pairs == same:
        return float("nan")
    return float((_area(chances, chances, 1 - chances) * pairs - same / 2) / (pairs - same))


def _area(scores: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> float:
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    firsts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    if not ordered.size:
        return float("nan")
    return _area_of_groups(
        np.add.reduceat(positive[order], firsts), np.add.reduceat(negative[order], firsts)
    )


def _area_of_groups(positive: np.ndarray, negative: np.ndarray) -> float:
    """Groups of samples of one score each, from the lowest up."""
    below = np.cumsum(negative) - negative
    pairs = float(positive.sum()) * float(negative.sum())
    if pairs == 0:
        return float("nan")
    return float((positive * (below + negative / 2)).sum() / pairs)


def log_loss(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Mean of −log of the probability that was given to what happened; nats.

    Args:
      labels: [samples]: above 0 is positive.
      probabilities: [samples], of the positive label.
      weights: as for `auc`.

    Raises:
      RunError: a probability is NaN, or not in 0 … 1.

    >>> round(log_loss(np.array([1, 0]), np.array([0.5, 0.5])), 4)
    0.6931
    """
    labels, chances, weights = _checked(labels, probabilities, weights)
    _check_chances(chances)
    total = weights.sum()
    return float((_losses(labels, chances) * weights).sum() / total) if total else float("nan")


def _check_chances(chances: np.ndarray) -> None:
    if chances.size and (chances.min() < 0 or chances.max() > 1):
        raise RunError(
            f"predictions must be probabilities from 0 to 1, got {chances.min():g} to "
            f"{chances.max():g}; put the scores through a sigmoid"
        )


def _losses(labels: np.ndarray, chances: np.ndarray) -> np.ndarray:
    given = np.where(labels > 0, chances, 1 - chances)
    return -np.log(np.maximum(given, _SMALLEST))


def accuracy(
    labels: np.ndarray,
    probabilities: np.ndarray,
    weights: np.ndarray | None = None,
    threshold: float = 0.5,
) -> float:
    """Share of the samples on whose side of the threshold the prediction is.

    >>> accuracy(np.array([1, 0, 0]), np.array([0.9, 0.2, 0.7]))
    0.6666666666666666
    """
    labels, chances, weights = _checked(labels, probabilities, weights)
    total = weights.sum()
    right = ((chances > threshold) == (labels > 0)) * weights
    return float(right.sum() / total) if total else float("nan")


@dataclass(frozen=True)
class Scores:
    """What `Evaluation.result` gives.

    Attributes:
      auc, logloss, accuracy: over all samples.
      samples: how many there were.
      positive_share: of their labels.
    """

    auc: float
    logloss: float
    accuracy: float
    samples: int
    positive_share: float


class Evaluation:
    """Sums up predictions batch by batch; several can be merged, one per process.

    Exact AUC keeps 12 bytes per sample. With `buckets`, equally wide ones of the probability,
    memory is constant and the AUC is at most half the share of pairs within one bucket off,
    which `auc_error` gives.

    >>> evaluation = Evaluation()
    >>> evaluation.add(np.array([0, 1.0]), np.array([0.2, 0.9]), np.ones(2))
    >>> evaluation.result().auc
    1.0
    """

    def __init__(self, buckets: int | None = None) -> None:
        self._buckets = buckets
        self._labels: list[np.ndarray] = []
        self._chances: list[np.ndarray] = []
        self._counts = np.zeros((2, buckets or 0))
        self._loss = self._right = self._positive = 0.0
        self._samples = 0

    def add(
        self, labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
    ) -> None:
        """Adds a batch; rows of weight 0 do not count, others count once.

        Raises:
          RunError: a probability is NaN, or not in 0 … 1.
          ValueError: the shapes differ.
        """
        labels, chances, weights = _checked(labels, probabilities, weights)
        _check_chances(chances)
        positive = labels > 0
        self._loss += float(_losses(labels, chances).sum())
        self._right += int(((chances > 0.5) == positive).sum())
        self._positive += int(positive.sum())
        self._samples += labels.size
        if self._buckets is None:
            self._labels.append(positive)
            self._chances.append(chances.astype(np.float64))
            return
        place = np.minimum((chances * self._buckets).astype(np.int64), self._buckets - 1)
        for row, which in enumerate((positive, ~positive)):
            self._counts[row] += np.bincount(place[which], minlength=self._buckets)

    def merge(self, other: Evaluation) -> Self:
        """Adds what another one has seen, with as many buckets."""
        if self._buckets != other._buckets:
            raise ValueError(f"{self._buckets} and {other._buckets} buckets cannot be merged")
        self._labels += other._labels
        self._chances += other._chances
        self._counts = self._counts + other._counts
        self._loss += other._loss
        self._right += other._right
        self._positive += other._positive
        self._samples += other._samples
        return self

    @property
    def auc_error(self) -> float:
        """How far the AUC is from the exact one at most; 0 without buckets."""
        positive, negative = self._counts
        pairs = positive.sum() * negative.sum()
        return float((positive * negative).sum() / pairs / 2) if pairs else 0.0

    def result(self) -> Scores:
        """The metrics of all samples so far.

        Raises:
          DataError: there was none.
        """
        if not self._samples:
            raise DataError("there is no sample to evaluate; give data.eval_path at least one line")
        if self._buckets is None:
            area = auc(np.concatenate(self._labels), np.concatenate(self._chances))
        else:
            area = _area_of_groups(*self._counts)
        count = self._samples
        return Scores(area, self._loss / count, self._right / count, count, self._positive / count)


def _checked(
    labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    weights = np.ones(labels.shape) if weights is None else np.asarray(weights, np.float64)
    if labels.ndim != 1 or not labels.shape == predictions.shape == weights.shape:
        raise ValueError(
            f"labels {labels.shape}, predictions {predictions.shape} and weights {weights.shape} "
            "must be of one shape [samples]"
        )
    counted = weights > 0
    if not counted.all():
        labels, predictions, weights = labels[counted], predictions[counted], weights[counted]
    wrong = np.isnan(predictions)
    if wrong.any():
        raise RunError(
            f"{int(wrong.sum())} of {predictions.size} predictions are NaN, the first for sample "
            f"{int(np.argmax(wrong))} of the batch; the training has diverged: lower the "
            "learning rate"
        )
    return labels, predictions, weights
