"""Any algorithm of sums, with its users' presence hidden: updates clipped, their sum noisy.

McMahan et al., "Learning differentially private recurrent language models" (ICLR 2018), with fixed
denominators; the clip may adapt (Andrew et al., NeurIPS 2021). `privacy` says what is promised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from shardpar.fl.algorithms.algorithm import Algorithm
from shardpar.fl.examples import Examples
from shardpar.fl.privacy import UserMechanism, clip_update
from shardpar.fl.simulated_noise import simulated_noise
from shardpar.fl.task import Params, Task

Tree = Any
_KEPT = "privacy"


@dataclass(frozen=True)
class PrivateUsers:
    """Clips what the inner algorithm's clients send, and gives its server the noisy mean.

    What a client sends is {"update", "within", "weight", "loss"}; the latter two are 1 and 0.
    Between sum and `server` noise must be added: in deployment by `UserMechanism.central` or
    `DistributedNoise`, with `state["privacy"]["clip"]`; in a simulation `server` does, if it has a
    seed.

    Attributes:
      inner: an algorithm whose `aggregate` is "sum".
      mechanism: what is promised.
      clip: the norm updates may have, at first if it adapts.
      simulated_seed: of a simulation's noise; None in deployment, where `server` adds none.
      simulated_spread: by how much that noise is wider than the mechanism's: under distributed and
        local privacy every client adds some, and their sum has all of it.
    """

    inner: Algorithm
    mechanism: UserMechanism
    clip: float = 1.0
    simulated_seed: int | None = None
    simulated_spread: float = 1.0
    aggregate: ClassVar[Literal["sum", "each"]] = "sum"

    def __post_init__(self) -> None:
        """Refuses algorithms that look at single updates."""
        if self.inner.aggregate != "sum":
            raise ValueError(
                f"{type(self.inner).__name__} sees every update; noise on the sum hides none of "
                "them. Use an algorithm of sums"
            )

    def server_init(self, params: Params) -> Tree:
        """The inner state, the clip and the round."""
        kept = {"clip": jnp.float32(self.clip), "round": jnp.int32(0)}
        return {**self.inner.server_init(params), _KEPT: kept}

    def client_init(self, params: Params) -> Tree:
        """The inner algorithm's."""
        return self.inner.client_init(params)

    def broadcast(self, state: Tree) -> Tree:
        """What the inner algorithm sends, and the clip."""
        return {"inner": self.inner.broadcast(_inner(state)), "clip": state[_KEPT]["clip"]}

    def client(
        self, task: Task, broadcast: Tree, kept: Tree, examples: Examples
    ) -> tuple[Tree, Tree]:
        """The inner algorithm's round, clipped."""
        update, kept = self.inner.client(task, broadcast["inner"], kept, examples)
        there = (update["weight"] > 0).astype(jnp.float32)
        clipped, within = clip_update(update, broadcast["clip"])
        sent = {"update": clipped, "within": within, "weight": there, "loss": jnp.float32(0)}
        return sent, kept

    def server(self, state: Tree, total: Tree, clients: Any) -> Tree:
        """The inner server's step with the noisy sum over the expected number of clients."""
        clip, round_ = state[_KEPT]["clip"], state[_KEPT]["round"]
        update, within = total["update"], total["within"]
        mechanism = self.mechanism
        if self.simulated_seed is not None:
            key = jax.random.fold_in(jax.random.key(self.simulated_seed), round_)
            for_update, for_count = jax.random.split(key)
            unit, spread = mechanism.update_multiplier * clip, self.simulated_spread
            update = simulated_noise(for_update, update, spread * unit)
            within = simulated_noise(for_count, within, spread * mechanism.sigma_count)
        expected = jnp.float32(mechanism.clients)
        inner_total = {**update, "weight": expected, "loss": jnp.float32(0)}
        inner = self.inner.server(_inner(state), inner_total, expected)
        after = {"clip": mechanism.next_clip(clip, within), "round": round_ + 1}
        return {**inner, _KEPT: after}


def _inner(state: Tree) -> Tree:
    return {name: value for name, value in state.items() if name != _KEPT}
