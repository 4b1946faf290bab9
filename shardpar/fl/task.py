"""A Flax model as federated learning sees it: flat parameters, and the gradient of a masked batch.

Parameters are a flat dictionary from a path ("blocks.3.up") to an array: the form in which they are
sent, summed, masked and stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardpar.capture.model import AbstractModel, abstract_model
from shardpar.errors import CaptureError

Params = dict[str, Any]
Batch = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Task:
    """What all parties of a federation agree on: a model and its loss.

    Build one with `Task.of`.
    """

    model: AbstractModel
    loss: Callable[[Any, Any], Any]
    rest: Params

    @classmethod
    def of(cls, init: Callable[[nnx.Rngs], nnx.Module], loss: Callable[[Any, Any], Any]) -> Task:
        """A task from a model's init and its loss.

        Args:
          init: makes the model from `nnx.Rngs`.
          loss: `loss(model, batch) -> (sum, weight)`; it must give examples whose
            `batch["weights"]` is 0 no part in either.

        Raises:
          CaptureError: the model keeps statistics of its batches, which no party may average
            unseen; use a normalisation without them (LayerNorm, GroupNorm).
        """
        model = abstract_model(init)
        with nnx.use_eager_sharding(False):
            module = nnx.eval_shape(lambda: init(nnx.Rngs(0)))
        if jax.tree.leaves(nnx.state(module, nnx.BatchStat)):
            raise CaptureError(
                "the model keeps statistics of its batches (nnx.BatchStat), which clients with "
                "different data cannot share; use nnx.LayerNorm or nnx.GroupNorm instead"
            )
        return cls(model, loss, model.create(0)[1])

    def init(self, seed: int) -> Params:
        """The parameters that a run with this seed begins with."""
        return self.model.create(seed)[0]

    def loss_sum(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum of the losses, sum of the weights) of a batch."""
        sum_, weight = self.loss(self.model.merge(params, self.rest), batch)
        return sum_, weight

    def gradient(self, params: Params, batch: Batch) -> tuple[Params, jax.Array, jax.Array]:
        """(gradient of the mean loss, sum of the losses, sum of the weights) of a batch.

        A batch without any weight has the gradient 0.
        """
        (sum_, weight), grads = jax.value_and_grad(lambda p: self.loss_sum(p, batch), has_aux=True)(
            params
        )
        scale = 1.0 / jnp.maximum(weight, 1e-12)
        return jax.tree.map(lambda g: g * scale, grads), sum_, weight
