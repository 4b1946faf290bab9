"""The Flax layer that looks rows up: an ordinary layer by itself, a sharded table in a step.

On its own `Embed` holds all rows in a variable and works like `nnx.Embed`. `ps.compile`
takes that variable away and lends the layer the rows of each step instead, so that the same
model trains with tables of any size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from typing_extensions import override

from shardpar.capture._compat import trace_state
from shardpar.errors import CaptureError
from shardpar.ps.initializers import Initializer, Normal
from shardpar.ps.optimizers import AdaGrad, RowOptimizer
from shardpar.ps.table import Table

Bag = Literal["none", "sum", "mean"]


class TableRows(nnx.Variable):
    """All rows of a table, where a model stands by itself."""


class TableKey(nnx.Variable):
    """From which a table's rows begin; the data of a jax.random key."""


class Lender(Protocol):
    """What stands in for a table while a step is traced."""

    def lookup(self, layer: Embed, ids: jax.Array) -> jax.Array:
        """The rows of ids int[...], as [..., dim]; zeros for negative ids."""
        ...


class Embed(nnx.Module):
    """Rows of a table by id, or sums of them by bag.

    Args:
      rows, dim: of the table.
      bag: "none" gives [..., dim] for ids [...]; "sum" and "mean" reduce the last dim of
        ids. The mean is weighted, where there are weights. Negative ids are padding and
        count for nothing.
      optimizer, init: how rows learn and begin; None takes AdaGrad() and Normal().
      rngs: as for any Flax layer.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> embed = Embed(10, 4, bag="sum", rngs=nnx.Rngs(0))
      >>> embed(jnp.array([[1, 2, -1], [3, -1, -1]])).shape
      (2, 4)
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        *,
        rngs: nnx.Rngs,
        bag: Bag = "none",
        optimizer: RowOptimizer | None = None,
        init: Initializer | None = None,
    ) -> None:
        if bag not in ("none", "sum", "mean"):
            raise ValueError(f"bag is 'none', 'sum' or 'mean', not {bag!r}")
        init = init or Normal()
        self.table = Table(rows, dim, optimizer or AdaGrad(), init)
        self.has_own_rule = optimizer is not None
        self.bag = bag
        key = rngs.params()
        self.key = TableKey(jax.random.key_data(key))
        self.rows = TableRows(init(key, jnp.arange(rows), dim))
        self.lender: Any = None

    def __call__(self, ids: jax.Array, weights: jax.Array | None = None) -> jax.Array:
        """Looks up.

        Args:
          ids: int[...], or int[..., slots] for a bag.
          weights: float, shaped as ids.

        Returns:
          float[..., dim].
        """
        if self.lender is None:
            found = jnp.take(self.rows[...], jnp.maximum(ids, 0), axis=0)
            found = jnp.where((ids >= 0)[..., None], found, 0)
        else:
            found = self.lender.lookup(self, ids)
        if weights is not None:
            found = found * weights[..., None]
        if self.bag == "none":
            return found
        total = found.sum(axis=-2)
        if self.bag == "sum":
            return total
        there = (ids >= 0).astype(found.dtype)
        count = (there if weights is None else there * weights).sum(axis=-1, keepdims=True)
        return total / jnp.where(count == 0, 1, count)


@dataclass
class Recorder(Lender):
    """Lends zeros, and writes down who asked for which ids.

    Attributes:
      asked: (which layer, ids) of each lookup.
      layers: in order.
      trace: what is being traced when it is made; lookups in an inner trace are refused.
    """

    asked: list[tuple[int, jax.Array]] = field(default_factory=list)
    layers: list[Embed] = field(default_factory=list)
    trace: Any = field(default_factory=trace_state)

    @override
    def lookup(self, layer: Embed, ids: jax.Array) -> jax.Array:
        if trace_state() != self.trace:
            raise CaptureError(
                "an Embed layer is called inside a part of the program that is traced by itself "
                "(scan, cond, while, vmap, jit, remat), so its ids cannot be seen from outside; "
                "call it before, and hand its output in"
            )
        self.asked.append((self.layers.index(layer), ids))
        return jnp.zeros((*ids.shape, layer.table.dim), jnp.float32)


@dataclass
class PulledRows(Lender):
    """Lends the rows of a step, in the order in which they were asked for.

    Attributes:
      pulled: float[u, dim] of each table.
      positions: of each call, where its lookups are in `pulled`; padding is at a row of zeros.
    """

    pulled: tuple[jax.Array, ...]
    positions: Iterator[tuple[int, jax.Array]]

    @override
    def lookup(self, layer: Embed, ids: jax.Array) -> jax.Array:
        table, positions = next(self.positions)
        return self.pulled[table].at[positions].get(mode="promise_in_bounds")


def tables_of(model: nnx.Module) -> list[tuple[str, Embed]]:
    """The model's `Embed` layers, each once, with their paths."""
    found = []
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Embed):
            found.append((".".join(str(part) for part in path) or "table", node))
    return sorted(found, key=lambda item: item[0])
