"""Matrix factorisation of explicit ratings: a mean, biases, and a dot product of factors.

Koren, Bell and Volinsky, "Matrix factorization techniques for recommender systems", 2009. A
user's row holds its bias and then its factors, and so does an item's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardpar.errors import ConfigError, DataError
from shardpar.ps.algorithms.embeddings import Progress, quiet
from shardpar.ps.algorithms.lookup_program import (
    Batch,
    Formula,
    Lookup,
    LookupProgram,
    Rows,
    trained,
)
from shardpar.ps.initializers import Columns, Normal, Zeros
from shardpar.ps.optimizers import AdaGrad, RowOptimizer
from shardpar.ps.placement import Placement
from shardpar.ps.table import Table, require_ids


@dataclass(frozen=True)
class FactorOptions:
    """Attributes of the factorisation.

    Attributes:
      factors: of each user and item.
      passes: over the ratings, each in an order of its own.
      penalty: of the squares of a row, for each of its ratings.
      optimizer: of both tables. Gradients of a step are summed, not averaged.
      init_std: of the factors at the beginning.
      batch: ratings of a step; None takes a hundredth of all, 64 to 8192.
    """

    factors: int = 16
    passes: int = 20
    penalty: float = 0.02
    optimizer: RowOptimizer = field(default_factory=lambda: AdaGrad(0.1))
    init_std: float = 0.1
    batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("factors", "passes", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} of a factorisation is at least 1, not {value}")
        if self.penalty < 0 or self.init_std <= 0:
            raise ConfigError(
                "penalty is not negative and init_std is above 0, not "
                f"{self.penalty} and {self.init_std}"
            )


@dataclass(frozen=True, eq=False)
class Factorization:
    """What was learnt.

    Attributes:
      mean: of all ratings.
      user_bias: float32[users].
      item_bias: float32[items].
      user_factors: float32[users, factors].
      item_factors: float32[items, factors].
      losses: the mean squared error of each pass, while learning.
    """

    mean: float
    user_bias: np.ndarray
    item_bias: np.ndarray
    user_factors: np.ndarray
    item_factors: np.ndarray
    losses: tuple[float, ...]

    def predict(self, users: Any, items: Any) -> np.ndarray:
        """The rating of each pair, float64[n].

        Raises:
          DataError: there is no such user or item.
        """
        users, items = np.asarray(users), np.asarray(items)
        require_ids(users, len(self.user_bias), "the table of users")
        require_ids(items, len(self.item_bias), "the table of items")
        product = np.einsum(
            "nf,nf->n", self.user_factors[users], self.item_factors[items], dtype=np.float64
        )
        return self.mean + self.user_bias[users] + self.item_bias[items] + product

    def rmse(self, users: Any, items: Any, ratings: Any) -> float:
        """The root of the mean squared error of these ratings."""
        return float(np.sqrt(np.mean((self.predict(users, items) - np.asarray(ratings)) ** 2)))


def squared_error(penalty: float) -> Formula:
    """The gradients of (error² + penalty · squares of both rows) / 2.

    Args:
      penalty: of the squares.

    Returns:
      A formula of the rows of "users" and "items", [n, 1 + factors] each, with "ratings" less
      their mean and "weights" [n]. Its loss is the squared error.
    """

    def formula(rows: Rows, batch: Batch) -> tuple[Rows, jax.Array, jax.Array]:
        user, item = rows
        weights = batch["weights"]
        guess = user[:, 0] + item[:, 0] + (user[:, 1:] * item[:, 1:]).sum(axis=1)
        error = (guess - batch["ratings"]) * weights
        ones = jnp.ones_like(error)[:, None]
        beside = (
            jnp.concatenate([ones, item[:, 1:]], axis=1),
            jnp.concatenate([ones, user[:, 1:]], axis=1),
        )
        gradients = tuple(
            error[:, None] * other + penalty * weights[:, None] * row
            for row, other in zip((user, item), beside, strict=True)
        )
        return gradients, (error * error).sum(), weights.sum()

    return formula


def fit(
    options: FactorOptions,
    shape: tuple[int, int],
    users: Any,
    items: Any,
    ratings: Any,
    *,
    seed: int = 0,
    devices: Sequence[jax.Device] | None = None,
    placement: Placement | None = None,
    progress: Progress = quiet,
) -> Factorization:
    """Factorises the ratings that there are.

    Args:
      options: of the algorithm.
      shape: how many users and items.
      users: int[n], 0 to shape[0] - 1.
      items: int[n], 0 to shape[1] - 1.
      ratings: float[n], finite.
      seed: of everything random.
      devices: None takes all.
      placement: of both tables; None deals their rows over all devices.
      progress: called now and then with steps done, of how many, and the loss of late.

    Raises:
      DataError: there are no ratings, one is not finite, or there is no such user or item.
    """
    users, items = np.asarray(users), np.asarray(items)
    values = np.asarray(ratings, np.float32)
    if not (users.ndim == 1 and users.shape == items.shape == values.shape and values.size):
        raise DataError(
            f"users, items and ratings are {users.shape}, {items.shape} and {values.shape}; give "
            "one of each per rating, and at least one"
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise DataError(f"rating {bad[0]} is {values[bad[0]]}; leave ratings that are none out")
    require_ids(users, shape[0], "the table of users")
    require_ids(items, shape[1], "the table of items")
    devices = tuple(jax.devices() if devices is None else devices)
    batch = options.batch or min(max(len(values) // 100, 64), 8192)
    batch = -(-batch // len(devices)) * len(devices)
    start = Columns(((Zeros(), 1), (Normal(options.init_std), options.factors)))
    program = LookupProgram(
        [Table(rows, 1 + options.factors, options.optimizer, start) for rows in shape],
        (Lookup(0, "users"), Lookup(1, "items")),
        squared_error(options.penalty),
        devices=devices,
        placement=placement,
    )
    mean = float(values.mean(dtype=np.float64))
    random = np.random.default_rng((seed, 5))
    passes = (
        _shuffled(users, items, values - np.float32(mean), batch, random)
        for _ in range(options.passes)
    )
    steps = options.passes * -(-len(values) // batch)
    states, losses = trained(program, seed, passes, steps, progress)
    user, item = (
        placed.whole(state)[0] for placed, state in zip(program.tables, states, strict=True)
    )
    return Factorization(mean, user[:, 0], item[:, 0], user[:, 1:], item[:, 1:], losses)


def _shuffled(
    users: np.ndarray,
    items: np.ndarray,
    ratings: np.ndarray,
    batch: int,
    random: np.random.Generator,
) -> Iterator[dict[str, np.ndarray]]:
    """All ratings once; the last batch is filled with some of weight 0."""
    order = random.permutation(len(ratings))
    order = np.append(order, np.full(-len(order) % batch, -1))
    for at in range(0, len(order), batch):
        now = order[at : at + batch]
        there = now >= 0
        yield {
            "users": np.where(there, users[now], -1).astype(np.int32),
            "items": np.where(there, items[now], -1).astype(np.int32),
            "ratings": np.where(there, ratings[now], 0).astype(np.float32),
            "weights": there.astype(np.float32),
        }
