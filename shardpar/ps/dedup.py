"""One row, one entry: finds the distinct ids of a step, exactly, before anything is scattered.

Scattering with repeated indices is slow on some backends and wrong for nonlinear rules. On
the host and in a program the same trick needs no sort: every position writes its number to
its id's place in a scratch array, and the number that stays there is the id's
representative. Whichever wins, the answer is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST_SCRATCH = 1 << 27


@dataclass(frozen=True)
class Distinct:
    """The distinct ids of a step, and where each lookup finds its own.

    Attributes:
      ids: int32[u]; no id twice, no negative one.
      positions: int32, shaped as the lookups: `ids[positions]` are the lookups, and
        negative lookups are -1.
    """

    ids: np.ndarray
    positions: np.ndarray


@dataclass
class HostDedup:
    """Finds distinct ids on the host, about a millisecond for 160,000 of them.

    It keeps one int32 per row of the table between calls; for more than 2**27 rows it sorts
    instead. Not for several threads at once.

    >>> found = HostDedup(10)(np.array([[7, 3], [3, -1]]))
    >>> sorted(found.ids.tolist()), found.ids[found.positions[0]].tolist()
    ([3, 7], [7, 3])
    >>> int(found.positions[1, 1])
    -1
    """

    rows: int
    _scratch: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._scratch = np.empty(self.rows if self.rows <= _LARGEST_SCRATCH else 0, np.int32)

    def __call__(self, ids: np.ndarray) -> Distinct:
        """The distinct among ids int[...] below `rows`; negative ones are padding."""
        flat = np.ascontiguousarray(ids).reshape(-1)
        if not flat.size:
            return Distinct(np.zeros(0, np.int32), np.zeros(ids.shape, np.int32))
        if flat.min() >= 0:
            distinct, positions = self._found(flat)
        else:
            there = np.flatnonzero(flat >= 0)
            distinct, inner = self._found(flat[there])
            positions = np.full(flat.shape, -1, np.int32)
            positions[there] = inner
        return Distinct(distinct.astype(np.int32), positions.reshape(ids.shape))

    def _found(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.rows > _LARGEST_SCRATCH:
            distinct, inverse = np.unique(flat, return_inverse=True)
            return distinct, inverse.astype(np.int32).reshape(-1)
        # NumPy is twice as fast with indices of its own type, and where it need not look for
        # any that are out of range.
        at = flat.astype(np.intp)
        iota = np.arange(flat.size, dtype=np.int32)
        self._scratch[at] = iota
        winners = self._scratch.take(at, mode="clip")
        kept = np.flatnonzero(winners == iota)
        ranks = np.empty(flat.size, np.int32)
        ranks[kept] = np.arange(kept.size, dtype=np.int32)
        return flat[kept], ranks.take(winners, mode="clip")


def representatives(ids: jax.Array, scratch: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each position the one that stands for its id, inside a program.

    Args:
      ids: int32[n]; those below 0 stand for themselves.
      scratch: int32[rows], of any content, for ids below `rows`.

    Returns:
      int32[n] winners, with `ids[winners] == ids`, equal for equal ids; and the scratch.

    >>> winners, _ = representatives(jnp.array([5, 2, 5]), jnp.zeros(6, jnp.int32))
    >>> int(winners[0]) == int(winners[2]), int(winners[1])
    (True, 1)
    """
    iota = jnp.arange(ids.shape[0], dtype=jnp.int32)
    places = jnp.where(ids < 0, scratch.shape[0], ids)
    scratch = scratch.at[places].set(iota, mode="drop")
    winners = scratch.at[places].get(mode="fill", fill_value=-1)
    return jnp.where(ids < 0, iota, winners), scratch


def sorted_representatives(ids: jax.Array) -> jax.Array:
    """As `representatives`, by sorting: slower on CPUs, but no memory for each row of a table.

    >>> winners = sorted_representatives(jnp.array([5, 2, 5]))
    >>> int(winners[0]) == int(winners[2]), int(winners[1])
    (True, 1)
    """
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    ordered = ids[order]
    begins = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    iota = jnp.arange(ids.shape[0], dtype=jnp.int32)
    first = jax.lax.cummax(jnp.where(begins, iota, 0))
    winners = jnp.zeros_like(iota).at[order].set(order[first], unique_indices=True)
    return jnp.where(ids < 0, iota, winners)


def padded(distinct: np.ndarray, size: int) -> np.ndarray:
    """Distinct ids with -1 behind them, up to a size that programs are compiled for."""
    out = np.full(size, -1, np.int32)
    out[: distinct.size] = distinct
    return out


def rounded_size(count: int, at_least: int = 0, first: int = 256) -> int:
    """The size a program is compiled for: sizes grow by about a fifth, so that few are needed.

    `first` is the smallest size, a power of two.

    >>> rounded_size(1000), rounded_size(1025), rounded_size(1000, at_least=2000)
    (1024, 1280, 2000)
    """
    size = first
    while size < count:
        power = 1 << (size.bit_length() - 1)
        size += power // 4
    return max(size, at_least)
