"""What a chain of equal layers keeps for its backward, and what scratch its compiler allots.

The layers are run as lowering runs them, as a loop: the loop's residuals are exact, and
programs of two depths tell what grows with depth from what does not (Galvatron's
two-depth difference, arXiv 2211.13878, asked of the compiler instead of a clock).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from shardpar.capture._compat import as_function, is_literal, scan_residuals
from shardpar.capture.recompute import policy_of
from shardpar.capture.splits import split_dims
from shardpar.spec.plan import TENSOR_DIMS

SHALLOW, DEEP = 2, 4


@dataclass(frozen=True, eq=False)
class Chain:
    """A layer as a function of (carry, its parameters, what all layers share).

    Attributes:
      function: the layer.
      carry: the activation that goes from layer to layer.
      parameters: ShapeDtypeStructs of its parameters, and the dims tensor axes may split.
      shared: ShapeDtypeStructs of its other inputs.
    """

    function: Callable[..., Any]
    carry: Any
    parameters: tuple[tuple[Any, frozenset[int]], ...]
    shared: tuple[Any, ...]

    def kept_bytes(self, recompute: str) -> tuple[float, float]:
        """(bytes kept for the backward, of them what tensor axes do not split), input left out.

        Args:
          recompute: none, gathered (none, but nothing made of weights alone is kept) or selective.
        """
        shapes = [shape for shape, _ in self.parameters]
        body, which, kept = scan_residuals(self._layer(recompute, self.shared), self.carry, shapes)
        dims = split_dims(body, [frozenset() if i is None else self._split(i) for i in which])
        weights = _made_of_weights(body, which)
        total = whole = 0.0
        original = _originals(body)
        for var in dict.fromkeys(original.get(v, v) for v in kept):
            if var in weights:
                continue
            size = float(math.prod(var.aval.shape) * var.aval.dtype.itemsize)
            total += size
            whole += 0.0 if dims.get(var) else size
        entering = self.entering_bytes
        return max(0.0, total - entering), max(0.0, whole - entering)

    @property
    def views_bytes(self) -> float:
        """Bytes of views of its weights that are kept, layer by layer, where nothing gathers."""
        body, which, kept = scan_residuals(
            self._layer("none", self.shared), self.carry, [shape for shape, _ in self.parameters]
        )
        # A loop keeps a second copy of what its body makes of a weight, not of the weight.
        views = (_made_of_weights(body, which) & set(kept)) - set(body.invars)
        return float(sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in views))

    @property
    def entering_bytes(self) -> float:
        """Bytes of the carry."""
        return float(self.carry.size * self.carry.dtype.itemsize)

    def _split(self, parameter: int) -> frozenset[int]:
        # The loop's body sees one turn's slice, so dims are the parameter's own.
        return self.parameters[parameter][1]

    def _layer(self, recompute: str, shared: Any) -> Callable[..., Any]:
        gathers = recompute == "gathered"
        policy = policy_of("none" if gathers else recompute, gathers)

        def layer(carry: Any, *parameters: Any) -> Any:
            filled = [jnp.zeros(s.shape, s.dtype) if isinstance(s, jax.ShapeDtypeStruct) else s
                      for s in shared]  # fmt: skip
            return self.function(carry, parameters, filled)

        return layer if policy is None else jax.checkpoint(layer, policy=policy, prevent_cse=False)

    def compiled_bytes(self, recompute: str, device: Any) -> tuple[float, float] | None:
        """(bytes the compiler allots per layer, bytes it allots however deep the chain is).

        None if even so short a chain is too large for the device.

        Args:
          recompute: none, selective or full.
          device: whose compiler; None takes jax's default device.
        """
        try:
            shallow, deep = (self._temp_bytes(recompute, n, device) for n in (SHALLOW, DEEP))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return None
            raise
        slope = max(0.0, (deep - shallow) / (DEEP - SHALLOW))
        return slope, max(0.0, shallow - SHALLOW * slope)

    def _temp_bytes(self, recompute: str, depth: int, device: Any) -> float:
        placed = None if device is None else SingleDeviceSharding(device)

        def abstract(shape: Any, *leading: int) -> Any:
            return jax.ShapeDtypeStruct((*leading, *shape.shape), shape.dtype, sharding=placed)

        def both(carry: Any, xs: Any, shared: Any) -> Any:
            layer = self._layer(recompute, shared)

            def loop(carry: Any, xs: Any) -> Any:
                return jax.lax.scan(lambda c, x: (layer(c, *x), None), carry, xs)[0]

            out, pullback = jax.vjp(loop, carry, xs)
            return pullback(out)

        args = (
            abstract(self.carry),
            [abstract(shape, depth) for shape, _ in self.parameters],
            [abstract(shape) for shape in self.shared],
        )
        compiled = jax.jit(both).lower(*args).compile()
        return float(compiled.memory_analysis().temp_size_in_bytes)


def chain_of(
    closed: Any, parameters: tuple[str | None, ...], dims: Mapping[str, tuple[str | None, ...]]
) -> Chain | None:
    """A layer's jaxpr as a link of a chain; None if no output can be its own input.

    Args:
      closed: the layer, its inputs flat.
      parameters: per input the full name of the parameter it is, or None.
      dims: logical dim names of each parameter.
    """
    invars, outvars = closed.jaxpr.invars, closed.jaxpr.outvars
    others = [i for i, name in enumerate(parameters) if name is None]
    links = [
        (i, o)
        for i in others
        for o, out in enumerate(outvars)
        if getattr(invars[i].aval, "shape", ()) and invars[i].aval == out.aval
        and jnp.issubdtype(out.aval.dtype, jnp.floating)
    ]  # fmt: skip
    if not links:
        return None
    enters, leaves = links[0]
    shared = [i for i in others if i != enters]
    if any(jax.dtypes.issubdtype(invars[i].aval.dtype, jax.dtypes.extended) for i in shared):
        return None
    own = [i for i, name in enumerate(parameters) if name is not None]
    if not own or not all(jnp.issubdtype(invars[i].aval.dtype, jnp.floating) for i in own):
        return None
    function = as_function(closed)

    def layer(carry: Any, weights: Any, rest: Any) -> Any:
        inputs: list[Any] = [None] * len(invars)
        inputs[enters] = carry
        for i, value in zip(own, weights, strict=True):
            inputs[i] = value
        for i, value in zip(shared, rest, strict=True):
            inputs[i] = value
        return function(*inputs)[leaves]

    def shape_of(i: int) -> Any:
        return jax.ShapeDtypeStruct(invars[i].aval.shape, invars[i].aval.dtype)

    return Chain(
        layer,
        shape_of(enters),
        tuple((shape_of(i), _tensor_dims(dims[str(parameters[i])])) for i in own),
        tuple(shape_of(i) for i in shared),
    )


def _tensor_dims(names: tuple[str | None, ...]) -> frozenset[int]:
    first = next((d for d, name in enumerate(names) if name in TENSOR_DIMS), None)
    return frozenset() if first is None else frozenset({first})


def _originals(body: Any) -> dict[Any, Any]:
    """For each variable that is another one in a different shape, that other one."""
    out: dict[Any, Any] = {}
    for eqn in body.eqns:
        if eqn.primitive.name in ("reshape", "squeeze", "expand_dims", "copy"):
            source = eqn.invars[0]
            if not is_literal(source):
                out[eqn.outvars[0]] = out.get(source, source)
    return out


def _made_of_weights(body: Any, which: list[int | None]) -> set[Any]:
    """Variables of a loop's body that are weights, or made of weights alone."""
    made = {v for v, i in zip(body.invars, which, strict=True) if i is not None}
    for eqn in body.eqns:
        variables = [v for v in eqn.invars if not is_literal(v)]
        if variables and all(v in made for v in variables):
            made.update(eqn.outvars)
    return made
