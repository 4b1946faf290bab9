"""What a prediction costs: losses as a sum over samples and their weight, each computed stably."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Cost = tuple[jax.Array, jax.Array]


def require_binary(labels: np.ndarray, weights: np.ndarray) -> None:
    """Refuses labels that are no two classes, before they make a loss that means nothing.

    Args:
      labels: float[batch], on the host.
      weights: float[batch]; labels of weight 0 do not count.

    Raises:
      ValueError: naming the first label that is not -1 or 0 to 1.

    >>> require_binary(np.array([0.0, 1.0, -1.0, 7.0]), np.array([1.0, 1.0, 1.0, 0.0]))
    """
    counted = labels[weights > 0]
    bad = counted[~((counted == -1) | ((counted >= 0) & (counted <= 1)))]
    if bad.size:
        raise ValueError(
            f"a label is {bad[0]:g}, and this model tells two classes apart, 0 and 1 (or -1 and "
            "1); write data.binary_labels=true to take all above 0 for 1, or use model.source="
            "'softmax' for classes, or 'linear' with model.loss='squared' for numbers"
        )


def require_classes(labels: np.ndarray, weights: np.ndarray, classes: int) -> None:
    """Refuses labels that are no class.

    Args:
      labels: float[batch], on the host.
      weights: float[batch]; labels of weight 0 do not count.
      classes: 0 to `classes` - 1.

    Raises:
      ValueError: naming the first label that is none.

    >>> require_classes(np.array([0.0, 2.0]), np.ones(2), classes=3)
    """
    counted = labels[weights > 0]
    bad = counted[~(np.isfinite(counted) & (counted >= 0) & (counted == np.floor(counted)))]
    if bad.size:
        raise ValueError(
            f"a label is {bad[0]:g}, and classes are whole numbers from 0 on; number them so in "
            "the data"
        )
    if counted.size and counted.max() >= classes:
        raise ValueError(
            f"a label is {counted.max():g}, but model.classes is {classes}; write "
            f"model.classes={int(counted.max()) + 1}"
        )


def _summed(costs: jax.Array, weights: jax.Array) -> Cost:
    return (costs * weights).sum(), weights.sum()


def logistic(scores: jax.Array, labels: jax.Array, weights: jax.Array) -> Cost:
    """Cross entropy of labels in 0..1, from scores (logits); labels of -1 mean 0.

    >>> total, weight = logistic(jnp.zeros(2), jnp.array([0.0, 1.0]), jnp.ones(2))
    >>> round(float(total / weight), 4)
    0.6931
    """
    return _summed(jax.nn.softplus(scores) - jnp.maximum(labels, 0.0) * scores, weights)


def hinge(scores: jax.Array, labels: jax.Array, weights: jax.Array) -> Cost:
    """The support vector machine's: max(0, 1 - y * score), where labels of 0 mean -1.

    >>> float(hinge(jnp.array([0.25]), jnp.array([0.0]), jnp.ones(1))[0])
    1.25
    """
    return _summed(jnp.maximum(0.0, 1.0 - jnp.where(labels > 0, 1.0, -1.0) * scores), weights)


def squared(scores: jax.Array, labels: jax.Array, weights: jax.Array) -> Cost:
    """(score - label)**2 / 2."""
    return _summed(0.5 * (scores - labels) ** 2, weights)


def huber(scores: jax.Array, labels: jax.Array, weights: jax.Array, delta: float = 1.0) -> Cost:
    """Squared near the label, straight beyond `delta` (Huber, 1964).

    >>> float(huber(jnp.array([3.0]), jnp.array([0.0]), jnp.ones(1))[0])
    2.5
    """
    miss = jnp.abs(scores - labels)
    near = jnp.minimum(miss, delta)
    return _summed(0.5 * near**2 + delta * (miss - near), weights)


def softmax(scores: jax.Array, labels: jax.Array, weights: jax.Array) -> Cost:
    """Cross entropy of classes 0, 1, ... from scores [samples, classes]."""
    chosen = jnp.take_along_axis(scores, labels.astype(jnp.int32)[:, None], axis=1)[:, 0]
    return _summed(jax.nn.logsumexp(scores, axis=1) - chosen, weights)
