"""One layer of each class as functions that can be run: what is timed is what was captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shardpar.capture._compat import as_function
from shardpar.capture.cut import cut
from shardpar.capture.trace import Captured, _pieces
from shardpar.errors import CaptureError


@dataclass(frozen=True, eq=False)
class LayerProgram:
    """One layer of a class, for a batch.

    Attributes:
      class_name: as in the layer graph.
      forward: of the arguments, as one tuple.
      forward_backward: of the arguments and the gradients of its float results; gives
        results and the gradients of all float arguments.
      shapes: of the arguments: parameters and activations.
      index_limit: whole numbers among the arguments stay below it.
    """

    class_name: str
    forward: Callable[[Any], Any]
    forward_backward: Callable[[Any, Any], Any]
    shapes: tuple[Any, ...]
    index_limit: int

    def arguments(self, seed: int) -> tuple[Any, ...]:
        """Arguments to run it with: random floats, and indices that exist."""
        return _filled(self.shapes, self.index_limit, seed)

    def cotangents(self, seed: int) -> tuple[Any, ...]:
        """Gradients of its float results."""
        out = jax.eval_shape(self.forward, self.shapes)
        floats = tuple(x for x in out if jnp.issubdtype(x.dtype, jnp.inexact))
        return _filled(floats, self.index_limit, seed)


def layer_programs(
    captured: Captured, batch: int, length: int | None = None
) -> tuple[LayerProgram, ...]:
    """The first layer of each class, for another batch size and sequence length.

    Args:
      captured: the model.
      batch: sequences.
      length: dim 1 of the batch's arrays; None leaves it.

    Returns:
      One program for each class, in the graph's order.

    Raises:
      CaptureError: the model cannot be traced with this batch or length, or other
        layers come of it.
    """
    shapes = {}
    for name, leaf in captured.batch.items():
        shape = (batch, *leaf.shape[1:])
        if length is not None and len(shape) > 1:
            shape = (batch, length, *shape[2:])
        shapes[name] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    graph, model = captured.graph, captured.model
    program = cut(model, captured.loss, shapes, compute_dtype=graph.compute_dtype)
    pieces = _pieces(program, model)
    if [piece.name for piece in pieces] != [layer.name for layer in graph.layers]:
        raise CaptureError(
            f"with batch {batch} and length {length} the model has other layers than with its own; "
            "its structure must not depend on the batch's shape"
        )
    limit = _index_limit(captured)
    first: dict[str, LayerProgram] = {}
    for piece, layer in zip(pieces, graph.layers, strict=True):
        if layer.class_name not in first:
            first[layer.class_name] = _program(layer.class_name, piece.closed, limit)
    return tuple(first[cls.name] for cls in graph.classes)


def _program(class_name: str, closed: Any, index_limit: int) -> LayerProgram:
    function = as_function(closed)
    shapes = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars)
    floats = [i for i, a in enumerate(shapes) if jnp.issubdtype(a.dtype, jnp.floating)]

    def forward(arguments: Any) -> Any:
        return function(*arguments)

    def forward_backward(arguments: Any, cotangents: Any) -> Any:
        def of_floats(*values: Any) -> Any:
            full = list(arguments)
            for i, value in zip(floats, values, strict=True):
                full[i] = value
            return tuple(
                y for y in function(*full) if jnp.issubdtype(jnp.result_type(y), jnp.inexact)
            )

        out, pullback = jax.vjp(of_floats, *[arguments[i] for i in floats])
        return out, pullback(cotangents)

    return LayerProgram(class_name, forward, forward_backward, shapes, index_limit)


def _index_limit(captured: Captured) -> int:
    """The size of the vocabulary, or else of the smallest table that an index may be for.

    Indices that repeat more than those of real data are slow to add up on GPUs, and
    ones that are out of range read nothing.
    """
    model = captured.model
    vocabularies = [
        size
        for name, leaf in model.params.items()
        for dim, size in zip(model.dims[name], leaf.shape, strict=True)
        if dim == "vocab"
    ]
    tables = [leaf.shape[0] for leaf in model.params.values() if len(leaf.shape) == 2]
    return min(vocabularies or tables or [2])


def _filled(shapes: tuple[Any, ...], index_limit: int, seed: int) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(seed), max(1, len(shapes)))
    return tuple(_array(shape, key, index_limit) for shape, key in zip(shapes, keys, strict=False))


def _array(shape: Any, key: Any, index_limit: int) -> Any:
    dtype = shape.dtype
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.split(key, shape.shape)
    if jnp.issubdtype(dtype, jnp.floating):
        # As small as initialised weights: sums of many stay finite in any dtype.
        return (0.02 * jax.random.normal(key, shape.shape)).astype(dtype)
    if jnp.issubdtype(dtype, jnp.signedinteger):
        high = min(index_limit, jnp.iinfo(dtype).max)
        return jax.random.randint(key, shape.shape, 0, high).astype(dtype)
    return jnp.zeros(shape.shape, dtype)
