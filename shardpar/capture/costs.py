"""What XLA says one layer costs: FLOPs, bytes moved, bytes kept for the backward, scratch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from shardpar.capture._compat import as_function, residuals
from shardpar.capture.chain import Chain, chain_of
from shardpar.capture.recompute import policy_of

Dims = Mapping[str, tuple[str | None, ...]]


@dataclass(frozen=True)
class Costs:
    """XLA's figures of one layer; the last three by recompute choice, as in LayerClass."""

    forward: dict[str, float]
    both: dict[str, float]
    temp_bytes: float
    saved: dict[str, float]
    whole: dict[str, float]
    scratch: dict[str, float]


def price(
    closed: Any,
    parameters: tuple[str | None, ...],
    dims: Dims,
    device: Any,
    small: tuple[Any, Any] | None,
    scale: float,
) -> Costs:
    """Compiles a layer, forward and backward, for this machine's CPU, and asks for its costs.

    Args:
      closed: the layer's jaxpr, its inputs flat.
      parameters: per input the full name of the parameter it is, or None.
      dims: logical dim names of each parameter.
      device: whose compiler is asked for scratch; None leaves it at the CPU's.
      small: the same layer for one sequence and for two, for `device`: a whole batch may be
        too much for it; None takes the layer itself.
      scale: sequences of the layer itself.
    """
    layer = _Layer(closed)
    compiled = jax.jit(layer.both).lower(*layer.shapes()).compile()
    forward = jax.jit(layer.forward).lower(layer.avals).compile()
    temp = float(compiled.memory_analysis().temp_size_in_bytes)
    chain = chain_of(closed, parameters, dims)
    saved: dict[str, float] = {}
    whole: dict[str, float] = {}
    scratch: dict[str, float] = {}
    if chain is None:
        saved = {key: layer.kept_bytes(key) for key in ("none", "selective")}
    else:
        for key in ("none", "gathered", "selective"):
            saved[key], whole[key] = chain.kept_bytes(key)
    if device is not None:
        probe, double = (closed, None) if small is None else small
        times = 1.0 if small is None else scale
        links = [chain_of(p, parameters, dims) for p in (probe, double) if p is not None]
        if chain is None or links[0] is None:
            temp = _at_batch(
                times, *(_Layer(p).temp_bytes(device, temp / times) for p in (probe, double) if p)
            )
        else:
            scratch = _measure(links[0], links[-1], times, device, saved, whole)
    return Costs(_cost(forward), _cost(compiled), temp, saved, whole, scratch)


def _at_batch(batch: float, one: float, two: float | None = None) -> float:
    """Bytes for a batch, from those for one sequence and for two: some do not grow with it."""
    each = one if two is None else max(0.0, two - one)
    return max(0.0, one - each) + batch * each


def _measure(
    chain: Chain,
    double: Chain | None,
    times: float,
    device: Any,
    saved: dict[str, float],
    whole: dict[str, float],
) -> dict[str, float]:
    """Scratch by recompute choice; lowers what is kept to what the compiler says it allots."""
    scratch = {}
    entering = times * chain.entering_bytes
    fixed = 0.0
    if double is not None and double is not chain:
        # Of what a recomputed layer needs, the part that a second sequence does not add.
        one, two = chain.compiled_bytes("full", device), double.compiled_bytes("full", device)
        if one is not None and two is not None:
            fixed = max(0.0, 2 * one[1] - two[1])
    for key in ("none", "selective", "full"):
        compiled = chain.compiled_bytes(key, device)
        if compiled is None:
            continue
        per_layer = times * compiled[0]
        scratch[key] = fixed + times * max(0.0, compiled[1] - fixed)
        if not saved.get(key):
            continue
        # A compiler may keep less than the loop's residuals, never more.
        share = min(1.0, max(0.0, per_layer - entering) / saved[key])
        for other in ("none", "gathered") if key == "none" else (key,):
            saved[other], whole[other] = share * saved[other], share * whole[other]
    return scratch


class _Layer:
    """A layer's jaxpr as functions of its float inputs."""

    def __init__(self, closed: Any) -> None:
        self.avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
        self.function = as_function(closed)
        self.floats = [i for i, a in enumerate(self.avals) if jnp.issubdtype(a.dtype, jnp.floating)]

    def forward(self, args: Any) -> Any:
        return self.function(*args)

    def both(self, args: Any, cotangents: Any) -> Any:
        out, pullback = jax.vjp(self._of_floats(args), *[args[i] for i in self.floats])
        return out, pullback(cotangents)

    def shapes(self) -> tuple[Any, Any]:
        """Arguments of `both`."""
        cotangents = jax.eval_shape(
            lambda args: self._of_floats(args)(*[args[i] for i in self.floats]), self.avals
        )
        return self.avals, cotangents

    def temp_bytes(self, device: Any, otherwise: float) -> float:
        """Scratch of `both` on a device; `otherwise` where the layer is too large for it."""
        place = SingleDeviceSharding(device)
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), self.shapes()
        )
        try:
            compiled = jax.jit(self.both).lower(*placed).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return otherwise
            raise
        return float(compiled.memory_analysis().temp_size_in_bytes)

    def kept_bytes(self, recompute: str) -> float:
        """Bytes kept for the backward by a layer that is no link of a chain."""
        policy = policy_of(recompute, gathers=False)

        def residuals_of(args: Any) -> Any:
            run = self._of_floats(args)
            if policy is not None:
                run = jax.checkpoint(run, policy=policy)
            return residuals(run, *[args[i] for i in self.floats])

        shapes = jax.eval_shape(residuals_of, self.avals)
        return float(sum(x.size * x.dtype.itemsize for x in shapes))

    def _of_floats(self, rest: Any) -> Callable[..., list[Any]]:
        def run(*values: Any) -> list[Any]:
            full = list(rest)
            for i, value in zip(self.floats, values, strict=True):
                full[i] = value
            out = self.function(*full)
            return [y for y in out if jnp.issubdtype(jnp.result_type(y), jnp.inexact)]

        return run


def _cost(compiled: Any) -> dict[str, float]:
    cost = compiled.cost_analysis() or {}
    return {key: max(0.0, float(cost.get(key, 0.0))) for key in ("flops", "bytes accessed")}
