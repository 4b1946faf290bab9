"""Federated averaging whose clients train by DP-SGD: single records are hidden from everyone.

Abadi et al., "Deep learning with differential privacy" (CCS 2016): each step draws every record
independently (Poisson), clips each record's gradient, adds noise to the sum and divides by a fixed
number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.flatten_util import ravel_pytree
from scipy import stats

from shardpar.fl.examples import Examples
from shardpar.fl.ledger import Release
from shardpar.fl.privacy import TAIL, noised, release_of
from shardpar.fl.simulated_noise import simulated_noise, simulated_sample
from shardpar.fl.streams import Randomness
from shardpar.fl.task import Params, Task

Tree = Any
# Records whose gradients are in memory together.
_TOGETHER = 32


@dataclass(frozen=True)
class PrivateSGD:
    """Local DP-SGD steps; the server moves by the clients' mean difference.

    A client's order of examples is not used but for how many there are: it draws its own samples,
    from the system's randomness. Neither its loss nor its number of records leaves it.

    Attributes:
      records: how many a client has about; public, and the same for all.
      learning_rate: of the clients' steps.
      clip: the L2 norm a record's gradient may have.
      noise_multiplier: of each step.
      sampling_rate: with which each record is drawn into a step.
      steps: in a round.
      server_learning_rate: by how much of the mean difference the global model moves.
      noise: "secure", or "simulated" from `seed`: then nothing is hidden, and runs repeat.
      seed: of simulated noise.
    """

    records: int
    learning_rate: float = 0.1
    clip: float = 1.0
    noise_multiplier: float = 1.0
    sampling_rate: float = 0.1
    steps: int = 10
    server_learning_rate: float = 1.0
    noise: Literal["secure", "simulated"] = "secure"
    seed: int = 0
    aggregate: ClassVar[Literal["sum", "each"]] = "sum"

    def release(self, dims: int) -> Release:
        """What a client's ledger is to hold for one round; dims are the model's parameters."""
        release = release_of(
            self.noise_multiplier, dims, sampling_rate=self.sampling_rate, count=self.steps
        )
        # A sample larger than its capacity would be no Poisson sample.
        return replace(release, extra_delta=release.extra_delta + TAIL)

    def server_init(self, params: Params) -> Tree:
        """The global model, and the round."""
        return {"params": params, "round": jnp.int32(0)}

    def client_init(self, params: Params) -> Tree:
        """Nothing is kept."""
        return ()

    def broadcast(self, state: Tree) -> Tree:
        """All of it."""
        return state

    def client(
        self, task: Task, broadcast: Tree, kept: Tree, examples: Examples
    ) -> tuple[Tree, Tree]:
        """DP-SGD from the global model; every client with records has the same weight."""
        start = broadcast["params"]
        # Other clients' rows may lie around its own, of which the order names each.
        rows = min(next(iter(examples.arrays.values())).shape[0], examples.order.size)
        end = jnp.max(examples.order, initial=-1) + 1
        begin = jnp.min(jnp.where(examples.order < 0, end, examples.order), initial=end)
        real = end - begin
        capacity = sample_capacity(rows, self.sampling_rate)
        draw, add_noise = self._secure(rows) if self.noise == "secure" else self._simulated(rows)
        key = self._key(broadcast["round"], examples.order)

        def step(params: Params, at: jax.Array) -> tuple[Params, None]:
            chosen = jnp.nonzero(draw(key, at, real), size=capacity, fill_value=-1)[0]
            own = jnp.where(chosen < 0, -1, chosen + begin)
            sum_ = clipped_gradients(task, params, examples, own, self.clip)
            noisy = add_noise(key, at, sum_)
            scale = self.learning_rate / (self.sampling_rate * self.records)
            return jax.tree.map(lambda p, g: p - scale * g, params, noisy), None

        params, _ = jax.lax.scan(step, start, jnp.arange(self.steps))
        there = (real > 0).astype(jnp.float32)
        delta = jax.tree.map(lambda new, old: there * (new - old), params, start)
        return {"delta": delta, "weight": there, "loss": jnp.float32(0)}, kept

    def server(self, state: Tree, total: Tree, clients: Any) -> Tree:
        """Moves by the mean difference."""
        scale = self.server_learning_rate / jnp.maximum(total["weight"], 1e-12)
        move = jax.tree.map(lambda p, d: p + scale * d, state["params"], total["delta"])
        return {"params": move, "round": state["round"] + 1}

    def _secure(self, rows: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        random = Randomness()
        rate, z, unit = self.sampling_rate, self.noise_multiplier, self.noise_multiplier * self.clip

        def sample(real: np.ndarray) -> np.ndarray:
            drawn = random.words(rows) < np.uint64(min(int(rate * 2.0**64), (1 << 64) - 1))
            return drawn & (np.arange(rows) < real)

        def noisy(flat: np.ndarray) -> np.ndarray:
            vector = np.asarray(flat, np.float64) / unit
            return (noised(vector, z, random) * unit).astype(np.float32)

        def draw(_key: jax.Array, _at: jax.Array, real: jax.Array) -> Any:
            return io_callback(sample, jax.ShapeDtypeStruct((rows,), bool), real)

        def add(_key: jax.Array, _at: jax.Array, sum_: Params) -> Any:
            flat, back = ravel_pytree(sum_)
            return back(io_callback(noisy, jax.ShapeDtypeStruct(flat.shape, jnp.float32), flat))

        return draw, add

    def _simulated(self, rows: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def draw(key: jax.Array, at: jax.Array, real: jax.Array) -> Any:
            return simulated_sample(jax.random.fold_in(key, 2 * at), rows, real, self.sampling_rate)

        def add(key: jax.Array, at: jax.Array, sum_: Params) -> Any:
            sigma = self.noise_multiplier * self.clip
            return simulated_noise(jax.random.fold_in(key, 2 * at + 1), sum_, sigma)

        return draw, add

    def _key(self, round_: Any, order: jax.Array) -> jax.Array:
        # A client does not know who it is; its order of examples tells it from the others.
        place = jnp.arange(order.size, dtype=jnp.uint32).reshape(order.shape)
        mixed = (order.astype(jnp.uint32) + 1) * (place * jnp.uint32(2654435761) | jnp.uint32(1))
        key = jax.random.fold_in(jax.random.key(self.seed), round_)
        return jax.random.fold_in(key, jnp.sum(mixed, dtype=jnp.uint32))


def sample_capacity(rows: int, rate: float) -> int:
    """How many rows a Poisson sample of so many may have but with a probability of 1e-12.

    >>> 100 < sample_capacity(1000, 0.1) < 200
    True
    """
    return min(rows, int(stats.binom.isf(TAIL, rows, rate)) + 1)


def clipped_gradients(
    task: Task, params: Params, examples: Examples, rows: jax.Array, clip: float
) -> Params:
    """The sum of the rows' gradients, each cut to an L2 norm; -1 is no row."""
    padding = -rows.size % _TOGETHER
    chunks = jnp.pad(rows, (0, padding), constant_values=-1).reshape(-1, _TOGETHER)

    def one(row: jax.Array) -> Params:
        batch = examples.batch(row[None])
        grads = jax.grad(lambda p: task.loss_sum(p, batch)[0])(params)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        # A gradient that is not finite would take the sum with it, and tell of its record.
        # Norms in float32 are a little off; none may be beyond the clip.
        cut = jnp.minimum(1.0, (1 - 1e-5) * clip / (norm + 1e-30))
        factor = jnp.where(jnp.isfinite(norm), cut, 0.0)
        return jax.tree.map(lambda g: jnp.where(factor > 0, g * factor, 0.0), grads)

    def add(total: Params, chunk: jax.Array) -> tuple[Params, None]:
        grads = jax.vmap(one)(chunk)
        return jax.tree.map(lambda t, g: t + jnp.sum(g, axis=0), total, grads), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), chunks)[0]
