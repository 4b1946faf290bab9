"""What training changes from step to step, as one pytree, and how each part of it is laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from shardpar.capture.model import AbstractModel
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
    model: AbstractModel, optimizer: optax.GradientTransformation, layouts: StageLayouts
) -> TrainState:
    """ShapeDtypeStructs of the whole state, each with its sharding: a target to restore into."""
    whole = replicated(layouts.mesh)

    def with_sharding(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = {
        name: with_sharding(leaf, layouts.stored(name)) for name, leaf in model.params.items()
    }
    shapes = jax.eval_shape(optimizer.init, model.params)

    def place(path: Any, leaf: Any) -> Any:
        name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey)), None)
        if name in model.params and leaf.shape == model.params[name].shape:
            return with_sharding(leaf, gradient_sharding(name, layouts))
        return with_sharding(leaf, whole)

    return TrainState(
        params,
        jax.tree_util.tree_map_with_path(place, shapes),
        {name: with_sharding(leaf, whole) for name, leaf in model.rest.items()},
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    )


def gradient_sharding(name: str, layouts: StageLayouts, stacked: int = 0) -> NamedSharding:
    """How the optimizer wants a parameter's gradient, and keeps the state shaped like it."""
    parameter, strategy = layouts.owners[name]
    layout = optimizer_layout(parameter, strategy, layouts.stage.mesh, layouts.tensor_dims)
    return named_sharding(layouts.mesh, layout, stacked)


Tree = TypeVar("Tree", TrainState, Gathered)


def shardings_of(state: Tree) -> Tree:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)
