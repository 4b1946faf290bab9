"""What XLA says one layer costs: FLOPs, bytes moved, bytes kept for the backward, scratch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from shardpar.capture._compat import as_function, residuals
from shardpar.capture.chain import DEEP, Chain, chain_of
from shardpar.capture.recompute import policy_of

Dims = Mapping[str, tuple[str | None, ...]]


@dataclass(frozen=True)
class Costs:
    """XLA's figures of one layer; all below `views_bytes` by recompute choice, as in LayerClass."""

    forward: dict[str, float]
    both: dict[str, float]
    temp_bytes: float
    views_bytes: float
    saved: dict[str, float]
    whole: dict[str, float]
    scratch: dict[str, float]
    fixed: dict[str, float]


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
    temp, views = float(compiled.memory_analysis().temp_size_in_bytes), 0.0
    chain = chain_of(closed, parameters, dims)
    saved: dict[str, float] = {}
    whole: dict[str, float] = {}
    scratch: dict[str, float] = {}
    fixed: dict[str, float] = {}
    if chain is None:
        saved = {key: layer.kept_bytes(key) for key in ("none", "selective")}
    else:
        views = chain.views_bytes
        for key in ("none", "gathered", "selective"):
            saved[key], whole[key] = chain.kept_bytes(key)
    if device is not None:
        probe, double = (closed, None) if small is None else small
        times = 1.0 if small is None else scale
        links = [chain_of(p, parameters, dims) for p in (probe, double) if p is not None]
        if chain is None or links[0] is None:
            figures = [_Layer(p).temp_bytes(device, temp / times) for p in (probe, double) if p]
            growing, once = _at_batch(*figures)
            temp = once + times * growing
            fixed = dict.fromkeys(("none", "selective", "full"), once)
        else:
            scratch, fixed, views = _measure(links, times, device, saved, whole, views)
    return Costs(_cost(forward), _cost(compiled), temp, views, saved, whole, scratch, fixed)


def _at_batch(one: float, two: float | None = None) -> tuple[float, float]:
    """(bytes that each sequence adds, bytes that none adds), from those for one and for two."""
    each = one if two is None else min(one, max(0.0, two - one))
    return each, one - each


def _measure(
    links: list[Chain | None],
    times: float,
    device: Any,
    saved: dict[str, float],
    whole: dict[str, float],
    views: float,
) -> tuple[dict[str, float], dict[str, float], float]:
    """(scratch, what of it does not grow with the batch, views of weights that are kept).

    Lowers what is kept to what the compiler says it allots.

    Args:
      links: the layer for one sequence, and for two if they are known.
      times: sequences of the layer itself.
      device: whose compiler.
      saved: by the loop's residuals, for the layer itself.
      whole: of them, what tensor axes do not split.
      views: of weights, by the loop's residuals.
    """
    scratch: dict[str, float] = {}
    fixed: dict[str, float] = {}
    chains = [link for link in links if link is not None]
    entering = chains[0].entering_bytes
    for key in ("none", "selective", "full"):
        figures = [found for c in chains if (found := c.compiled_bytes(key, device)) is not None]
        if not figures:
            continue
        kept, kept_once = _at_batch(*(per_layer for per_layer, _ in figures))
        deep, deep_once = _at_batch(*(once + DEEP * per_layer for per_layer, once in figures))
        if key != "none":
            kept_once = 0.0
        elif len(figures) > 1:
            kept_once = views = min(views, kept_once)
        else:
            kept_once, kept, deep = views, kept - views, deep - DEEP * views
        # Short loops are compiled unlike longer ones, so where the deeper chain has room for
        # the loop's residuals they are believed, and the rest is scratch. A compiler may keep
        # less than the residuals, never more.
        residuals = saved.get(key, 0.0) / times
        if deep < DEEP * (residuals + entering):
            share = min(1.0, max(0.0, kept - entering) / residuals) if residuals else 1.0
            for other in ("none", "gathered") if key == "none" else (key,):
                if other in saved:
                    saved[other], whole[other] = share * saved[other], share * whole[other]
            residuals *= share
        fixed[key] = max(0.0, deep_once - DEEP * kept_once)
        scratch[key] = fixed[key] + times * max(0.0, deep - DEEP * (residuals + entering))
    return scratch, fixed, views


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
