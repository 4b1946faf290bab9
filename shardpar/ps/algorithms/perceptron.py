"""What the deep click models share: a network of rectified layers over a factor row per field."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from shardpar import ps


class Perceptron(nnx.Module):
    """From [batch, width] to scores [batch]."""

    def __init__(self, width: int, hidden: Sequence[int], dropout: float, rngs: nnx.Rngs):
        widths = [width, *hidden]
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.out = nnx.Linear(widths[-1], 1, rngs=rngs)

    def __call__(self, x):
        """Scores [batch]."""
        for layer in self.layers:
            x = nnx.relu(layer(x))
            if self.dropout is not None:
                x = self.dropout(x)
        return self.out(x)[:, 0]


def require_fields(fields: int, slots: int) -> None:
    """Refuses samples with another number of features than the network was made for.

    Raises:
      ValueError: naming both.
    """
    if slots != fields:
        raise ValueError(
            f"model.fields is {fields}, but a sample has {slots} features, one per field; write "
            f"model.fields={slots}"
        )


def require_dense(dense, batch):
    """Refuses data with another number of dense columns than the model was made for.

    Raises:
      ValueError: naming both.
    """
    there = batch["dense"].shape[1] if "dense" in batch else 0
    if there != dense:
        hint = f"write model.dense={there}"
        if not there:
            hint += ", or name the columns in data.numeric"
        raise ValueError(f"model.dense is {dense}, but the data have {there} dense columns; {hint}")


class WeightsAndNetwork(nnx.Module):
    """A weight and factors for each id, and a network over the factors of all fields.

    Args:
      options: with `rows`, `fields`, `dense`, `factors`, `hidden`, `dropout` and `init_std`.
      rngs: as for any Flax layer.
    """

    def __init__(self, options, rngs: nnx.Rngs):
        self.options = options
        begin = ps.Columns(((ps.Zeros(), 1), (ps.Normal(options.init_std), options.factors)))
        self.features = ps.Embed(options.rows, 1 + options.factors, init=begin, rngs=rngs)
        width = options.fields * options.factors + options.dense
        self.network = Perceptron(width, options.hidden, options.dropout, rngs)
        self.bias = nnx.Param(jnp.zeros(()))

    def parts(self, batch):
        """Each feature's row times its value [batch, fields, 1 + factors]; the deep score."""
        require_fields(self.options.fields, batch["ids"].shape[1])
        require_dense(self.options.dense, batch)
        scaled = self.features(batch["ids"], batch["values"])
        flat = scaled[..., 1:].reshape(scaled.shape[0], -1)
        if self.options.dense:
            flat = jnp.concatenate([flat, batch["dense"]], axis=1)
        return scaled, self.bias[...] + self.network(flat)
