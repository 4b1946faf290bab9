"""Turns a model, its loss and a batch's shape into a `LayerGraph`, with costs from XLA.

Nothing is allocated: the model is traced abstractly, and one block of each class
is compiled for this machine's CPU only to ask XLA for its FLOPs, bytes and scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardpar.capture._compat import (
    is_dropped,
    is_literal,
    matmul_flops,
    subjaxpr,
)
from shardpar.capture.attention import products_of
from shardpar.capture.costs import price
from shardpar.capture.cut import CutProgram, LayerCall, cut
from shardpar.capture.layers import marked_class
from shardpar.capture.model import AbstractModel, Init, Loss, abstract_model
from shardpar.errors import CaptureError
from shardpar.spec.graph import OUTSIDE, Activation, Layer, LayerClass, LayerGraph, Parameter


@dataclass(frozen=True, eq=False)
class Captured:
    """A captured model: what the planner reads, and what lowering traces again.

    Attributes:
      graph: the value the planner works on.
      model: parameters and structure.
      loss: the user's loss.
      batch: ShapeDtypeStructs of the batch the graph's costs are for.
      warnings: what could not be captured well, in words.
      unread: arrays of the batch that have no bearing on the loss.
    """

    graph: LayerGraph
    model: AbstractModel
    loss: Loss
    batch: dict[str, Any]
    warnings: tuple[str, ...]
    unread: tuple[str, ...] = ()


def trace(
    loss: Loss,
    init: Init,
    batch: Mapping[str, Any],
    *,
    compute_dtype: str = "float32",
    causal: bool = False,
    notify: Callable[[str], None] = lambda _: None,
    device: Any = None,
) -> Captured:
    """Captures a model as a graph of layers.

    Args:
      loss: `loss(model, batch)` returns a scalar mean, or (sum, weight).
      init: `init(rngs)` makes the Flax nnx model.
      batch: shapes of one batch (arrays or `jax.ShapeDtypeStruct`), dim 0 counting sequences.
      compute_dtype: float dtype inside the model.
      causal: attention is masked above the diagonal; halves its FLOPs in the MFU.
      notify: told each class before it is compiled, for a progress line.
      device: whose compiler is asked for the scratch of each layer, present or
        described (`lowering.target`); None leaves it at what this CPU's says of one layer.

    Returns:
      The graph, with what lowering needs to trace the model again.

    Raises:
      CaptureError: if the model or the loss cannot be traced.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import shardpar
      >>> @shardpar.layer
      ... class Double(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.linear = nnx.Linear(4, 4, rngs=rngs)
      ...     def __call__(self, x):
      ...         return nnx.relu(self.linear(x))
      >>> captured = trace(
      ...     lambda model, batch: jnp.mean(model(batch["x"]) ** 2),
      ...     lambda rngs: nnx.Sequential(Double(rngs), Double(rngs)),
      ...     {"x": jax.ShapeDtypeStruct((8, 4), jnp.float32)},
      ... )
      >>> [(layer.name, layer.class_name) for layer in captured.graph.layers]
      [('layers[0]', 'Double'), ('layers[1]', 'Double'), ('outside', 'outside')]
    """
    shapes = {k: jax.ShapeDtypeStruct(jnp.shape(v), v.dtype) for k, v in batch.items()}
    model = abstract_model(init)
    program = cut(model, loss, shapes, compute_dtype=compute_dtype)
    grown = _cut_with(model, loss, shapes, compute_dtype, dim=0)
    longer = _cut_with(model, loss, shapes, compute_dtype, dim=1)
    pieces = _pieces(program, model)
    batch_size = next(iter(shapes.values())).shape[0]
    # One sequence stands for all when a target's compiler is asked: a batch may be too much for it.
    smalls = _small_pieces(model, loss, shapes, compute_dtype, pieces) if device else None
    twins = [None if other is None else _pieces(other, model) for other in (grown, longer)]
    classes: dict[Any, LayerClass] = {}
    texts: dict[int, Any] = {}
    counts: dict[str, int] = {}
    layers = []
    for position, piece in enumerate(pieces):
        fingerprint = (piece.class_name, _fingerprint(piece, model, texts))
        if fingerprint not in classes:
            counts[piece.class_name] = counts.get(piece.class_name, 0) + 1
            number = counts[piece.class_name]
            name = piece.class_name + (f"#{number}" if number > 1 else "")
            notify(name)
            classes[fingerprint] = _price(
                name, piece, [t[position] if t and len(t) == len(pieces) else None for t in twins],
                model, device, smalls[position] if smalls else None, float(batch_size),
            )  # fmt: skip
        layers.append(
            Layer(
                piece.name, piece.path, classes[fingerprint].name, tuple(sorted(piece.tied.items()))
            )
        )
    warnings = [
        f"layers of class {name} are inside a loop or remat (nnx.scan, jax.lax.scan, nnx.remat or "
        "similar) and cannot be cut apart; write the loop in Python and leave recompute to the "
        "plan, shardpar rolls it up again"
        for name in program.hidden_layers
    ]
    if not program.calls and not program.hidden_layers:
        warnings.append("no class is marked with @shardpar.layer: the whole model is one layer")
    if grown is None:
        warnings.append(
            "the loss cannot be traced with another batch size; activations' batch dims are "
            "unknown and their layouts are left to XLA"
        )
    graph = LayerGraph(
        model=_model_name(init, model),
        batch=batch_size,
        tokens=_tokens(shapes),
        compute_dtype=compute_dtype,
        classes=tuple(classes.values()),
        layers=tuple(layers),
        causal=causal,
    )
    return Captured(graph, model, loss, shapes, tuple(warnings), _unread(program))


def _unread(program: CutProgram) -> tuple[str, ...]:
    jaxpr = program.closed.jaxpr
    read = {v for eqn in jaxpr.eqns for v in eqn.invars if not is_literal(v)} | {
        v for v in jaxpr.outvars if not is_literal(v)
    }
    return tuple(
        name
        for v, (kind, name) in zip(jaxpr.invars, program.inputs, strict=True)
        if kind == "batch" and v not in read
    )


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some equations with a name: a layer, or what lies outside all of them."""

    name: str
    path: str
    class_name: str
    closed: Any
    parameters: tuple[str | None, ...]
    own: tuple[str, ...]
    tied: dict[str, str]


def _pieces(program: CutProgram, model: AbstractModel) -> list[_Piece]:
    owner: dict[str, str] = {}
    pieces = []
    for call in program.calls:
        new = {n for n in call.parameters if n is not None and n not in owner}
        owner.update(dict.fromkeys(new, call.name))
        prefix = f"{call.path}." if call.path else ""
        # A layer owns what it reads first; another's path under its own name stays another's.
        tied = {n.replace(".", "_"): n for n in call.parameters if n is not None and n not in new}
        own = tuple(sorted(new))
        if not all(n.startswith(prefix) for n in own):
            prefix = ""
        pieces.append(
            _Piece(call.name, prefix.rstrip("."), call.class_name, call.jaxpr,
                   call.parameters, own, tied)
        )  # fmt: skip
    outside = _outside(program, owner, model)
    return [*pieces, outside] if outside else pieces


def _outside(program: CutProgram, owner: dict[str, str], model: AbstractModel) -> _Piece | None:
    jaxpr = program.closed.jaxpr
    source = {
        v: name for v, (kind, name) in zip(jaxpr.invars, program.inputs, strict=True)
        if kind == "params"
    }  # fmt: skip
    eqns = [eqn for eqn in jaxpr.eqns if marked_class(eqn) is None]
    unowned = tuple(name for name in model.params if name not in owner)
    if not eqns and not unowned:
        return None
    made = {v for eqn in eqns for v in eqn.outvars}
    reads = dict.fromkeys(v for eqn in eqns for v in eqn.invars if not is_literal(v))
    invars = [v for v in reads if v not in made]
    needed = {v for v in jaxpr.outvars if not is_literal(v)} | {
        v for eqn in jaxpr.eqns if marked_class(eqn) for v in eqn.invars if not is_literal(v)
    }
    outvars = [v for eqn in eqns for v in eqn.outvars if v in needed and not is_dropped(v)]
    parameters = tuple(source.get(v) for v in invars)
    tied = {n.replace(".", "_"): n for n in parameters if n is not None and n in owner}
    return _Piece(
        OUTSIDE, "", OUTSIDE, subjaxpr(program.closed, eqns, invars, outvars), parameters,
        unowned, tied,
    )  # fmt: skip


def _small_pieces(
    model: AbstractModel, loss: Loss, shapes: Mapping[str, Any], dtype: str, pieces: list[_Piece]
) -> list[tuple[Any, Any]] | None:
    """Each piece for one sequence and for two; None where the loss cannot be traced so."""
    programs = [_cut_with(model, loss, shapes, dtype, dim=0, size=size) for size in (1, 2)]
    found = [_pieces(program, model) for program in programs if program is not None]
    if len(found) < 2 or any(len(other) != len(pieces) for other in found):
        return None
    return [(one.closed, two.closed) for one, two in zip(*found, strict=True)]


def _fingerprint(piece: _Piece, model: AbstractModel, texts: dict[int, Any]) -> Any:
    key = id(piece.closed)
    if key not in texts:
        consts = tuple(np.asarray(c).tobytes() for c in piece.closed.consts)
        texts[key] = (str(piece.closed.jaxpr), consts)
    prefix = len(piece.path) + 1 if piece.path else 0
    own = tuple((name[prefix:], model.dims[name]) for name in piece.own)
    return texts[key], own, tuple(piece.tied)


def _price(
    name: str,
    piece: _Piece,
    twins: list[_Piece | None],
    model: AbstractModel,
    device: Any,
    small: tuple[Any, Any] | None,
    scale: float,
) -> LayerClass:
    inputs = [v.aval for v in piece.closed.jaxpr.invars]
    outputs = [v.aval for v in piece.closed.jaxpr.outvars]
    is_parameter = [n is not None for n in piece.parameters]
    activations_in = [
        activation
        for i, (aval, param) in enumerate(zip(inputs, is_parameter, strict=True))
        if not param
        for activation in [_activation(aval, i, twins, "invars")]
        if activation is not None
    ]
    activations_out = [
        activation
        for i, aval in enumerate(outputs)
        for activation in [_activation(aval, i, twins, "outvars")]
        if activation is not None
    ]
    costs = price(piece.closed, piece.parameters, model.dims, device, small, scale)
    prefix = len(piece.path) + 1 if piece.path else 0
    products, attention = matmul_flops(piece.closed.jaxpr)
    return LayerClass(
        name=name,
        parameters=tuple(_parameter(n[prefix:], n, model) for n in piece.own),
        tied=tuple(_parameter(short, full, model) for short, full in sorted(piece.tied.items())),
        inputs=tuple(activations_in),
        outputs=tuple(activations_out),
        forward_flops=costs.forward["flops"],
        backward_flops=max(0.0, costs.both["flops"] - costs.forward["flops"]),
        forward_bytes=costs.forward["bytes accessed"],
        backward_bytes=max(0.0, costs.both["bytes accessed"] - costs.forward["bytes accessed"]),
        saved_bytes=tuple(costs.saved.items()),
        temp_bytes=costs.temp_bytes,
        matmul_flops=products,
        attention_flops=attention,
        whole_bytes=tuple(costs.whole.items()),
        scratch_bytes=tuple(costs.scratch.items()),
        fixed_bytes=tuple(costs.fixed.items()),
        views_bytes=costs.views_bytes,
        products=products_of(piece.closed, *(None if t is None else t.closed for t in twins)),
    )


def _parameter(short: str, full: str, model: AbstractModel) -> Parameter:
    leaf = model.params[full]
    return Parameter(short, tuple(leaf.shape), str(leaf.dtype), model.dims[full])


def _activation(aval: Any, index: int, twins: list[_Piece | None], side: str) -> Activation | None:
    """An activation with the dims that grew in the twin traces; None for keys and the like."""
    if not hasattr(aval, "shape") or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return None
    grew: list[int | None] = []
    for twin in twins:
        dim = None
        if twin is not None:
            others = getattr(twin.closed.jaxpr, side)
            if index < len(others):
                shape = others[index].aval.shape
                if len(shape) == len(aval.shape):
                    dims = [
                        d for d, (a, b) in enumerate(zip(aval.shape, shape, strict=True)) if a != b
                    ]
                    dim = dims[0] if dims else None
        grew.append(dim)
    return Activation(tuple(aval.shape), str(aval.dtype), grew[0], grew[1])


def _cut_with(
    model: AbstractModel,
    loss: Loss,
    shapes: Mapping[str, Any],
    dtype: str,
    dim: int,
    size: int | None = None,
) -> CutProgram | None:
    """The same program for a batch twice as big (dim 0), half as long (dim 1), or of a size."""
    changed = {}
    for name, leaf in shapes.items():
        shape = list(leaf.shape)
        if dim < len(shape):
            shape[dim] = size or (shape[dim] * 2 if dim == 0 else shape[dim] // 2)
        changed[name] = jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
    if any(0 in leaf.shape for leaf in changed.values()):
        return None
    try:
        return cut(model, loss, changed, compute_dtype=dtype)
    except CaptureError:
        return None


def _tokens(shapes: Mapping[str, Any]) -> int:
    sizes = [
        int(np.prod(leaf.shape))
        for leaf in shapes.values()
        if jnp.issubdtype(leaf.dtype, jnp.integer) and len(leaf.shape) > 1
    ]
    return max(sizes, default=next(iter(shapes.values())).shape[0])


def _model_name(init: Init, model: AbstractModel) -> str:
    del init
    root = getattr(model.graphdef, "type", None) or getattr(
        getattr(model.graphdef, "nodes", [None])[0], "type", None
    )
    return getattr(root, "__name__", "model")


__all__ = ["OUTSIDE", "Captured", "LayerCall", "trace"]
