"""Field-aware factorisation machines: factors for each pair of an id and another's field.

Juan et al., "Field-aware Factorization Machines for CTR Prediction", RecSys 2016.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from msgspec import Meta

from shardpar import ps
from shardpar.ps import losses

TRAINS = "tables"


@dataclass(frozen=True)
class FFMOptions:
    """A weight and, for each of `fields` fields, `factors` factors for each of `rows` ids."""

    rows: Annotated[int, Meta(ge=1)] = 1 << 18
    fields: Annotated[int, Meta(ge=1)] = 39
    factors: Annotated[int, Meta(ge=1)] = 4
    init_std: Annotated[float, Meta(gt=0.0)] = 0.01


class FFM(nnx.Module):
    """Sum over pairs of features of <v_i towards j's field, v_j towards i's field>."""

    def __init__(self, options: FFMOptions, rngs: nnx.Rngs):
        self.options = options
        width = options.fields * options.factors
        begin = ps.Columns(((ps.Zeros(), 1), (ps.Normal(options.init_std), width)))
        self.features = ps.Embed(options.rows, 1 + width, init=begin, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, batch):
        """Scores [batch]; the batch has the field of each feature."""
        fields, factors = self.options.fields, self.options.factors
        scaled = self.features(batch["ids"], batch["values"])
        samples, slots = batch["ids"].shape
        towards = scaled[..., 1:].reshape(samples, slots, fields, factors)
        # sums[a, b]: what features of field a hold towards field b.
        belongs = jax.nn.one_hot(batch["fields"], fields, dtype=scaled.dtype)
        sums = jnp.einsum("bsa,bsfk->bafk", belongs, towards)
        pairs = jnp.einsum("bafk,bfak->b", sums, sums)
        own = jnp.einsum("bsa,bsak->bsk", belongs, towards)
        return self.bias[...] + scaled[..., 0].sum(-1) + 0.5 * (pairs - (own**2).sum((1, 2)))


def build(options: FFMOptions, rngs: nnx.Rngs) -> FFM:
    """The model."""
    return FFM(options, rngs)


def loss(model, batch):
    """(sum, weight)."""
    return losses.logistic(model(batch), batch["labels"], batch["weights"])


def predict(model, batch):
    """Probabilities [batch]."""
    return jax.nn.sigmoid(model(batch))


def require(options, batch):
    """Refuses labels that are no clicks, and fields that the model has no factors for."""
    losses.require_binary(batch["labels"], batch["weights"])
    seen = batch["fields"][batch["values"] != 0] if "fields" in batch else np.zeros(0, int)
    most = int(seen.max(initial=0))
    if most >= options.fields:
        raise ValueError(
            f"a feature is of field {most}, but model.fields is {options.fields}; write "
            f"model.fields={most + 1}"
        )
