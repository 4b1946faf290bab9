"""Factorisation machines: a weight per id, and the dot products of pairs of factors.

Rendle, "Factorization Machines", ICDM 2010. With the table rule FTRL it is FTRL-FM.
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

TRAINS = "tables"


@dataclass(frozen=True)
class FMOptions:
    """A weight and `factors` factors for each of `rows` ids."""

    rows: Annotated[int, Meta(ge=1)] = 1 << 20
    factors: Annotated[int, Meta(ge=1)] = 8
    init_std: Annotated[float, Meta(gt=0.0)] = 0.01


class FM(nnx.Module):
    """Scores of pairs in linear time: (sum of v)**2 - sum of v**2, halved."""

    def __init__(self, options: FMOptions, rngs: nnx.Rngs):
        begin = ps.Columns(((ps.Zeros(), 1), (ps.Normal(options.init_std), options.factors)))
        # One row holds both, since both are looked up together.
        self.features = ps.Embed(options.rows, 1 + options.factors, init=begin, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, batch):
        """Scores [batch]."""
        scaled = self.features(batch["ids"], batch["values"])
        return self.bias[...] + first_and_second_order(scaled)


def first_and_second_order(scaled):
    """Scores [batch] of rows [batch, slots, 1 + factors], each times its feature's value."""
    total, square = scaled.sum(-2), (scaled * scaled).sum(-2)
    # Weighed instead of sliced: the gradient of a slice is padded, element by element.
    is_first_order = jnp.arange(scaled.shape[-1]) == 0
    return jnp.where(is_first_order, total, 0.5 * (total**2 - square)).sum(-1)


def build(options: FMOptions, rngs: nnx.Rngs) -> FM:
    """The model."""
    return FM(options, rngs)


def loss(model, batch):
    """(sum, weight)."""
    return losses.logistic(model(batch), batch["labels"], batch["weights"])


def predict(model, batch):
    """Probabilities [batch]."""
    return jax.nn.sigmoid(model(batch))


def require(_options, batch):
    """Refuses labels that are no clicks."""
    losses.require_binary(batch["labels"], batch["weights"])
