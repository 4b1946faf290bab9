"""Grown trees, as each party keeps its half: the guest the shape and the leaves, the host its cuts.

The guest knows of a host's split only a number; the host knows of a number only its column and cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np


class Leaf(msgspec.Struct, frozen=True, tag="leaf"):
    """Where a tree ends; what it adds to a score."""

    value: float


class GuestSplit(msgspec.Struct, frozen=True, tag="guest"):
    """By one of the guest's columns: numbers up to the edge go left, missing ones as said."""

    column: int
    edge: float
    missing_left: bool


class HostSplit(msgspec.Struct, frozen=True, tag="host"):
    """By one of the host's splits, by its number."""

    split: int


Grown = GuestSplit | HostSplit | Leaf


@dataclass(frozen=True)
class TreeOfGuest:
    """A tree: what each node is, by number; the root is 1, its children 2 and 3, and so on."""

    nodes: dict[int, Grown]

    def added(self, columns: np.ndarray, answers: np.ndarray) -> np.ndarray:
        """What the tree adds to each score.

        Args:
          columns: the guest's, float [rows, columns].
          answers: whether each row goes left at each of the host's splits, bool [rows, splits].

        >>> tree = TreeOfGuest({1: GuestSplit(0, 0.5, True), 2: Leaf(-1.0), 3: Leaf(1.0)})
        >>> tree.added(np.array([[0.5], [0.6], [np.nan]]), np.zeros((3, 0), bool)).tolist()
        [-1.0, 1.0, -1.0]
        """
        added = np.empty(len(columns))
        at = {1: np.arange(len(columns))}
        for node in sorted(self.nodes):
            rows, grown = at.pop(node), self.nodes[node]
            if isinstance(grown, Leaf):
                added[rows] = grown.value
                continue
            if isinstance(grown, HostSplit):
                left = answers[rows, grown.split]
            else:
                left = goes_left(columns[rows, grown.column], grown.edge, grown.missing_left)
            at[2 * node], at[2 * node + 1] = rows[left], rows[~left]
        return added


class Cut(msgspec.Struct, frozen=True):
    """A split of the host's: numbers of a column up to the edge go left, missing ones as said."""

    column: int
    edge: float
    missing_left: bool


def answers_of(cuts: Sequence[Cut], columns: np.ndarray) -> np.ndarray:
    """Whether each row goes left at each of the host's splits, bool [rows, splits]."""
    answers = np.empty((len(columns), len(cuts)), bool)
    for at, cut in enumerate(cuts):
        answers[:, at] = goes_left(columns[:, cut.column], cut.edge, cut.missing_left)
    return answers


def goes_left(numbers: np.ndarray, edge: float, missing_left: bool) -> np.ndarray:
    """Whether numbers, NaN where missing, go left."""
    return np.where(np.isnan(numbers), missing_left, numbers <= edge)
