"""Which values of a program tensor parallelism splits, found by following split dims through it.

A value is split where a dim of it comes from a dim of a weight that tensor axes split,
as in Megatron (arXiv 1909.08053): heads and hidden units are, the stream between layers
and what is computed from it alone are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shardpar.capture._compat import inner_jaxpr, is_literal

Dims = frozenset[int]
_NONE: Dims = frozenset()


def split_dims(jaxpr: Any, given: Sequence[Dims]) -> dict[Any, Dims]:
    """The split dims of every variable of a jaxpr, calls inside it followed.

    Args:
      jaxpr: not closed.
      given: per input, the dims that tensor axes split.
    """
    found: dict[Any, Dims] = dict(zip(jaxpr.invars, given, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [_NONE if is_literal(v) else found.get(v, _NONE) for v in eqn.invars]
        for var, dims in zip(eqn.outvars, _through(eqn, inputs), strict=True):
            found[var] = dims
    return found


def _through(eqn: Any, inputs: list[Dims]) -> list[Dims]:
    inner = inner_jaxpr(eqn)
    if inner is not None and len(inner.invars) == len(inputs):
        known = split_dims(inner, inputs)
        return [_NONE if is_literal(v) else known.get(v, _NONE) for v in inner.outvars]
    rule = _RULES.get(eqn.primitive.name, _elementwise)
    return [rule(eqn, inputs, var.aval.shape) for var in eqn.outvars]


def _elementwise(eqn: Any, inputs: list[Dims], shape: tuple[int, ...]) -> Dims:
    out: Dims = _NONE
    for var, dims in zip(eqn.invars, inputs, strict=True):
        if tuple(var.aval.shape) == tuple(shape):
            out |= dims
    return out


def _dot(eqn: Any, inputs: list[Dims], _shape: tuple[int, ...]) -> Dims:
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = (len(v.aval.shape) for v in eqn.invars)
    free_left = [d for d in range(left) if d not in (*left_sum, *left_batch)]
    free_right = [d for d in range(right) if d not in (*right_sum, *right_batch)]
    batches = zip(left_batch, right_batch, strict=True)
    sources = [
        *(a in inputs[0] or b in inputs[1] for a, b in batches),
        *(d in inputs[0] for d in free_left),
        *(d in inputs[1] for d in free_right),
    ]  # fmt: skip
    return frozenset(i for i, split in enumerate(sources) if split)


def _transpose(eqn: Any, inputs: list[Dims], _shape: tuple[int, ...]) -> Dims:
    return frozenset(i for i, d in enumerate(eqn.params["permutation"]) if d in inputs[0])


def _broadcast(eqn: Any, inputs: list[Dims], shape: tuple[int, ...]) -> Dims:
    places = eqn.params["broadcast_dimensions"]
    before = eqn.invars[0].aval.shape
    return frozenset(
        place for d, place in enumerate(places) if d in inputs[0] and before[d] == shape[place]
    )


def _reshape(eqn: Any, inputs: list[Dims], shape: tuple[int, ...]) -> Dims:
    before = eqn.invars[0].aval.shape
    out = set()
    for d in inputs[0]:
        outer = math.prod(before[:d])
        at = 1
        for place, size in enumerate(shape):
            # The dim is the major part of whatever begins where it begins.
            if at == outer and size > 1:
                out.add(place)
                break
            at *= size
    return frozenset(out)


def _removed(dims: Dims, axes: Sequence[int]) -> Dims:
    return frozenset(d - sum(a < d for a in axes) for d in dims if d not in axes)


def _reduce(eqn: Any, inputs: list[Dims], _shape: tuple[int, ...]) -> Dims:
    return _removed(inputs[0], eqn.params["axes"])


def _squeeze(eqn: Any, inputs: list[Dims], _shape: tuple[int, ...]) -> Dims:
    return _removed(inputs[0], eqn.params["dimensions"])


def _kept_sizes(eqn: Any, inputs: list[Dims], shape: tuple[int, ...]) -> Dims:
    before = eqn.invars[0].aval.shape
    if len(before) != len(shape):
        return _NONE
    return frozenset(d for d in inputs[0] if before[d] == shape[d])


def _concatenate(eqn: Any, inputs: list[Dims], _shape: tuple[int, ...]) -> Dims:
    along = eqn.params["dimension"]
    return frozenset(d for dims in inputs for d in dims if d != along)


_RULES: Mapping[str, Any] = {
    "dot_general": _dot, "transpose": _transpose, "broadcast_in_dim": _broadcast,
    "reshape": _reshape, "squeeze": _squeeze, "slice": _kept_sizes, "dynamic_slice": _kept_sizes,
    "pad": _kept_sizes, "split": _kept_sizes, "concatenate": _concatenate,
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin", "reduce_and",
         "reduce_or"), _reduce
    ),
}  # fmt: skip
