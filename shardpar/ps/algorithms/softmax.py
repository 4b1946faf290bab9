"""Softmax regression over sparse features: a row of class weights per id."""

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
class SoftmaxOptions:
    """`classes` weights for each of `rows` ids; labels are 0 to classes - 1."""

    rows: Annotated[int, Meta(ge=1)] = 1 << 20
    classes: Annotated[int, Meta(ge=2)] = 10


class Softmax(nnx.Module):
    """The scores of a sample's classes."""

    def __init__(self, options: SoftmaxOptions, rngs: nnx.Rngs):
        self.weights = ps.Embed(options.rows, options.classes, init=ps.Zeros(), rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((options.classes,)))

    def __call__(self, batch):
        """Scores [batch, classes]."""
        weights = self.weights(batch["ids"])
        return jnp.einsum("bsc,bs->bc", weights, batch["values"]) + self.bias[...]


def build(options: SoftmaxOptions, rngs: nnx.Rngs) -> Softmax:
    """The model."""
    return Softmax(options, rngs)


def loss(model, batch):
    """(sum, weight)."""
    return losses.softmax(model(batch), batch["labels"], batch["weights"])


def predict(model, batch):
    """Probabilities [batch, classes]."""
    return jax.nn.softmax(model(batch), axis=-1)


def require(options, batch):
    """Refuses labels that are no class."""
    losses.require_classes(batch["labels"], batch["weights"], options.classes)
