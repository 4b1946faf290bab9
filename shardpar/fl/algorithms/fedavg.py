"""Federated averaging: local SGD, then the mean of the models weighted by examples.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (2017),
arXiv 1602.05629, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardpar.fl.algorithms.plain import Plain

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
