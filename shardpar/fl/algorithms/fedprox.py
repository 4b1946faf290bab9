"""FedProx: local steps are pulled back to the global model, so unlike clients drift less apart.

Li et al., "Federated Optimization in Heterogeneous Networks" (2020), arXiv 1812.06127, algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardpar.fl.algorithms.local import local_sgd
from shardpar.fl.algorithms.plain import Plain
from shardpar.fl.examples import Examples
from shardpar.fl.task import Task

Tree = Any


@dataclass(frozen=True)
class FedProx(Plain):
    """Clients minimise their loss plus `mu / 2 ‖w - global‖²`; the server averages.

    Attributes:
      mu: strength of the pull; with 0 this is FedAvg, bit for bit.
      learning_rate: of the clients' steps.
      server_learning_rate: by how much of the mean difference the global model moves.
      momentum: of the clients' steps.
    """

    mu: float = 0.01
    learning_rate: float = 0.1
    server_learning_rate: float = 1.0
    momentum: float = 0.0

    def client(
        self, task: Task, broadcast: Tree, kept: Tree, examples: Examples
    ) -> tuple[Tree, Tree]:
        """Proximal local SGD; sends the difference times the number of examples."""
        start = broadcast["params"]
        trained = local_sgd(
            task,
            start,
            examples,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            pull=self.mu,
        )
        return trained.sums(start), kept
