"""How the rows of a table begin: each value follows from the table's key and its row alone.

So a row has the same beginning whichever device holds it, and may be made when it is first
asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from typing_extensions import override


class Initializer(Protocol):
    """What makes rows: hashable, and without state."""

    def __call__(self, key: jax.Array, rows: jax.Array, dim: int) -> jax.Array:
        """The values, float32[n, dim], of the rows int32[n] of a table with this key."""
        ...


@dataclass(frozen=True)
class Zeros(Initializer):
    """Every value is 0.

    >>> import jax, jax.numpy as jnp
    >>> Zeros()(jax.random.key(0), jnp.arange(2), 3).tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """

    @override
    def __call__(self, key: jax.Array, rows: jax.Array, dim: int) -> jax.Array:
        return jnp.zeros((rows.shape[0], dim), jnp.float32)


@dataclass(frozen=True)
class Normal(Initializer):
    """Values from a normal distribution around 0.

    >>> import jax, jax.numpy as jnp
    >>> whole = Normal(0.1)(jax.random.key(0), jnp.arange(5), 2)
    >>> alone = Normal(0.1)(jax.random.key(0), jnp.array([3]), 2)
    >>> bool((whole[3] == alone[0]).all())
    True
    """

    std: float = 0.01

    @override
    def __call__(self, key: jax.Array, rows: jax.Array, dim: int) -> jax.Array:
        draw = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), (dim,)))
        return self.std * draw(rows)


@dataclass(frozen=True)
class Uniform(Initializer):
    """Values evenly spread over [-limit, limit).

    >>> import jax, jax.numpy as jnp
    >>> bool((abs(Uniform(0.5)(jax.random.key(0), jnp.arange(9), 4)) <= 0.5).all())
    True
    """

    limit: float = 0.01

    @override
    def __call__(self, key: jax.Array, rows: jax.Array, dim: int) -> jax.Array:
        def draw(row: jax.Array) -> jax.Array:
            return jax.random.uniform(
                jax.random.fold_in(key, row), (dim,), minval=-self.limit, maxval=self.limit
            )

        return jax.vmap(draw)(rows)


@dataclass(frozen=True)
class Columns(Initializer):
    """Several beginnings side by side, for a table whose rows hold several things.

    A factorisation machine keeps a feature's weight and its factors in one row, since both
    are looked up together: `Columns(((Zeros(), 1), (Normal(0.01), 8)))`.

    >>> import jax, jax.numpy as jnp
    >>> begin = Columns(((Zeros(), 1), (Normal(), 2)))
    >>> begin(jax.random.key(0), jnp.arange(4), 3).shape
    (4, 3)
    """

    parts: tuple[tuple[Initializer, int], ...]

    @override
    def __call__(self, key: jax.Array, rows: jax.Array, dim: int) -> jax.Array:
        total = sum(width for _, width in self.parts)
        if total != dim:
            raise ValueError(f"the parts of Columns have {total} columns, but the table has {dim}")
        return jnp.concatenate([part(key, rows, width) for part, width in self.parts], axis=1)
