"""Wide & Deep: a linear model and a network over embeddings, trained together.

Cheng et al., "Wide & Deep Learning for Recommender Systems", DLRS 2016.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
from flax import nnx
from msgspec import Meta

from shardpar.ps import losses
from shardpar.ps.algorithms.perceptron import WeightsAndNetwork

TRAINS = "tables"


@dataclass(frozen=True)
class WideDeepOptions:
    """A weight and `factors` factors for each of `rows` ids; one id per field."""

    rows: Annotated[int, Meta(ge=1)] = 1 << 20
    fields: Annotated[int, Meta(ge=1)] = 39
    dense: Annotated[int, Meta(ge=0)] = 0
    factors: Annotated[int, Meta(ge=1)] = 16
    hidden: tuple[Annotated[int, Meta(ge=1)], ...] = (64, 32)
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    init_std: Annotated[float, Meta(gt=0.0)] = 0.01


class WideDeep(WeightsAndNetwork):
    """The sum of the wide part's score and the deep part's."""

    def __call__(self, batch):
        """Scores [batch]."""
        scaled, deep = self.parts(batch)
        return scaled[..., 0].sum(-1) + deep


def build(options: WideDeepOptions, rngs: nnx.Rngs) -> WideDeep:
    """The model."""
    return WideDeep(options, rngs)


def loss(model, batch):
    """(sum, weight)."""
    return losses.logistic(model(batch), batch["labels"], batch["weights"])


def predict(model, batch):
    """Probabilities [batch]."""
    return jax.nn.sigmoid(model(batch))


def require(_options, batch):
    """Refuses labels that are no clicks."""
    losses.require_binary(batch["labels"], batch["weights"])
