"""A Flax model without its arrays: what its parameters are called, and how big they are.

Parameters and other variables are flat dictionaries from a path ("blocks.3.up") to
an array, the form every later floor uses.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardpar.capture.layers import marked_name
from shardpar.errors import CaptureError, ShardparError

Init = Callable[[nnx.Rngs], nnx.Module]
Loss = Callable[[Any, Any], Any]
Arrays = dict[str, Any]

_LONGEST_TEXT = 500


@dataclass(frozen=True, eq=False)
class AbstractModel:
    """A model's structure.

    Attributes:
      init: makes the model from `nnx.Rngs`.
      graphdef: Flax's static part.
      params, rest: ShapeDtypeStructs of the trained parameters and of all other
        variables (dropout counters, batch statistics), by path.
      dims: logical dim names of each parameter.
      marked: (path, class name) of every instance of a decorated class, in call-free order.
    """

    init: Init
    graphdef: Any
    params: Arrays
    rest: Arrays
    dims: dict[str, tuple[str | None, ...]]
    marked: tuple[tuple[str, str], ...]
    _params_tree: Any
    _rest_tree: Any

    def merge(self, params: Mapping[str, Any], rest: Mapping[str, Any]) -> nnx.Module:
        """The model with these arrays in it."""
        return nnx.merge(
            self.graphdef,
            jax.tree.unflatten(self._params_tree, [params[name] for name in self.params]),
            jax.tree.unflatten(self._rest_tree, [rest[name] for name in self.rest]),
            copy=True,
        )

    def split(self, module: nnx.Module) -> tuple[Arrays, Arrays]:
        """The inverse of `merge`: (params, rest)."""
        _, params, rest = nnx.split(module, nnx.Param, ...)
        return (
            dict(zip(self.params, jax.tree.leaves(params), strict=True)),
            dict(zip(self.rest, jax.tree.leaves(rest), strict=True)),
        )

    def create(self, seed: jax.Array | int) -> tuple[Arrays, Arrays]:
        """Initialises the model, inside or outside a jit: (params, rest)."""
        with nnx.use_eager_sharding(False):
            return self.split(self.init(nnx.Rngs(jax.random.key(seed))))


def abstract_model(init: Init, *, needs_parameters: bool = True) -> AbstractModel:
    """Finds a model's parameters without allocating any.

    Args:
      init: makes the model from `nnx.Rngs`; called under `jax.eval_shape`.
      needs_parameters: refuse a model without any; one may have tables instead.

    Raises:
      CaptureError: if `init` does not return an `nnx.Module`, or a parameter's
        logical names do not match its rank.
    """

    def build() -> nnx.Module:
        model = init(nnx.Rngs(0))
        if not isinstance(model, nnx.Module):
            raise CaptureError(
                f"the model's init returned {type(model).__name__}; return a flax.nnx.Module"
            )
        return model

    with nnx.use_eager_sharding(False):
        try:
            model = nnx.eval_shape(build)
        except ShardparError:
            raise
        except jax.errors.JAXTypeError as error:
            raise CaptureError(
                "the model's constructor reads the value of a parameter or random number "
                f"({str(error).splitlines()[0]}); make it depend on shapes only"
            ) from error
        except Exception as error:
            raise CaptureError(f"the model's constructor failed: {told(error)}") from error
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    flat_params, params_tree = _flatten(params)
    flat_rest, rest_tree = _flatten(rest)
    if needs_parameters and not flat_params:
        raise CaptureError(f"{type(model).__name__} has no parameters; there is nothing to train")
    dims = {}
    for path, variable in nnx.to_flat_state(params):
        name = ".".join(map(str, path))
        dims[name] = _logical_dims(name, variable, flat_params[name].shape)
    marked = tuple(
        (".".join(map(str, path)), name)
        for path, module in nnx.iter_modules(model)
        if (name := marked_name(type(module))) is not None
    )
    return AbstractModel(
        init, graphdef, flat_params, flat_rest, dims, marked, params_tree, rest_tree
    )


def told(error: Exception) -> str:
    """An error in the user's code as one line: its kind, its message, and the line it is from."""
    ours = Path(__file__).parents[1]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and ours not in Path(frame.filename).parents
    ]
    where = f" ({frames[-1].filename} line {frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST_TEXT]}{where}"


def _flatten(state: Any) -> tuple[Arrays, Any]:
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    named = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
        for path, leaf in leaves
    }
    return named, tree


def _logical_dims(name: str, variable: Any, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    metadata = variable.get_metadata()
    names = metadata.get("out_sharding") or metadata.get("sharding_names")
    if names is None:
        return (None,) * len(shape)
    names = tuple(names)
    if len(names) != len(shape):
        raise CaptureError(
            f"parameter {name} has shape {shape} but {len(names)} logical names {names}; "
            "give one name or None per dim"
        )
    return names


def loss_and_weight(value: Any, sequences: int) -> tuple[jax.Array, jax.Array]:
    """Brings what a loss function returned to (sum, weight), both float32 scalars.

    A loss returns either its sum and the weight it is over (tokens, samples), or
    a scalar mean, which then counts for the batch's sequences. Sums are added over
    micro-batches and divided once, so unequal batches are weighted rightly.

    Raises:
      CaptureError: if it returned anything else.
    """
    pair = isinstance(value, tuple) and len(value) == 2
    if isinstance(value, tuple | dict | list) and not pair:
        raise CaptureError(
            f"the loss returned a {type(value).__name__}; return a scalar mean, or (sum, weight)"
        )
    total, weight = value if pair else (value, None)
    for part in (total, weight):
        if part is not None and jnp.shape(part) != ():
            raise CaptureError(
                f"the loss returned an array of shape {jnp.shape(part)}; return a scalar mean, "
                "or (sum, weight)"
            )
    if weight is None:
        return jnp.float32(total) * sequences, jnp.float32(sequences)
    return jnp.float32(total), jnp.float32(weight)
