"""Wide & Deep: a linear model and a network over embeddings, trained together.

Cheng et al., "Wide & Deep Learning for Recommender Systems", DLRS 2016.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from msgspec import Meta

from shardpar import ps
from shardpar.ps import losses
from shardpar.ps.algorithms.perceptron import Perceptron, require_fields

TRAINS = "tables"


@dataclass(frozen=True)
class WideDeepOptions:
    """A weight and `factors` factors for each of `rows` ids; one id per field."""

    rows: Annotated[int, Meta(ge=1)] = 1 << 20
    fields: Annotated[int, Meta(ge=1)] = 39
    dense: Annotated[int, Meta(ge=0)] = 0
    factors: Annotated[int, Meta(ge=1)] = 16
    hidden: tuple[int, ...] = (64, 32)
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    init_std: Annotated[float, Meta(gt=0.0)] = 0.01


class WideDeep(nnx.Module):
    """The sum of the wide part's score and the deep part's."""

    def __init__(self, options: WideDeepOptions, rngs: nnx.Rngs):
        self.options = options
        begin = ps.Columns(((ps.Zeros(), 1), (ps.Normal(options.init_std), options.factors)))
        self.features = ps.Embed(options.rows, 1 + options.factors, init=begin, rngs=rngs)
        width = options.fields * options.factors + options.dense
        self.network = Perceptron(width, options.hidden, options.dropout, rngs)
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, batch):
        """Scores [batch]."""
        require_fields(self.options.fields, batch["ids"].shape[1])
        scaled = self.features(batch["ids"], batch["values"])
        flat = scaled[..., 1:].reshape(scaled.shape[0], -1)
        if self.options.dense:
            flat = jnp.concatenate([flat, batch["dense"]], axis=1)
        return self.bias[...] + scaled[..., 0].sum(-1) + self.network(flat)


def build(options: WideDeepOptions, rngs: nnx.Rngs) -> WideDeep:
    """The model."""
    return WideDeep(options, rngs)


def loss(model, batch):
    """(sum, weight)."""
    return losses.logistic(model(batch), batch["labels"], batch["weights"])


def predict(model, batch):
    """Probabilities [batch]."""
    return jax.nn.sigmoid(model(batch))
