"""What a prediction costs: losses as a sum over samples and their weight, each computed stably."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Cost = tuple[jax.Array, jax.Array]


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
