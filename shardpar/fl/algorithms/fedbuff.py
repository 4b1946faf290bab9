"""FedBuff: the server steps whenever a few updates have come, however old the models they are of.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation" (2022), arXiv 2106.06639,
algorithm 1; updates count less the staler they are, by (1 + staleness)^-exponent. Which update is
how stale is for whoever runs it to say: the caller of `Simulation.stale_round` in a simulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shardpar.fl.algorithms.plain import Plain, moved
from shardpar.fl.examples import Examples
from shardpar.fl.task import Task

Tree = Any


@dataclass(frozen=True)
class FedBuff(Plain):
    """The server moves by the mean of `buffer` discounted differences; clients count alike.

    Attributes:
      buffer: updates to a step of the server; the paper's K.
      learning_rate: of the clients' steps.
      server_learning_rate: by how much of the mean difference the global model moves.
      momentum: of the clients' steps.
      exponent: of the discount; 0 takes stale updates as they are.
    """

    buffer: int = 10
    learning_rate: float = 0.1
    server_learning_rate: float = 1.0
    momentum: float = 0.0
    exponent: float = 0.5

    def client(
        self, task: Task, broadcast: Tree, kept: Tree, examples: Examples
    ) -> tuple[Tree, Tree]:
        """Local SGD from the model it was sent; sends the difference as it is."""
        trained = self.trained(task, broadcast, examples)
        present = (trained.weight > 0).astype(jnp.float32)
        return {**trained.alone(broadcast["params"]), "participants": present}, kept

    def discounted(self, sent: Tree, staleness: Any) -> Tree:
        """An update that was computed so many server steps ago, as it goes into the buffer."""
        scale = jnp.power(1.0 + jnp.float32(staleness), -self.exponent)
        return {**sent, "delta": jax.tree.map(lambda d: scale * d, sent["delta"])}

    def server(self, state: Tree, total: Tree, clients: Any) -> Tree:
        """Moves by the sum of the discounted differences over the number of updates."""
        scale = 1.0 / jnp.maximum(total["participants"], 1.0)
        delta = jax.tree.map(lambda d: scale * d, total["delta"])
        return {**state, "params": moved(state["params"], delta, self.server_learning_rate)}
