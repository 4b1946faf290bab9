"""The network that the deep click models share: linear layers with rectifiers, one output."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from flax import nnx


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
