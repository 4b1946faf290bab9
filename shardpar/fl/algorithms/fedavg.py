"""Federated averaging: local SGD, then the mean of the models weighted by examples.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (2017),
arXiv 1602.05629, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from shardpar.fl.examples import Examples
from shardpar.fl.task import Params, Task

Tree = Any


@dataclass(frozen=True)
class FedAvg:
    """Clients take SGD steps from the global model; the server moves by their mean difference.

    Attributes:
      learning_rate: of the clients' steps.
      server_learning_rate: by how much of the mean difference the global model moves.
    """

    learning_rate: float = 0.1
    server_learning_rate: float = 1.0
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

    def client(
        self, task: Task, broadcast: Tree, kept: Tree, examples: Examples
    ) -> tuple[Tree, Tree]:
        """Local SGD; sends the difference times the number of examples."""
        start = broadcast["params"]

        def step(carry: tuple[Params, jax.Array], rows: jax.Array) -> tuple[Any, None]:
            params, loss = carry
            grads, sum_, _ = task.gradient(params, examples.batch(rows))
            params = jax.tree.map(lambda p, g: p - self.learning_rate * g, params, grads)
            return (params, loss + sum_), None

        (params, loss), _ = jax.lax.scan(step, (start, jnp.float32(0)), examples.order)
        weight = jnp.sum(examples.order >= 0).astype(jnp.float32)
        delta = jax.tree.map(lambda new, old: weight * (new - old), params, start)
        return {"delta": delta, "weight": weight, "loss": loss}, kept

    def server(self, state: Tree, total: Tree, clients: Any) -> Tree:
        """Moves by the weighted mean; a round without weight changes nothing."""
        scale = self.server_learning_rate / jnp.maximum(total["weight"], 1e-12)
        return {
            **state,
            "params": jax.tree.map(lambda p, d: p + scale * d, state["params"], total["delta"]),
        }
