"""DeepFM: a factorisation machine and a network over the same factors.

Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction",
IJCAI 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
from flax import nnx
from msgspec import Meta

from shardpar.ps import losses
from shardpar.ps.algorithms.fm import first_and_second_order
from shardpar.ps.algorithms.perceptron import WeightsAndNetwork

TRAINS = "tables"


@dataclass(frozen=True)
class DeepFMOptions:
    """An FM of `factors` factors, and a network with `hidden` units over `fields` of them.

    A sample has one id per field, in the order of fields, and `dense` further numbers.
    """

    rows: Annotated[int, Meta(ge=1)] = 1 << 20
    fields: Annotated[int, Meta(ge=1)] = 39
    dense: Annotated[int, Meta(ge=0)] = 0
    factors: Annotated[int, Meta(ge=1)] = 16
    hidden: tuple[Annotated[int, Meta(ge=1)], ...] = (64, 32)
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    init_std: Annotated[float, Meta(gt=0.0)] = 0.01


class DeepFM(WeightsAndNetwork):
    """Both scores, added."""

    def __call__(self, batch):
        """Scores [batch]."""
        scaled, deep = self.parts(batch)
        return first_and_second_order(scaled) + deep


def build(options: DeepFMOptions, rngs: nnx.Rngs) -> DeepFM:
    """The model."""
    return DeepFM(options, rngs)


def loss(model, batch):
    """(sum, weight)."""
    return losses.logistic(model(batch), batch["labels"], batch["weights"])


def predict(model, batch):
    """Probabilities [batch]."""
    return jax.nn.sigmoid(model(batch))


def require(_options, batch):
    """Refuses labels that are no clicks."""
    losses.require_binary(batch["labels"], batch["weights"])
