"""What most algorithms share: clients keep nothing and are sent the global model alone."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from shardpar.fl.task import Params

Tree = Any


class Plain:
    """The parts of an algorithm that hold for most; see `Algorithm`."""

    aggregate: ClassVar[Literal["sum", "each"]] = "sum"

    def server_init(self, params: Params) -> Tree:
        """The global model alone."""
        return {"params": params}

    def client_init(self, params: Params) -> Tree:
        """Nothing is kept."""
        return ()

    def broadcast(self, state: Tree) -> Tree:
        """The global model."""
        return {"params": state["params"]}


def mean_delta(total: Tree) -> Params:
    """The mean difference of the clients' models, weighted by examples; 0 without any weight."""
    scale = 1.0 / jnp.maximum(total["weight"], 1e-12)
    return jax.tree.map(lambda d: scale * d, total["delta"])


def moved(params: Params, delta: Params, learning_rate: float) -> Params:
    """The global model, moved by so much of a difference."""
    return jax.tree.map(lambda p, d: p + learning_rate * d, params, delta)
