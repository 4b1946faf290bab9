"""Deep & Cross network, version 2: explicit feature crosses of every order up to the depth.

Wang et al., "DCN V2: Improved Deep & Cross Network", WWW 2021.
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
from shardpar.ps.algorithms.perceptron import Perceptron, require_dense, require_fields

TRAINS = "tables"


@dataclass(frozen=True)
class DCNOptions:
    """`crosses` cross layers beside a network, both over one embedding per field.

    With `rank` above 0 a cross layer's matrix is a product of two of that rank.
    """

    rows: Annotated[int, Meta(ge=1)] = 1 << 20
    fields: Annotated[int, Meta(ge=1)] = 39
    dense: Annotated[int, Meta(ge=0)] = 0
    factors: Annotated[int, Meta(ge=1)] = 16
    crosses: Annotated[int, Meta(ge=1)] = 2
    rank: Annotated[int, Meta(ge=0)] = 32
    hidden: tuple[Annotated[int, Meta(ge=1)], ...] = (64, 32)
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    init_std: Annotated[float, Meta(gt=0.0)] = 0.01


class Cross(nnx.Module):
    """x0 * (W x + b) + x."""

    def __init__(self, width: int, rank: int, rngs: nnx.Rngs):
        down = [nnx.Linear(width, rank, use_bias=False, rngs=rngs)] if rank else []
        self.layers = nnx.List([*down, nnx.Linear(rank or width, width, rngs=rngs)])

    def __call__(self, first, x):
        """[batch, width] each."""
        y = x
        for layer in self.layers:
            y = layer(y)
        return first * y + x


class DCN(nnx.Module):
    """The sum of a linear score of the crosses and the network's."""

    def __init__(self, options: DCNOptions, rngs: nnx.Rngs):
        self.options = options
        self.features = ps.Embed(
            options.rows, options.factors, init=ps.Normal(options.init_std), rngs=rngs
        )
        width = options.fields * options.factors + options.dense
        crosses = [Cross(width, options.rank, rngs) for _ in range(options.crosses)]
        self.crosses = nnx.List(crosses)
        self.out = nnx.Linear(width, 1, rngs=rngs)
        self.network = Perceptron(width, options.hidden, options.dropout, rngs)

    def __call__(self, batch):
        """Scores [batch]."""
        require_fields(self.options.fields, batch["ids"].shape[1])
        require_dense(self.options.dense, batch)
        rows = self.features(batch["ids"], batch["values"])
        first = rows.reshape(rows.shape[0], -1)
        if self.options.dense:
            first = jnp.concatenate([first, batch["dense"]], axis=1)
        crossed = first
        for cross in self.crosses:
            crossed = cross(first, crossed)
        return self.out(crossed)[:, 0] + self.network(first)


def build(options: DCNOptions, rngs: nnx.Rngs) -> DCN:
    """The model."""
    return DCN(options, rngs)


def loss(model, batch):
    """(sum, weight)."""
    return losses.logistic(model(batch), batch["labels"], batch["weights"])


def predict(model, batch):
    """Probabilities [batch]."""
    return jax.nn.sigmoid(model(batch))


def require(_options, batch):
    """Refuses labels that are no clicks."""
    losses.require_binary(batch["labels"], batch["weights"])
