"""FedAdagrad, FedYogi and FedAdam: the server treats the mean difference as a gradient.

Reddi et al., "Adaptive Federated Optimization" (2021), arXiv 2003.00295, algorithm 2. The mean is
weighted by examples here, as in their experiments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from shardpar.fl.algorithms.plain import Plain, mean_delta
from shardpar.fl.task import Params

Tree = Any


@dataclass(frozen=True)
class FedOpt(Plain):
    """Local SGD, and an adaptive step at the server.

    Attributes:
      rule: how the second moment follows the squared differences.
      learning_rate: of the clients' steps.
      server_learning_rate: of the server's steps.
      momentum: of the clients' steps.
      b1: decay of the first moment; the paper takes 0 for adagrad.
      b2: decay of the second, for adam and yogi.
      tau: added to the root of the second moment, which begins as its square.
    """

    rule: Literal["adagrad", "yogi", "adam"] = "adam"
    learning_rate: float = 0.1
    server_learning_rate: float = 0.03
    momentum: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    tau: float = 1e-3

    def server_init(self, params: Params) -> Tree:
        """The global model, a first moment of 0 and a second one of tau²."""
        return {
            "params": params,
            "first": jax.tree.map(jnp.zeros_like, params),
            "second": jax.tree.map(lambda p: jnp.full_like(p, self.tau**2), params),
        }

    def server(self, state: Tree, total: Tree, clients: Any) -> Tree:
        """One adaptive step along the weighted mean; moments live on in a round without weight."""
        delta = mean_delta(total)
        first = jax.tree.map(lambda m, d: self.b1 * m + (1 - self.b1) * d, state["first"], delta)
        second = jax.tree.map(self._second, state["second"], delta)
        params = jax.tree.map(
            lambda p, m, v: p + self.server_learning_rate * m / (jnp.sqrt(v) + self.tau),
            state["params"],
            first,
            second,
        )
        return {**state, "params": params, "first": first, "second": second}

    def _second(self, v: jax.Array, d: jax.Array) -> jax.Array:
        square = d * d
        if self.rule == "adagrad":
            return v + square
        if self.rule == "yogi":
            return v - (1 - self.b2) * square * jnp.sign(v - square)
        return self.b2 * v + (1 - self.b2) * square
