"""What most algorithms share: local SGD at clients that keep nothing, and a mean at the server."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from shardpar.fl.algorithms.local import Trained, local_sgd
from shardpar.fl.examples import Examples
from shardpar.fl.task import Params, Task

Tree = Any


class Plain:
    """The parts of an algorithm that hold for most; see `Algorithm`. By itself it is FedAvg.

    Attributes:
      learning_rate: of the clients' steps.
      server_learning_rate: by how much of the mean difference the global model moves.
      momentum: of the clients' steps, which begin without any in every round.
    """

    aggregate: ClassVar[Literal["sum", "each"]] = "sum"
    learning_rate: float
    server_learning_rate: float
    momentum: float

    def server_init(self, params: Params) -> Tree:
        """The global model alone."""
        return {"params": params}

    def client_init(self, params: Params) -> Tree:
        """Nothing is kept."""
        return ()

    def broadcast(self, state: Tree) -> Tree:
        """The global model."""
        return {"params": state["params"]}

    def trained(self, task: Task, broadcast: Tree, examples: Examples) -> Trained:
        """Local SGD from the global model."""
        return local_sgd(
            task,
            broadcast["params"],
            examples,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
        )

    def client(
        self, task: Task, broadcast: Tree, kept: Tree, examples: Examples
    ) -> tuple[Tree, Tree]:
        """Local SGD; sends the difference times the number of examples."""
        return self.trained(task, broadcast, examples).sums(broadcast["params"]), kept

    def server(self, state: Tree, total: Tree, clients: Any) -> Tree:
        """Moves by the weighted mean; a round without weight changes nothing."""
        params = moved(state["params"], mean_delta(total), self.server_learning_rate)
        return {**state, "params": params}


class Robust(Plain):
    """The server sees each client's difference as it is; clients count alike."""

    aggregate: ClassVar[Literal["sum", "each"]] = "each"

    def client(
        self, task: Task, broadcast: Tree, kept: Tree, examples: Examples
    ) -> tuple[Tree, Tree]:
        """Local SGD; sends the difference as it is."""
        return self.trained(task, broadcast, examples).alone(broadcast["params"]), kept


def mean_delta(total: Tree) -> Params:
    """The mean difference of the clients' models, weighted by examples; 0 without any weight."""
    scale = 1.0 / jnp.maximum(total["weight"], 1e-12)
    return jax.tree.map(lambda d: scale * d, total["delta"])


def moved(params: Params, delta: Params, learning_rate: float) -> Params:
    """The global model, moved by so much of a difference."""
    return jax.tree.map(lambda p, d: p + learning_rate * d, params, delta)
