"""How a row takes its gradient: rules that touch only the rows of a step.

Every rule gets the whole gradient of a row at once, summed over the batch and over all
workers, because all but SGD are nonlinear in it. Rows are independent of each other, so a
rule runs on the device that owns the row. `rate` scales the learning rate of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from typing_extensions import override

Slots = tuple[jax.Array, ...]


class RowOptimizer(Protocol):
    """A rule: hashable, without state of its own; what it keeps per row are the slots."""

    def slots(self, dim: int) -> tuple[tuple[int, float], ...]:
        """Width and first value of each array that is kept per row."""
        ...

    def update(
        self, rows: jax.Array, slots: Slots, gradient: jax.Array, step: jax.Array, rate: jax.Array
    ) -> tuple[jax.Array, Slots]:
        """New rows [n, dim] and slots; `step` counts from 1."""
        ...


@dataclass(frozen=True)
class SGD(RowOptimizer):
    """w - lr * g.

    >>> import jax.numpy as jnp
    >>> rows, _ = SGD(0.5).update(jnp.ones((1, 2)), (), jnp.ones((1, 2)), 1, 1.0)
    >>> rows.tolist()
    [[0.5, 0.5]]
    """

    learning_rate: float = 0.1

    @override
    def slots(self, dim: int) -> tuple[tuple[int, float], ...]:
        return ()

    @override
    def update(
        self, rows: jax.Array, slots: Slots, gradient: jax.Array, step: jax.Array, rate: jax.Array
    ) -> tuple[jax.Array, Slots]:
        return rows - self.learning_rate * rate * gradient, slots


@dataclass(frozen=True)
class Momentum(RowOptimizer):
    """Heavy ball or Nesterov, with a velocity that rests while its row is not touched."""

    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False

    @override
    def slots(self, dim: int) -> tuple[tuple[int, float], ...]:
        return ((dim, 0.0),)

    @override
    def update(
        self, rows: jax.Array, slots: Slots, gradient: jax.Array, step: jax.Array, rate: jax.Array
    ) -> tuple[jax.Array, Slots]:
        velocity = self.momentum * slots[0] + gradient
        push = gradient + self.momentum * velocity if self.nesterov else velocity
        return rows - self.learning_rate * rate * push, (velocity,)


@dataclass(frozen=True)
class AdaGrad(RowOptimizer):
    """Divides by the root of the sum of squares so far (Duchi, Hazan, Singer, 2011)."""

    learning_rate: float = 0.05
    initial: float = 0.0
    eps: float = 1e-10

    @override
    def slots(self, dim: int) -> tuple[tuple[int, float], ...]:
        return ((dim, self.initial),)

    @override
    def update(
        self, rows: jax.Array, slots: Slots, gradient: jax.Array, step: jax.Array, rate: jax.Array
    ) -> tuple[jax.Array, Slots]:
        total = slots[0] + gradient * gradient
        moved = self.learning_rate * rate * gradient / (jnp.sqrt(total) + self.eps)
        return rows - moved, (total,)


@dataclass(frozen=True)
class RowWiseAdaGrad(RowOptimizer):
    """AdaGrad with one number per row, the mean of squares: 1 / dim of the memory."""

    learning_rate: float = 0.05
    initial: float = 0.0
    eps: float = 1e-10

    @override
    def slots(self, dim: int) -> tuple[tuple[int, float], ...]:
        return ((1, self.initial),)

    @override
    def update(
        self, rows: jax.Array, slots: Slots, gradient: jax.Array, step: jax.Array, rate: jax.Array
    ) -> tuple[jax.Array, Slots]:
        total = slots[0] + jnp.mean(gradient * gradient, axis=1, keepdims=True)
        moved = self.learning_rate * rate * gradient / (jnp.sqrt(total) + self.eps)
        return rows - moved, (total,)


@dataclass(frozen=True)
class LazyAdam(RowOptimizer):
    """Adam whose moments rest while their row is not touched (Kingma, Ba, 2015).

    The bias correction counts the steps of the table, as `torch.optim.SparseAdam` does.
    """

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    @override
    def slots(self, dim: int) -> tuple[tuple[int, float], ...]:
        return ((dim, 0.0), (dim, 0.0))

    @override
    def update(
        self, rows: jax.Array, slots: Slots, gradient: jax.Array, step: jax.Array, rate: jax.Array
    ) -> tuple[jax.Array, Slots]:
        count = jnp.asarray(step, jnp.float32)
        mean = self.b1 * slots[0] + (1 - self.b1) * gradient
        square = self.b2 * slots[1] + (1 - self.b2) * gradient * gradient
        scale = jnp.sqrt(1 - self.b2**count) / (1 - self.b1**count)
        moved = self.learning_rate * rate * scale * mean / (jnp.sqrt(square) + self.eps)
        return rows - moved, (mean, square)


@dataclass(frozen=True)
class FTRL(RowOptimizer):
    """Follow the regularised leader, proximal: weights with few bits of evidence stay 0.

    McMahan et al., "Ad Click Prediction: a View from the Trenches", 2013. A row follows from
    the slots z and n. Where a row does not begin at 0, as factors do not, z begins with what
    the row follows from: from 0 they would all be back at 0, and stay, after one step.

    >>> import jax.numpy as jnp
    >>> rule = FTRL(alpha=1.0, l1=1.0, l2=0.0)
    >>> zero = jnp.zeros((1, 1))
    >>> bool(rule.update(zero, (zero, zero), 0.5 + zero, 1, 1.0)[0][0, 0] == 0)
    True
    """

    alpha: float = 0.1
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    @override
    def slots(self, dim: int) -> tuple[tuple[int, float], ...]:
        return ((dim, 0.0), (dim, 0.0))

    @override
    def update(
        self, rows: jax.Array, slots: Slots, gradient: jax.Array, step: jax.Array, rate: jax.Array
    ) -> tuple[jax.Array, Slots]:
        z, n = slots
        alpha = self.alpha * rate
        total = n + gradient * gradient
        begin = -(self.beta / alpha + self.l2) * rows - self.l1 * jnp.sign(rows)
        z = jnp.where(n == 0, begin, z)
        z = z + gradient - (jnp.sqrt(total) - jnp.sqrt(n)) / alpha * rows
        strength = (self.beta + jnp.sqrt(total)) / alpha + self.l2
        kept = jnp.sign(z) * jnp.maximum(jnp.abs(z) - self.l1, 0.0)
        # Without beta and l2, a row that had no gradient yet has no strength: it stays.
        moved = -kept / jnp.where(strength > 0, strength, 1.0)
        return jnp.where(strength > 0, moved, rows), (z, total)
