"""Linear models over sparse features: one weight per id.

Logistic regression and its kin, as Angel has them. With the table rule FTRL this is the
click model of McMahan et al., "Ad Click Prediction: a View from the Trenches", KDD 2013.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from msgspec import Meta

from shardpar import ps
from shardpar.ps import losses
from shardpar.ps.algorithms.perceptron import require_dense

TRAINS = "tables"


@dataclass(frozen=True)
class LinearOptions:
    """A weight for each of `rows` ids, and `dense` more for features that are always there.

    `loss` makes it a logistic regression, a support vector machine, a linear or a robust
    regression; `l2` pulls the weights of a sample's features towards 0.
    """

    rows: Annotated[int, Meta(ge=1)] = 1 << 20
    dense: Annotated[int, Meta(ge=0)] = 0
    loss: Literal["logistic", "hinge", "squared", "huber"] = "logistic"
    huber_delta: Annotated[float, Meta(gt=0.0)] = 1.0
    l2: Annotated[float, Meta(ge=0.0)] = 0.0


class Linear(nnx.Module):
    """The score of a sample: bias + sum of weight * value."""

    def __init__(self, options: LinearOptions, rngs: nnx.Rngs):
        self.options = options
        self.weights = ps.Embed(options.rows, 1, init=ps.Zeros(), rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(()))
        self.dense = nnx.Param(jnp.zeros((options.dense,)))

    def __call__(self, batch):
        """Scores [batch], and the squared norm of each sample's weights [batch]."""
        require_dense(self.options.dense, batch)
        weights = self.weights(batch["ids"])[..., 0]
        scores = (weights * batch["values"]).sum(-1) + self.bias[...]
        if self.options.dense:
            scores = scores + batch["dense"] @ self.dense[...]
        return scores, (weights**2).sum(-1)


def build(options: LinearOptions, rngs: nnx.Rngs) -> Linear:
    """The model."""
    return Linear(options, rngs)


def loss(model, batch):
    """(sum, weight)."""
    scores, norms = model(batch)
    options, labels, weights = model.options, batch["labels"], batch["weights"]
    if options.loss == "huber":
        total, weight = losses.huber(scores, labels, weights, options.huber_delta)
    else:
        cost = {"logistic": losses.logistic, "hinge": losses.hinge, "squared": losses.squared}
        total, weight = cost[options.loss](scores, labels, weights)
    return total + 0.5 * options.l2 * (norms * weights).sum(), weight


def predict(model, batch):
    """Probabilities for logistic, else scores."""
    scores, _ = model(batch)
    return jax.nn.sigmoid(scores) if model.options.loss == "logistic" else scores


def require(options, batch):
    """Refuses labels that are no two classes, where the loss tells two apart."""
    if options.loss in ("logistic", "hinge"):
        losses.require_binary(batch["labels"], batch["weights"])
