"""Whether an optimizer updates each parameter from that parameter alone.

Stages update their own parameters on their own devices. An optimizer whose rule for one
parameter reads the gradient of another (a global norm, say) would be wrong there.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from shardpar.capture._compat import inner_jaxpr, is_literal, levels
from shardpar.errors import PlanError
from shardpar.lowering.state import named_by


def require_separable(optimizer: optax.GradientTransformation, params: Mapping[str, Any]) -> None:
    """Refuses an optimizer that couples parameters.

    Args:
      optimizer: any optax transformation.
      params: the shape of each parameter, by name.

    Raises:
      PlanError: naming two parameters that it couples.

    >>> shapes = {n: jax.ShapeDtypeStruct((2,), "float32") for n in ("a", "b")}
    >>> require_separable(optax.adamw(1e-3), shapes)
    >>> require_separable(optax.clip_by_global_norm(1.0), shapes)
    Traceback (most recent call last):
    ...
    shardpar.errors.PlanError: the optimizer's update of parameter "a" reads what belongs to \
parameter "b", so stages cannot update their parameters each on its own devices; to clip by the \
global norm use the program's gradient_clip instead of optax.clip_by_global_norm, or train with \
a plan of one stage
    """
    names = list(params)
    bit = {name: 1 << n for n, name in enumerate(names)}
    state = jax.eval_shape(optimizer.init, dict(params))
    args = (dict(params), state, dict(params))
    closed = jax.make_jaxpr(optimizer.update)(*args)
    given = [bit.get(named_by(path, bit), 0) for path, _ in _leaves(args)]
    found = levels(closed, given, operator.or_)
    outputs = _leaves(jax.eval_shape(optimizer.update, *args))
    for (path, _), v in zip(outputs, closed.jaxpr.outvars, strict=True):
        own = named_by(path, bit)
        others = 0 if is_literal(v) else found[v] & ~bit.get(own, 0)
        if others:
            other = names[others.bit_length() - 1]
            what = f'update of parameter "{own}"' if own else f"state {jax.tree_util.keystr(path)}"
            raise PlanError(
                f'the optimizer\'s {what} reads what belongs to parameter "{other}", so stages '
                "cannot update their parameters each on its own devices; to clip by the global "
                "norm use the program's gradient_clip instead of optax.clip_by_global_norm, or "
                "train with a plan of one stage"
            )


_NAMES = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag
integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or pow real
reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical
sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
_ELEMENT_BY_ELEMENT = frozenset(_NAMES.split())
"""Primitives whose results have in each place what comes of their operands in that place."""

_UNIFORM, _IN_PLACE, _OTHER = range(3)
"""What a value is: the same everywhere; in each place made of the parameter's place; neither."""


def require_elementwise(optimizer: optax.GradientTransformation, params: Mapping[str, Any]) -> None:
    """Refuses an optimizer whose rule for an element of a parameter reads other elements.

    Where groups of devices share a parameter's optimizer state out, each updates a slice alone.

    Args:
      optimizer: updates each parameter from itself alone.
      params: the shape of each parameter, by name.

    Raises:
      PlanError: naming the operation.

    >>> shapes = {"a": jax.ShapeDtypeStruct((2, 2), "float32")}
    >>> require_elementwise(optax.adamw(1e-3), shapes)
    >>> require_elementwise(optax.lamb(1e-3), shapes)
    Traceback (most recent call last):
    ...
    shardpar.errors.PlanError: the plan says zero: pipelines, which updates each parameter slice \
by slice, but the optimizer's rule for one element reads others (by "reduce_sum"); write a rule \
that works element by element, such as adamw, or leave zero out of the plan
    """
    state = jax.eval_shape(optimizer.init, dict(params))
    for function, args in (
        (optimizer.init, (dict(params),)),
        (optimizer.update, (dict(params), state, dict(params))),
    ):
        leaves = _leaves(args)
        given = [
            _IN_PLACE if named_by(path, params) and leaf.shape else _UNIFORM
            for path, leaf in leaves
        ]
        for path, leaf in leaves:
            name = named_by(path, params)
            if name and leaf.shape and leaf.shape != params[name].shape:
                raise _reads_others(f"state of shape {list(leaf.shape)}")
        closed = jax.make_jaxpr(function)(*args)
        _require_in_place(closed.jaxpr, given)


def is_elementwise(optimizer: optax.GradientTransformation, params: Mapping[str, Any]) -> bool:
    """Whether a parameter may be updated slice by slice."""
    try:
        require_elementwise(optimizer, params)
    except PlanError:
        return False
    return True


def _require_in_place(jaxpr: Any, given: Sequence[int]) -> list[int]:
    """What the outputs of a program are, when its inputs are so."""
    found: dict[Any, int] = {}

    def of(v: Any) -> int:
        if is_literal(v):
            return _OTHER if v.aval.shape else _UNIFORM
        return found[v]

    found.update((v, _OTHER if v.aval.shape else _UNIFORM) for v in jaxpr.constvars)
    found.update(zip(jaxpr.invars, given, strict=True))
    for eqn in jaxpr.eqns:
        kinds = [of(v) for v in eqn.invars]
        inner = inner_jaxpr(eqn)
        if inner is not None:
            outs = _require_in_place(inner, kinds)
        else:
            outs = [_kind_of(eqn, kinds)] * len(eqn.outvars)
        found.update(zip(eqn.outvars, outs, strict=True))
    return [of(v) for v in jaxpr.outvars]


def _kind_of(eqn: Any, kinds: Sequence[int]) -> int:
    name = eqn.primitive.name
    alike = name in _ELEMENT_BY_ELEMENT or (
        name == "broadcast_in_dim"
        and eqn.invars[0].aval.shape in ((), eqn.outvars[0].aval.shape)
    )  # fmt: skip
    most = max(kinds, default=_UNIFORM)
    if _IN_PLACE in kinds and not (alike and most == _IN_PLACE):
        raise _reads_others(f'by "{name}"')
    if alike:
        return most
    return _OTHER if any(v.aval.shape for v in eqn.outvars) else _UNIFORM


def _reads_others(how: str) -> PlanError:
    return PlanError(
        "the plan says zero: pipelines, which updates each parameter slice by slice, but the "
        f"optimizer's rule for one element reads others ({how}); write a rule that works element "
        "by element, such as adamw, or leave zero out of the plan"
    )


def require_alike(
    optimizer: optax.GradientTransformation, params: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Refuses an optimizer that has different rules for parameters that are updated as one.

    Args:
      optimizer: any optax transformation that updates each parameter from itself alone.
      params: the shape of each parameter, by name.
      names: those that one program updates in all their places.

    Raises:
      PlanError: naming two parameters that it treats differently.

    >>> shapes = {n: jax.ShapeDtypeStruct((2,), "float32") for n in ("a", "b")}
    >>> require_alike(optax.adamw(1e-3), shapes, ["a", "b"])
    >>> rule = {"one": optax.sgd(0.1), "two": optax.sgd(0.2)}
    >>> by_name = optax.multi_transform(
    ...     rule, lambda params: {n: "one" if n == "a" else "two" for n in params}
    ... )
    >>> require_alike(by_name, shapes, ["a", "b"])
    Traceback (most recent call last):
    ...
    shardpar.errors.PlanError: the optimizer treats parameters "a" and "b" differently, and \
schedule single_jit updates them in one program; write schedule: 1f1b
    """
    rules = [_rule(optimizer, name, params[name]) for name in names]
    for name, rule in zip(names, rules, strict=True):
        if rule != rules[0]:
            raise PlanError(
                f'the optimizer treats parameters "{names[0]}" and "{name}" differently, and '
                "schedule single_jit updates them in one program; write schedule: 1f1b"
            )


def _rule(optimizer: optax.GradientTransformation, name: str, shape: Any) -> list[Any]:
    """What an optimizer does with a parameter, as text and constants."""

    def init(x: Any) -> Any:
        return jax.tree.leaves(optimizer.init({name: x}))

    def update(x: Any) -> Any:
        given = {name: x}
        return jax.tree.leaves(optimizer.update(given, optimizer.init(given), given))

    out: list[Any] = []
    for closed in (jax.make_jaxpr(init)(shape), jax.make_jaxpr(update)(shape)):
        out.append(str(closed.jaxpr))
        out += [np.asarray(value).tolist() for value in closed.consts]
    return out


def _leaves(tree: Any) -> Any:
    return jax.tree_util.tree_flatten_with_path(tree)[0]
