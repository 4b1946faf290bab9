"""Ditto: beside the global model each client trains one of its own, held near the global one.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization" (2021), arXiv
2012.04221, algorithm 1 with FedAvg for the global model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardpar.fl.algorithms.local import local_sgd
from shardpar.fl.algorithms.plain import Plain
from shardpar.fl.examples import Examples
from shardpar.fl.task import Params, Task

Tree = Any


@dataclass(frozen=True)
class Ditto(Plain):
    """FedAvg for the global model; `kept["params"]` is the client's own.

    Attributes:
      mu: how strongly the own model is pulled to the global one; the paper's λ. 0 trains alone.
      learning_rate: of the steps of both models.
      server_learning_rate: by how much of the mean difference the global model moves.
      momentum: of the steps of both models.
    """

    mu: float = 0.1
    learning_rate: float = 0.1
    server_learning_rate: float = 1.0
    momentum: float = 0.0

    def client_init(self, params: Params) -> Tree:
        """The client's own model, as the global one began."""
        return {"params": params}

    def client(
        self, task: Task, broadcast: Tree, kept: Tree, examples: Examples
    ) -> tuple[Tree, Tree]:
        """Trains both models over the same batches; sends the global one's difference."""
        start = broadcast["params"]
        rates = {"learning_rate": self.learning_rate, "momentum": self.momentum}
        trained = local_sgd(task, start, examples, **rates)
        own = local_sgd(task, kept["params"], examples, **rates, pull=self.mu, towards=start)
        return trained.sums(start), {"params": own.params}
