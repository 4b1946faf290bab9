"""The only file that touches what jax keeps to itself: jaxprs and the coordination service.

Checked with jax 0.10.2; the project pins the range these names were tested on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import distributed
from jax.extend import core
from jax.interpreters import partial_eval


def as_function(closed: Any) -> Callable[..., list[Any]]:
    """A closed jaxpr as a function of its flat inputs."""
    return core.jaxpr_as_fun(closed)  # type: ignore[no-any-return]


def is_literal(atom: Any) -> bool:
    """Whether an equation's input is a constant written in place."""
    return isinstance(atom, core.Literal)


def is_dropped(var: Any) -> bool:
    """Whether an equation's output is never used."""
    return isinstance(var, core.DropVar)


def run_equation(closed: Any, eqn: Any, read: Callable[[Any], Any]) -> dict[Any, Any]:
    """Runs one equation of a program; returns the values of its outputs by variable."""
    invars = list(dict.fromkeys(v for v in eqn.invars if not is_literal(v)))
    outvars = [v for v in eqn.outvars if not is_dropped(v)]
    values = as_function(subjaxpr(closed, [eqn], invars, outvars))(*map(read, invars))
    return dict(zip(outvars, values, strict=True))


def subjaxpr(
    closed: Any, eqns: Sequence[Any], invars: Sequence[Any], outvars: Sequence[Any]
) -> Any:
    """A closed jaxpr of some equations; the original's constants become inputs where used."""
    # The original's names of arguments and results do not fit the cut's.
    info = closed.jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    jaxpr = closed.jaxpr.replace(
        constvars=[], invars=list(invars), outvars=list(outvars), eqns=list(eqns), debug_info=info
    )
    return core.ClosedJaxpr(jaxpr, [])


def call_jaxpr(eqn: Any) -> Any:
    """The closed jaxpr a jit equation calls."""
    return eqn.params["jaxpr"]


def call_equations(params: Any) -> list[Any]:
    """The equations of what a call primitive with these parameters calls."""
    return [eqn for sub in core.jaxprs_in_params(params) for eqn in sub.eqns]


def contains(closed: Any, test: Callable[[Any], bool]) -> bool:
    """Whether any equation, at any depth, passes a test."""
    for eqn in closed.jaxpr.eqns if hasattr(closed, "jaxpr") else closed.eqns:
        if test(eqn):
            return True
        for sub in core.jaxprs_in_params(eqn.params):
            if contains(sub, test):
                return True
    return False


def residuals(function: Callable[..., Any], *args: Any) -> list[Any]:
    """The arrays a vjp of `function` keeps, its own arguments left out; call inside a trace."""
    _, pullback = jax.vjp(function, *args)
    own = {id(arg) for arg in args}
    kept: dict[int, Any] = {}
    for leaf in jax.tree.leaves(pullback):
        if id(leaf) not in own:
            kept[id(leaf)] = leaf
    return list(kept.values())


def inner_jaxpr(eqn: Any) -> Any | None:
    """What a call primitive calls with its own inputs; None for other primitives."""
    if eqn.primitive.name not in (
        "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
        "custom_jvp_call", "custom_vjp_call",
    ):  # fmt: skip
        return None
    return next(iter(core.jaxprs_in_params(eqn.params)), None)


def scan_residuals(
    function: Callable[..., Any], carry: Any, xs: Sequence[Any]
) -> tuple[Any, list[int | None], list[Any]]:
    """What a loop over `function(carry, *x) -> carry` keeps, turn by turn, for its backward.

    What does not change from turn to turn, a mask, is kept once and is not among it.

    Args:
      function: the body.
      carry: ShapeDtypeStruct of the carry.
      xs: ShapeDtypeStructs of one turn's other inputs.

    Returns:
      The forward loop's body (a jaxpr); for each of its inputs which of `xs` it is, or
      None; and the body's variables that are kept.
    """

    def loop(carry: Any, xs: Any) -> Any:
        return jax.lax.scan(lambda c, x: (function(c, *x), None), carry, xs)[0]

    def both(carry: Any, *xs: Any) -> Any:
        out, pullback = jax.vjp(loop, carry, xs)
        return pullback(out)

    stacked = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in xs]
    outer = jax.make_jaxpr(both)(carry, *stacked).jaxpr
    eqn = next(eqn for eqn in outer.eqns if eqn.primitive.name == "scan")
    place = {v: i - 1 for i, v in enumerate(outer.invars) if i}
    body = eqn.params["jaxpr"].jaxpr
    which = [None if is_literal(v) else place.get(v) for v in eqn.invars]
    kept = body.outvars[eqn.params["num_carry"] :]
    return body, which, [v for v in kept if not is_literal(v)]


def matmul_flops(jaxpr: Any) -> tuple[float, float]:
    """FLOPs of all matrix products in a jaxpr, and of those that have batch dims.

    A product of an activation with a parameter has no batch dims; attention's
    products of two activations have.
    """
    every = batched = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            flops = 2.0 * math.prod(eqn.outvars[0].aval.shape)
            flops *= math.prod(left[d] for d in contracted)
            every += flops
            batched += flops if batch else 0.0
            continue
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for sub in core.jaxprs_in_params(eqn.params):
            inner, inner_batched = matmul_flops(sub)
            every, batched = every + times * inner, batched + times * inner_batched
    return every, batched


def only(closed: Any, outputs: Sequence[int]) -> tuple[Any, tuple[int, ...]]:
    """A program that computes some of another's outputs and no more, and which inputs it reads."""
    wanted = set(outputs)
    flags = [i in wanted for i in range(len(closed.jaxpr.outvars))]
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, flags)
    # Outputs come in the order of the program; the caller's order may be another.
    place = {i: n for n, i in enumerate(sorted(wanted))}
    jaxpr = jaxpr.replace(
        outvars=[jaxpr.outvars[place[i]] for i in outputs],
        debug_info=jaxpr.debug_info._replace(result_paths=None),
    )
    return core.ClosedJaxpr(jaxpr, closed.consts), tuple(i for i, u in enumerate(used) if u)


def levels(
    closed: Any, given: Sequence[int], join: Callable[[int, int], int] = max
) -> dict[Any, int]:
    """For every variable of a program, the highest level among the inputs it depends on.

    Calls and loops are looked into: an output that does not depend on an input is not lifted
    by it. Constants have level 0.

    Args:
      closed: the program.
      given: a level for each of its inputs.
      join: what two levels make together; `operator.or_` tells which inputs, one bit for each.
    """
    found: dict[Any, int] = dict.fromkeys(closed.jaxpr.constvars, 0)
    found.update(zip(closed.jaxpr.invars, given, strict=True))
    for eqn in closed.jaxpr.eqns:
        reads = [0 if is_literal(v) else found[v] for v in eqn.invars]
        outs = [v for v in eqn.outvars if not is_dropped(v)]
        mixed = len(outs) > 1 and len(set(reads)) > 1
        if not (mixed and any(True for _ in core.jaxprs_in_params(eqn.params))):
            found.update(dict.fromkeys(outs, functools.reduce(join, reads, 0)))
            continue
        invars = list(dict.fromkeys(v for v in eqn.invars if not is_literal(v)))
        alone = subjaxpr(closed, [eqn], invars, outs)
        for i, v in enumerate(outs):
            _, used = only(alone, [i])
            found[v] = functools.reduce(join, (found[invars[j]] for j in used), 0)
    return found


def coordination_client() -> Any:
    """What `jax.distributed.initialize` connected this process with; None without it.

    jax has no public way to its key-value store.
    """
    return distributed.global_state.client


def trace_state() -> Any:
    """What is being traced now; equal only within one and the same trace."""
    return core.get_opaque_trace_state(convention="nnx")
