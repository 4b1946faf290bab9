"""What training changes from step to step, as one pytree, and how each part of it is laid out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from shardpar.capture.model import AbstractModel, told
from shardpar.errors import PlanError
from shardpar.lowering.shardings import named_sharding, replicated
from shardpar.lowering.stages import StageLayouts
from shardpar.spec.parameters import optimizer_layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters, optimizer state, the model's other variables, and updates applied so far.

    `params` and `rest` are flat dictionaries from a path to an array, so a state
    does not depend on how a plan groups the layers.
    """

    params: dict[str, Any]
    optimizer: Any
    rest: dict[str, Any]
    step: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gathered:
    """What a step has gathered of its batch so far, before the update.

    Attributes:
      grads: of the loss sum, float32, by parameter.
      sums: float32[2], the loss sum and its weight.
      rest: the model's other variables after the micro-batches done.
    """

    grads: dict[str, Any]
    sums: Any
    rest: dict[str, Any]


def state_shapes(
    model: AbstractModel,
    optimizer: optax.GradientTransformation,
    layouts: StageLayouts,
    params: Iterable[str] | None = None,
    rest: Iterable[str] | None = None,
    sizes: Mapping[str, tuple[int, ...]] = {},
) -> TrainState:
    """ShapeDtypeStructs of a state, each with its sharding: a target to restore into.

    Args:
      model: its parameters and other variables.
      optimizer: whose state is part of it.
      layouts: where everything lies.
      params: of a group of devices that holds some parameters only; None takes all.
      rest: the same of other variables.
      sizes: of the slices of parameters whose optimizer state the group has a slice of only.

    Raises:
      PlanError: the optimizer cannot be initialised for these parameters alone.
    """
    whole = replicated(layouts.mesh)
    held = {name: model.params[name] for name in (model.params if params is None else params)}

    def with_sharding(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    updated = {
        name: jax.ShapeDtypeStruct(sizes.get(name, leaf.shape), leaf.dtype)
        for name, leaf in held.items()
    }
    try:
        shapes = jax.eval_shape(optimizer.init, updated)
    except (KeyError, TypeError, ValueError) as error:
        if len(held) == len(model.params):
            raise
        raise PlanError(
            "the optimizer cannot be initialised for some of the parameters "
            f"({told(error)}), and stages have some each; let its masks and labels be functions "
            "of the parameters, or train with a plan of one stage"
        ) from error

    def place(path: Any, leaf: Any) -> Any:
        name = named_by(path, held)
        if name and leaf.shape == updated[name].shape:
            return with_sharding(leaf, gradient_sharding(name, layouts))
        return with_sharding(leaf, whole)

    variables = model.rest if rest is None else rest
    return TrainState(
        {name: with_sharding(leaf, layouts.stored(name)) for name, leaf in held.items()},
        jax.tree_util.tree_map_with_path(place, shapes),
        {name: with_sharding(model.rest[name], whole) for name in variables},
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    )


def whole_shapes(model: AbstractModel, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes of the whole state, wherever it lies."""
    return TrainState(
        dict(model.params),
        jax.eval_shape(optimizer.init, dict(model.params)),
        dict(model.rest),
        jax.ShapeDtypeStruct((), jnp.int32),
    )


def named_by(path: Any, names: Mapping[str, Any]) -> str:
    """The parameter that a leaf of an optimizer's state belongs to; "" for none."""
    keys = (k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey))
    return next((key for key in keys if key in names), "")


def gradient_sharding(name: str, layouts: StageLayouts, stacked: int = 0) -> NamedSharding:
    """How the optimizer wants a parameter's gradient, and keeps the state shaped like it."""
    parameter, strategy = layouts.owners[name]
    layout = optimizer_layout(parameter, strategy, layouts.stage.mesh, layouts.tensor_dims)
    return named_sharding(layouts.mesh, layout, stacked)


Tree = TypeVar("Tree", TrainState, Gathered)


def shardings_of(state: Tree) -> Tree:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)
