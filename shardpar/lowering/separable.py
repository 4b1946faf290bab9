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

from shardpar.capture._compat import is_literal, levels
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
