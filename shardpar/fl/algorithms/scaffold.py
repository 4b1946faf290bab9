"""SCAFFOLD: control variates take the drift out of local steps.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning" (2020), arXiv
1910.06378, algorithm 1 with option II.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shardpar.fl.algorithms.local import local_sgd
from shardpar.fl.algorithms.plain import Plain, moved
from shardpar.fl.examples import Examples
from shardpar.fl.task import Params, Task

Tree = Any


@dataclass(frozen=True)
class Scaffold(Plain):
    """Every step is corrected by the server's control minus the client's own; clients count alike.

    Attributes:
      population: clients in all, taking part or not.
      learning_rate: of the clients' steps.
      server_learning_rate: by how much of the mean difference the global model moves.
    """

    population: int
    learning_rate: float = 0.1
    server_learning_rate: float = 1.0

    def server_init(self, params: Params) -> Tree:
        """The global model and a control of 0."""
        return {"params": params, "control": jax.tree.map(jnp.zeros_like, params)}

    def client_init(self, params: Params) -> Tree:
        """The client's control, 0."""
        return {"control": jax.tree.map(jnp.zeros_like, params)}

    def broadcast(self, state: Tree) -> Tree:
        """The global model and the server's control."""
        return {"params": state["params"], "control": state["control"]}

    def client(
        self, task: Task, broadcast: Tree, kept: Tree, examples: Examples
    ) -> tuple[Tree, Tree]:
        """Corrected local SGD; sends how the model and the control changed."""
        start = broadcast["params"]
        correction = jax.tree.map(jnp.subtract, broadcast["control"], kept["control"])
        trained = local_sgd(
            task, start, examples, learning_rate=self.learning_rate, correction=correction
        )
        present = (trained.weight > 0).astype(jnp.float32)
        per_step = present / (self.learning_rate * jnp.maximum(trained.steps, 1.0))
        # Option II: the mean of the gradients that the steps followed, without its correction.
        change = jax.tree.map(
            lambda c, x, y: per_step * (x - y) - present * c,
            broadcast["control"],
            start,
            trained.params,
        )
        sent = {
            **trained.alone(start),
            "control": change,
            "participants": present,
        }
        return sent, {"control": jax.tree.map(jnp.add, kept["control"], change)}

    def server(self, state: Tree, total: Tree, clients: Any) -> Tree:
        """Moves by the mean over participants; the control by the sum over the population."""
        scale = 1.0 / jnp.maximum(total["participants"], 1.0)
        delta = jax.tree.map(lambda d: scale * d, total["delta"])
        control = jax.tree.map(
            lambda c, d: c + d / self.population, state["control"], total["control"]
        )
        params = moved(state["params"], delta, self.server_learning_rate)
        return {**state, "params": params, "control": control}
