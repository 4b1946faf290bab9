"""Cuts a traced loss at its layers: which equations belong to which layer, and what joins them.

The cut program says the same as the traced one. Ties, skips and masks need no
hand-work: they are just variables that more than one layer reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shardpar.capture._compat import as_function, call_jaxpr, contains, is_literal, run_equation
from shardpar.capture.layers import marked_class
from shardpar.capture.model import AbstractModel, Loss, loss_and_weight, told
from shardpar.errors import CaptureError, ShardparError
from shardpar.spec.select import layer_name


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a marked layer in the cut program.

    Attributes:
      name: the layer's name in plans, "blocks[3]".
      path: the path of its parameters, "blocks.3".
      class_name: the decorated class.
      position: index of its equation.
      parameters: full name of the parameter behind each input, or None.
      jaxpr: what it computes; equal layers share the object.
    """

    name: str
    path: str
    class_name: str
    position: int
    parameters: tuple[str | None, ...]
    jaxpr: Any


@dataclass(frozen=True, eq=False)
class CutProgram:
    """A traced loss, its equations, and which of them are layers.

    Attributes:
      closed: the whole program; inputs are params, rest and batch, outputs are
        loss sum, weight, then the changed rest.
      inputs: ("params" | "rest" | "batch", name) of each input.
      outputs: names of the outputs after loss and weight: the rest, by path.
      calls: the layers, in order.
      hidden_layers: names of marked classes that could not be cut, being inside a loop.
    """

    closed: Any
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]
    calls: tuple[LayerCall, ...]
    hidden_layers: tuple[str, ...]


def cut(
    model: AbstractModel,
    loss: Loss,
    batch: Mapping[str, Any],
    *,
    compute_dtype: str = "float32",
    training: bool = True,
) -> CutProgram:
    """Traces `loss(model, batch)` and cuts it at the marked layers.

    Args:
      model: from `abstract_model`.
      loss: returns a scalar mean, or (sum, weight).
      batch: ShapeDtypeStructs of one (micro-)batch, dim 0 counting sequences.
      compute_dtype: dtype float parameters have inside the model.
      training: False traces the model in Flax's eval mode, without dropout.

    Raises:
      CaptureError: if the loss cannot be traced or returns something else.
    """
    params = {name: _cast(leaf, compute_dtype) for name, leaf in model.params.items()}
    sequences = _sequences(batch)

    def program(params: Any, rest: Any, batch: Any) -> Any:
        module = model.merge(params, rest)
        if not training:
            module.eval()
        total, weight = loss_and_weight(loss(module, batch), sequences)
        return total, weight, model.split(module)[1]

    try:
        closed = jax.make_jaxpr(program)(params, dict(model.rest), dict(batch))
    except ShardparError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the loss cannot be traced for batch {_shapes(batch)}: {told(error)}"
        ) from error
    if any(_is_wrapper(eqn) for eqn in closed.jaxpr.eqns):
        closed = _inline(closed)
    names = [
        (kind, jax.tree_util.keystr(path[1:], simple=True, separator="/"))
        for kind, path in (
            (("params", "rest", "batch")[path[0].idx], path)
            for path, _ in jax.tree_util.tree_flatten_with_path(
                (params, dict(model.rest), dict(batch))
            )[0]
        )
    ]
    return CutProgram(
        closed,
        tuple(names),
        tuple(sorted(model.rest)),
        _calls(closed, names, model),
        _hidden(closed),
    )


def _calls(
    closed: Any, names: list[tuple[str, str]], model: AbstractModel
) -> tuple[LayerCall, ...]:
    source = {
        var: name
        for var, (kind, name) in zip(closed.jaxpr.invars, names, strict=True)
        if kind == "params"
    }
    seen: set[str] = set()
    used_names: dict[str, int] = {}
    calls = []
    stateless = {cls: iter([p for p, c in model.marked if c == cls]) for _, cls in model.marked}
    for position, eqn in enumerate(closed.jaxpr.eqns):
        cls = marked_class(eqn)
        if cls is None:
            continue
        reads = tuple(None if is_literal(v) else source.get(v) for v in eqn.invars)
        own = {name for name in reads if name is not None and name not in seen}
        path = _path(cls, own, {n for n in reads if n}, model)
        if path is None:
            path = next(stateless.get(cls, iter(())), cls.lower())
        seen |= own
        name = layer_name(path) or cls.lower()
        repeat = used_names.get(name, 0)
        used_names[name] = repeat + 1
        if repeat:  # one module called again, as in a model that shares its weights over depth
            name = f"{name}@{repeat + 1}"
        calls.append(LayerCall(name, path, cls, position, reads, call_jaxpr(eqn)))
    return tuple(calls)


def _path(cls: str, own: set[str], reads: set[str], model: AbstractModel) -> str | None:
    """The instance of `cls` whose parameters this call reads; new ones decide over shared ones."""
    best, best_score = None, (0, 0)
    for path, name in model.marked:
        if name != cls:
            continue
        prefix = f"{path}." if path else ""
        score = (
            sum(n.startswith(prefix) for n in own),
            sum(n.startswith(prefix) for n in reads),
        )
        if score > best_score:
            best, best_score = path, score
    return best


def _is_wrapper(eqn: Any) -> bool:
    """An unmarked jit around marked layers: the user's own jit, or one inside Flax."""
    return (
        eqn.primitive.name in ("jit", "pjit")
        and marked_class(eqn) is None
        and contains(call_jaxpr(eqn), lambda inner: marked_class(inner) is not None)
    )


def _inline(closed: Any) -> Any:
    """The same program with jits that wrap layers opened, so that the layers come to the top."""

    def run(closed: Any, args: Any) -> list[Any]:
        jaxpr = closed.jaxpr
        env: dict[Any, Any] = dict(
            zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True)
        )

        def read(atom: Any) -> Any:
            return atom.val if is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            if _is_wrapper(eqn):
                inner = run(call_jaxpr(eqn), [read(v) for v in eqn.invars])
                env.update(zip(eqn.outvars, inner, strict=True))
            else:
                env.update(run_equation(closed, eqn, read))
        return [read(v) for v in jaxpr.outvars]

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    return jax.make_jaxpr(lambda *args: run(closed, args))(*avals)


def _hidden(closed: Any) -> tuple[str, ...]:
    found: set[str] = set()

    def note(eqn: Any) -> bool:
        cls = marked_class(eqn)
        if cls:
            found.add(cls)
        return False

    for eqn in closed.jaxpr.eqns:
        if marked_class(eqn) is None:
            for value in eqn.params.values():
                if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                    contains(value, note)
    return tuple(sorted(found))


def _cast(leaf: Any, dtype: str) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))
    return leaf


def _sequences(batch: Mapping[str, Any]) -> int:
    sizes = {name: leaf.shape[0] if leaf.shape else None for name, leaf in batch.items()}
    if not sizes or len(set(sizes.values())) != 1 or None in sizes.values():
        raise CaptureError(
            f"the batch's arrays must share their first dim, the sequences; got {_shapes(batch)}"
        )
    return next(iter(sizes.values()))  # type: ignore[return-value]


def _shapes(batch: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{k}: {tuple(v.shape)}" for k, v in batch.items()) + "}"


def evaluate(closed: Any, *args: Any) -> list[Any]:
    """Runs a jaxpr; the readable twin of what lowering emits, used by the tests."""
    return as_function(closed)(*args)
