"""FedAvgM: the server moves with momentum.

Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification" (2019), arXiv 1909.06335, section 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shardpar.fl.algorithms.plain import Plain, mean_delta, moved
from shardpar.fl.task import Params

Tree = Any


@dataclass(frozen=True)
class FedAvgM(Plain):
    """As FedAvg, but the server's step is `v = beta v + mean difference`.

    Attributes:
      beta: the server's momentum; with 0 this is FedAvg.
      learning_rate: of the clients' steps.
      server_learning_rate: by how much of v the global model moves.
      momentum: of the clients' steps.
    """

    beta: float = 0.9
    learning_rate: float = 0.1
    server_learning_rate: float = 1.0
    momentum: float = 0.0

    def server_init(self, params: Params) -> Tree:
        """The global model, and no velocity yet."""
        return {"params": params, "velocity": jax.tree.map(jnp.zeros_like, params)}

    def server(self, state: Tree, total: Tree, clients: Any) -> Tree:
        """Adds the weighted mean to the velocity and moves by it."""
        velocity = jax.tree.map(
            lambda v, d: self.beta * v + d, state["velocity"], mean_delta(total)
        )
        params = moved(state["params"], velocity, self.server_learning_rate)
        return {**state, "params": params, "velocity": velocity}
