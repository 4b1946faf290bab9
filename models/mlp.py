"""A multilayer perceptron that tells classes apart.

Plain Flax, nothing about devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from msgspec import Meta

import shardpar


@dataclass(frozen=True)
class MLPOptions:
    """Size of an MLP. Without hidden layers it is multinomial logistic regression."""

    inputs: Annotated[int, Meta(ge=1)] = 64
    hidden: tuple[Annotated[int, Meta(ge=1)], ...] = (64,)
    classes: Annotated[int, Meta(ge=2)] = 10


@shardpar.layer
class Dense(nnx.Module):
    """A linear map and a bias."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, std: float):
        init = nnx.initializers.normal(std)
        self.weight = nnx.Param(
            init(rngs.params(), (inputs, outputs), jnp.float32), out_sharding=("embed", "mlp")
        )
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32), out_sharding=("mlp",))

    def __call__(self, x):
        return x @ self.weight[...] + self.bias[...]


class MLP(nnx.Module):
    """inputs float32[batch, inputs] -> logits [batch, classes]."""

    def __init__(self, options: MLPOptions, rngs: nnx.Rngs):
        widths = (options.inputs, *options.hidden, options.classes)
        self.layers = nnx.List(
            [
                Dense(widths[i], widths[i + 1], rngs, (2 / widths[i]) ** 0.5)
                for i in range(len(widths) - 1)
            ]
        )

    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def build(options: MLPOptions, rngs: nnx.Rngs) -> MLP:
    return MLP(options, rngs)


def predict(model: MLP, batch: dict[str, jax.Array]) -> jax.Array:
    """Logits [batch, classes]."""
    return model(batch["inputs"])


def loss(model: MLP, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross-entropies of `labels` int[batch] in nats, and how many examples it is over.

    With `weights`, float [batch], examples count by their weight.
    """
    logits = predict(model, batch).astype(jnp.float32)
    labels = batch["labels"].astype(jnp.int32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    if "weights" not in batch:
        return -jnp.sum(picked), jnp.float32(picked.size)
    weights = batch["weights"].astype(jnp.float32)
    return -jnp.sum(weights * picked), jnp.sum(weights)
