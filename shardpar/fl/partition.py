"""Decides which examples are whose when one data set is split over parties for a simulation.

Label skew by a Dirichlet distribution is that of Hsu et al. (arXiv 1909.06335); shards of sorted
labels that of McMahan et al. (arXiv 1602.05629).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shardpar.errors import DataError

Parts = tuple[np.ndarray, ...]

_ATTEMPTS = 1000


def iid(examples: int, parties: int, *, seed: int) -> Parts:
    """A random partition into parts of equal size, give or take one.

    Args:
      examples: how many there are.
      parties: how many parts to make.
      seed: of the draw.

    Returns:
      For each party the rows it holds, int64, ascending.

    Raises:
      DataError: there are fewer examples than parties.

    >>> [len(part) for part in iid(10, 3, seed=0)]
    [4, 3, 3]
    """
    _require_enough(examples, parties)
    order = np.random.default_rng([seed, 1]).permutation(examples)
    return tuple(np.sort(part) for part in np.array_split(order, parties))


def dirichlet(
    labels: np.ndarray, parties: int, *, alpha: float, seed: int, least: int = 1
) -> Parts:
    """Each label's examples in shares drawn from Dirichlet(alpha): the smaller, the more skewed.

    Args:
      labels: [examples], of any kind.
      parties: how many parts to make.
      alpha: concentration, above 0.
      seed: of the draw.
      least: examples that every party must have; draws without are repeated.

    Returns:
      For each party the rows it holds, int64, ascending.

    Raises:
      DataError: no draw gives everyone enough; raise alpha or lower parties.

    >>> parts = dirichlet(np.arange(100) % 4, 5, alpha=0.5, seed=0)
    >>> sorted(np.concatenate(parts).tolist()) == list(range(100))
    True
    """
    _require_enough(len(labels), parties * least)
    draw = np.random.default_rng([seed, 2])
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def split() -> list[np.ndarray]:
        pieces: list[list[np.ndarray]] = [[] for _ in range(parties)]
        for rows in classes:
            ends = np.cumsum(draw.dirichlet(np.full(parties, alpha)))
            cuts = np.round(ends[:-1] * len(rows)).astype(int)
            for piece, part in zip(pieces, np.split(draw.permutation(rows), cuts), strict=True):
                piece.append(part)
        return [np.sort(np.concatenate(piece)) for piece in pieces]

    return _drawn(
        split,
        least,
        f"no split with alpha={alpha:g} leaves each of {parties} parties {least} of "
        f"{len(labels)} examples; write a larger alpha, or fewer parties",
    )


def shards(labels: np.ndarray, parties: int, *, each: int, seed: int) -> Parts:
    """Examples sorted by label, cut into equal shards, of which every party is dealt a few.

    Args:
      labels: [examples].
      parties: how many parts to make.
      each: shards to a party; 2 leaves most parties two labels.
      seed: of the deal.

    Returns:
      For each party the rows it holds, int64, ascending.

    Raises:
      DataError: there are fewer examples than shards.

    >>> parts = shards(np.repeat(np.arange(4), 5), 4, each=1, seed=0)
    >>> sorted(len(part) for part in parts)
    [5, 5, 5, 5]
    """
    _require_enough(len(labels), parties * each)
    cut = np.array_split(np.argsort(labels, kind="stable"), parties * each)
    dealt = np.random.default_rng([seed, 3]).permutation(parties * each).reshape(parties, each)
    return tuple(np.sort(np.concatenate([cut[i] for i in hand])) for hand in dealt)


def held_out(examples: int, share: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows that are held out, int64 each, ascending.

    Args:
      examples: how many there are.
      share: of them held out, rounded to whole ones.
      seed: of the draw.

    >>> train, held = held_out(10, 0.2, seed=0)
    >>> len(train), len(held), sorted([*train.tolist(), *held.tolist()]) == list(range(10))
    (8, 2, True)
    """
    order = np.random.default_rng([seed, 4]).permutation(examples)
    count = round(examples * share)
    return np.sort(order[count:]), np.sort(order[:count])


def _require_enough(examples: int, needed: int) -> None:
    if examples < needed:
        raise DataError(
            f"{examples} examples do not go round {needed} times; use fewer parties or more data"
        )


def _drawn(split: Callable[[], list[np.ndarray]], least: int, problem: str) -> Parts:
    for _ in range(_ATTEMPTS):
        parts = split()
        if min(map(len, parts)) >= least:
            return tuple(parts)
    raise DataError(problem)
