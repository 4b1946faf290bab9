"""FedNova: differences are divided by the client's own number of steps before they are averaged.

Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization"
(2020), arXiv 2007.07481, equation 6 with the choice of section 4 for τ_eff.
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
class FedNova(Plain):
    """Clients with more steps count no more than their examples do.

    Attributes:
      learning_rate: of the clients' steps.
      server_learning_rate: by how much of the result the global model moves.
      momentum: of the clients' steps.
    """

    learning_rate: float = 0.1
    server_learning_rate: float = 1.0
    momentum: float = 0.0

    def client(
        self, task: Task, broadcast: Tree, kept: Tree, examples: Examples
    ) -> tuple[Tree, Tree]:
        """Local SGD; sends the difference per unit of gradient, and how many units there were."""
        start, trained = broadcast["params"], self.trained(task, broadcast, examples)
        units = self._units(trained.steps)
        scale = trained.weight / jnp.maximum(units, 1.0)
        delta = jax.tree.map(lambda new, old: scale * (new - old), trained.params, start)
        sent = {
            "delta": delta,
            "units": trained.weight * units,
            "weight": trained.weight,
            "loss": trained.loss,
        }
        return sent, kept

    def server(self, state: Tree, total: Tree, clients: Any) -> Tree:
        """Moves by (mean units) times (mean difference per unit)."""
        weight = jnp.maximum(total["weight"], 1e-12)
        scale = total["units"] / weight / weight
        delta = jax.tree.map(lambda d: scale * d, total["delta"])
        return {**state, "params": moved(state["params"], delta, self.server_learning_rate)}

    def _units(self, steps: jax.Array) -> jax.Array:
        """‖a‖₁: how often, in all, the gradients of the steps are counted in the difference."""
        rho = self.momentum
        if not rho:
            return steps
        return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
