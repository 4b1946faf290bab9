"""Marks the classes that repeat, so that a traced program shows where each layer begins and ends.

`@shardpar.layer` on an `nnx.Module` class wraps `__call__` in a jitted function
that carries the class's name. In a traced program each call is then one equation
whose inputs are the layer's parameters and activations. Capture cuts the program
there. Removing the decorator leaves the same maths.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from shardpar.errors import CaptureError

MARKER = "shardpar_layer__"

ModuleClass = TypeVar("ModuleClass", bound=type)


def layer(cls: ModuleClass) -> ModuleClass:
    """Marks a Flax class as one planning unit: all its calls become layers of the graph.

    The planner gives each layer its own strategy, and equal layers one price.
    Outside a trace the class behaves as if it were not decorated.

    Args:
      cls: a subclass of `flax.nnx.Module` with a `__call__`.

    Returns:
      The same class.

    Raises:
      CaptureError: if `cls` is not a Flax nnx class, or has no `__call__`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import shardpar
      >>> @shardpar.layer
      ... class Double(nnx.Module):
      ...     def __call__(self, x):
      ...         return 2 * x
      >>> Double()(jnp.ones(2))
      Array([2., 2.], dtype=float32)
      >>> [str(eqn.primitive) for eqn in jax.make_jaxpr(Double())(jnp.ones(2)).eqns]
      ['jit']
    """
    if not (inspect.isclass(cls) and issubclass(cls, nnx.Module)):
        raise CaptureError(
            f"@shardpar.layer: {cls!r} is not a flax.nnx.Module class; "
            "put the decorator on the class whose instances repeat in the model "
            "(a linen module can be wrapped with flax.nnx.bridge.ToNNX)"
        )
    if not any("__call__" in vars(base) for base in cls.__mro__):
        raise CaptureError(f"@shardpar.layer: {cls.__name__} has no __call__ to mark")
    original = cls.__call__

    def run(graphdef, treedef, static, variables, arrays):
        # merge() keeps the very Variable objects, so their values are noted before the call.
        before = {path: _raw(leaf) for path, leaf in nnx.to_flat_state(variables)}
        module, *nodes = merged = nnx.merge(graphdef, variables, copy=True)
        args, kwargs = _join(treedef, static, nodes, arrays)
        out = original(module, *args, **kwargs)
        # Only what the call changed (dropout counters, batch statistics) leaves the
        # marked region: parameters that merely pass through are not its outputs.
        changed = {
            path: leaf
            for path, leaf in nnx.to_flat_state(nnx.state(merged))
            if path not in before or _raw(leaf) is not before[path]
        }
        return out, changed

    run.__name__ = MARKER + cls.__name__
    marked = jax.jit(run, static_argnums=(0, 1, 2))

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        treedef, static, nodes, arrays = _part((args, kwargs))
        # Modules, Rngs and Variables among the arguments may change too, as a stream of keys does.
        graphdef, variables = nnx.split((self, *nodes))
        if not any(isinstance(x, jax.core.Tracer) for x in (*jax.tree.leaves(variables), *arrays)):
            return original(self, *args, **kwargs)
        out, changed = marked(graphdef, treedef, static, variables, arrays)
        if changed:
            nnx.update((self, *nodes), nnx.from_flat_state(changed))
        return out

    call.__shardpar_layer__ = cls.__name__  # type: ignore[attr-defined]
    cls.__call__ = call  # type: ignore[method-assign]
    return cls


def marked_name(cls: type) -> str | None:
    """The name of the decorated class whose calls the instances of `cls` make, or None."""
    for base in cls.__mro__:
        name = getattr(vars(base).get("__call__"), "__shardpar_layer__", None)
        if name is not None:
            return str(name)
    return None


def is_marked(cls: type) -> bool:
    """Whether instances of a class are layers."""
    return marked_name(cls) is not None


def marked_class(eqn: Any) -> str | None:
    """The decorated class's name if a jaxpr equation is a marked call, else None."""
    name = eqn.params.get("name", "") if eqn.primitive.name in ("jit", "pjit") else ""
    return name.removeprefix(MARKER) if name.startswith(MARKER) else None


def _raw(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _is_node(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


def _part(tree: Any) -> tuple[Any, tuple[Any, ...], list[Any], list[Any]]:
    """Splits arguments into Flax objects, arrays, which are traced, and the rest, compiled in."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_node)
    # 1 == 1.0 == True and 0.0 == -0.0, but a trace with one does not serve the other.
    static = tuple(
        (i, type(x), repr(x) if isinstance(x, float | complex) else "", x)
        for i, x in enumerate(leaves)
        if not _is_node(x) and not _is_array(x)
    )
    try:
        hash(static)
    except TypeError as error:
        raise CaptureError(
            f"a marked layer was called with an argument that is neither an array nor hashable "
            f"({error}); pass arrays, numbers, strings or tuples"
        ) from None
    nodes = [x for x in leaves if _is_node(x)]
    places = tuple(i for i, x in enumerate(leaves) if _is_node(x))
    return treedef, (static, places), nodes, [x for x in leaves if _is_array(x)]


def _join(treedef: Any, static: tuple[Any, ...], nodes: list[Any], arrays: list[Any]) -> Any:
    values, places = static
    fixed = {i: x for i, _, _, x in values} | dict(zip(places, nodes, strict=True))
    rest = iter(arrays)
    return jax.tree.unflatten(
        treedef, [fixed[i] if i in fixed else next(rest) for i in range(treedef.num_leaves)]
    )
