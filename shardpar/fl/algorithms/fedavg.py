"""Federated averaging: local SGD, then the mean of the models weighted by examples.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (2017),
arXiv 1602.05629, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardpar.fl.algorithms.local import local_sgd
from shardpar.fl.algorithms.plain import Plain, mean_delta, moved
from shardpar.fl.examples import Examples
from shardpar.fl.task import Task

Tree = Any


@dataclass(frozen=True)
class FedAvg(Plain):
    """Clients take SGD steps from the global model; the server moves by their mean difference.

    Attributes:
      learning_rate: of the clients' steps.
      server_learning_rate: by how much of the mean difference the global model moves.
      momentum: of the clients' steps, which begin without any in every round.
    """

    learning_rate: float = 0.1
    server_learning_rate: float = 1.0
    momentum: float = 0.0

    def client(
        self, task: Task, broadcast: Tree, kept: Tree, examples: Examples
    ) -> tuple[Tree, Tree]:
        """Local SGD; sends the difference times the number of examples."""
        start = broadcast["params"]
        trained = local_sgd(
            task, start, examples, learning_rate=self.learning_rate, momentum=self.momentum
        )
        return trained.sums(start), kept

    def server(self, state: Tree, total: Tree, clients: Any) -> Tree:
        """Moves by the weighted mean; a round without weight changes nothing."""
        params = moved(state["params"], mean_delta(total), self.server_learning_rate)
        return {**state, "params": params}
