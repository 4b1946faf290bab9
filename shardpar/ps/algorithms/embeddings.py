"""What algorithms that embed nodes or words give back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Progress = Callable[[int, int, float], None]
"""Called now and then with what is done, of how much, and the mean loss of late."""


@dataclass(frozen=True, eq=False)
class NodeEmbeddings:
    """A vector for each node or word.

    Attributes:
      vectors: float32[n, d].
      losses: the mean loss of a pair, with its negatives, in each pass over the data.
    """

    vectors: np.ndarray
    losses: tuple[float, ...]

    def nearest(self, node: int, count: int = 10) -> np.ndarray:
        """The nodes whose vectors point most in this one's direction, without itself.

        >>> import numpy as np
        >>> vectors = np.array([[1, 0], [0, 1], [2, 0.1]], np.float32)
        >>> NodeEmbeddings(vectors, ()).nearest(0, 1).tolist()
        [2]
        """
        sizes = np.linalg.norm(self.vectors, axis=1)
        cosines = self.vectors @ self.vectors[node] / np.maximum(sizes, 1e-30)
        cosines[node] = -np.inf
        count = min(count, len(cosines) - 1)
        best = np.argpartition(-cosines, count)[:count]
        return best[np.argsort(-cosines[best])]


def quiet(_done: int, _all: int, _loss: float) -> None:
    """Progress that nobody looks at."""
