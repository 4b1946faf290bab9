"""What clients keep between their rounds, held on the host for those that ever took part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Tree = Any

_LEAST_ROWS = 16


class KeptStates:
    """A row for each client that took part; all others are as a client begins.

    >>> kept = KeptStates({"w": np.zeros(2)})
    >>> kept.scatter(np.array([7, -1]), {"w": np.ones((2, 2))})
    >>> kept.gather(np.array([3, 7]))["w"].tolist(), kept.clients.tolist()
    ([[0.0, 0.0], [1.0, 1.0]], [7])
    """

    def __init__(self, first: Tree) -> None:
        """Begins with no client.

        Args:
          first: what a client keeps before its first round; () where nothing is kept.
        """
        self._first = [np.asarray(leaf) for leaf in jax.tree.leaves(first)]
        self._tree = jax.tree.structure(first)
        self._rows = [np.empty((0, *leaf.shape), leaf.dtype) for leaf in self._first]
        self._slots: dict[int, int] = {}

    @property
    def is_empty(self) -> bool:
        """Whether clients keep nothing at all."""
        return not self._first

    @property
    def clients(self) -> np.ndarray:
        """The clients that took part, int64, in the order in which they first did."""
        return np.fromiter(self._slots, np.int64, len(self._slots))

    def of_client(self, client: int) -> Tree:
        """What one client keeps."""
        return jax.tree.map(lambda x: x[0], self.gather(np.array([client])))

    def gather(self, clients: np.ndarray) -> Tree:
        """What some clients keep, stacked; a client -1 is a new one."""
        if self.is_empty:
            return self._tree.unflatten([])
        slots = np.array([self._slots.get(int(c), -1) for c in clients], np.int64)
        known = slots >= 0
        leaves = []
        for first, rows in zip(self._first, self._rows, strict=True):
            found = np.empty((len(clients), *first.shape), first.dtype)
            found[known], found[~known] = rows[slots[known]], first
            leaves.append(found)
        return self._tree.unflatten(leaves)

    def scatter(self, clients: np.ndarray, kept: Tree) -> None:
        """Takes what clients keep now; that of a client -1 is dropped."""
        if self.is_empty:
            return
        real = np.flatnonzero(clients >= 0)
        for client in clients[real]:
            self._slots.setdefault(int(client), len(self._slots))
        slots = np.array([self._slots[int(c)] for c in clients[real]], np.int64)
        self._grow(len(self._slots))
        for rows, leaf in zip(self._rows, jax.tree.leaves(kept), strict=True):
            rows[slots] = np.asarray(leaf)[real]

    def arrays(self) -> dict[str, np.ndarray]:
        """All rows, for a checkpoint: `clients` (int32) and a numbered array for each leaf."""
        count = len(self._slots)
        rows = {f"leaf{i}": rows[:count] for i, rows in enumerate(self._rows)}
        return {"clients": self.clients.astype(np.int32), **rows}

    def shapes(self, count: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each of `arrays` with so many clients."""
        rows = {f"leaf{i}": ((count, *x.shape), x.dtype) for i, x in enumerate(self._first)}
        return {"clients": ((count,), np.dtype(np.int32)), **rows}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `arrays` gave."""
        clients = np.asarray(arrays["clients"])
        self._slots = {int(client): slot for slot, client in enumerate(clients)}
        self._rows = [np.array(arrays[f"leaf{i}"]) for i in range(len(self._first))]

    def _grow(self, count: int) -> None:
        for i, rows in enumerate(self._rows):
            if len(rows) < count:
                larger = np.empty(
                    (max(count, 2 * len(rows), _LEAST_ROWS), *rows.shape[1:]), rows.dtype
                )
                larger[: len(rows)] = rows
                self._rows[i] = larger
