"""Attention over a split sequence: what is gathered or exchanged at each product, and gathers.

Keys and values are gathered for the queries of each device (LLaMA 3, arXiv 2407.21783), or
sequences become heads by an all-to-all before the products and sequences again after them
(DeepSpeed-Ulysses, arXiv 2309.14509).
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding

from shardpar.capture.attention import Place, operand_dims, result_dims
from shardpar.lowering.shardings import constrain, partly_sharding
from shardpar.spec.graph import LayerClass
from shardpar.spec.plan import LayerStrategy, Stage


class _Placed(Protocol):
    """Where a stage runs."""

    @property
    def mesh(self) -> Mesh: ...

    @property
    def stage(self) -> Stage: ...


def over_context(cls: LayerClass, strategy: LayerStrategy, where: _Placed) -> Place:
    """What to do with the products of a layer whose sequence is split over `strategy.context`."""
    assert cls.products is not None
    products, mesh = cls.products, where.mesh
    batch, context = strategy.batch_axes(where.stage.mesh), strategy.context
    heads = (*strategy.tensor, *context)

    def lay(x: Any, **dims: Any) -> Any:
        return partly_sharding(mesh, x.ndim, {d: a for d, a in dims.values() if d is not None})

    def place(number: int, eqn: Any, values: list[Any], done: bool) -> list[Any]:
        product = products[number]
        if product.keys is None:
            return values
        if done:
            at_batch, at_heads, at_queries = result_dims(product, eqn)
            if strategy.attention == "gather" or product.scores:
                return values
            return [over(values[0], at_batch, at_heads, at_queries, to_heads=False)]
        side = 0 if product.keys == "left" else 1
        out = list(values)
        for i, (at_batch, at_heads) in enumerate(operand_dims(product, eqn)):
            dim = product.key_dim if i == side else product.query_dim
            if strategy.attention == "heads":
                if product.scores or i == side:
                    out[i] = over(values[i], at_batch, at_heads, dim, to_heads=True)
            elif i == side:
                whole, split = (
                    lay(values[i], batch=(at_batch, batch), sequence=(dim, axes))
                    for axes in ((), context)
                )
                out[i] = gather(values[i], whole, split)
            else:
                split = lay(values[i], batch=(at_batch, batch), sequence=(dim, context))
                out[i] = constrain(values[i], split)
        return out

    def over(
        x: Any, at_batch: int, at_heads: int | None, at_sequence: int, *, to_heads: bool
    ) -> Any:
        """From split sequences to split heads, or back.

        Both are said, so that XLA moves this array there and does not rather split the
        products before it in the other way.
        """
        for over_heads in (not to_heads, to_heads):
            own = heads if over_heads else strategy.tensor
            along = () if over_heads else context
            there = lay(
                x, batch=(at_batch, batch), heads=(at_heads, own), sequence=(at_sequence, along)
            )
            x = constrain(x, there)
        return x

    return place


def gather(
    x: Any, gathered: NamedSharding | None, stored: NamedSharding, *, barrier: bool = False
) -> Any:
    """A value in the layout it is computed with; its gradient goes back to the stored one at once.

    The transpose of a plain constraint would ask for the whole gradient on every
    device first: an all-reduce where a reduce-scatter does.

    Args:
      x: the value.
      gathered: its layout inside the layer; None leaves x alone.
      stored: its layout outside.
      barrier: pass the gradient through the gathered layout first. XLA carries
        layouts backwards through a sum, so a split gradient at the border would
        otherwise split the work inside, and weights would be gathered for it.
    """
    if gathered is None or gathered.spec == stored.spec:
        return x

    @jax.custom_vjp
    def collect(x: jax.Array) -> jax.Array:
        return constrain(x, gathered)

    def give_back(_: None, g: jax.Array) -> tuple[jax.Array]:
        return (constrain(constrain(g, gathered) if barrier else g, stored),)

    collect.defvjp(lambda x: (collect(x), None), give_back)
    return collect(x)
