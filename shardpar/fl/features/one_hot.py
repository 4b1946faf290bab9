"""Categories as columns of 0 and 1, over a vocabulary that all parties know.

The vocabulary is agreed on beforehand, as a code list is: to collect it from the data would show
that somebody has a rare category. Revealed to all parties and the aggregator: how often each of its
categories occurs (`shardpar.fl.stats.table`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardpar.errors import DataError, SpecError
from shardpar.fl.stats import table
from shardpar.fl.sums import Sums
from shardpar.fl.suppression import MINIMUM


@dataclass(frozen=True)
class OneHot:
    """A column of 0 and 1 for each category of each column; for others all are 0.

    Attributes:
      vocabularies: the categories of each column, in the order of the new columns.

    >>> OneHot((("a", "b"),)).apply(np.array([["b"], ["z"]])).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    """

    vocabularies: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        """Checks that no category is named twice."""
        for column, names in enumerate(self.vocabularies):
            if len(set(names)) != len(names):
                raise SpecError(f"the vocabulary of column {column} names a category twice")

    def codes(self, rows: np.ndarray) -> np.ndarray:
        """The number of each value's category, after the last for others: int64 [rows, columns]."""
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != len(self.vocabularies):
            raise DataError(
                f"rows of shape {rows.shape} for vocabularies of {len(self.vocabularies)} columns"
            )
        found = np.empty(rows.shape, np.int64)
        for column, names in enumerate(self.vocabularies):
            place = {name: at for at, name in enumerate(names)}
            found[:, column] = [place.get(v, len(names)) for v in rows[:, column].tolist()]
        return found

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Columns of 0 and 1, float64 [rows, categories of all columns].

        Args:
          rows: text [rows, columns].

        Raises:
          DataError: another number of columns.
        """
        codes = self.codes(rows)
        parts = [
            codes[:, column, None] == np.arange(len(names))
            for column, names in enumerate(self.vocabularies)
        ]
        return np.concatenate(parts, axis=1).astype(np.float64)


def one_hot(
    sums: Sums,
    rows: np.ndarray,
    vocabularies: Sequence[Sequence[str]],
    *,
    minimum: int = MINIMUM,
) -> OneHot:
    """The categories of a vocabulary that do occur often enough, in its order.

    Args:
      sums: over all parties.
      rows: this party's, text [rows, columns].
      vocabularies: the categories each column may have; the same at all parties.
      minimum: fewest rows of a category at a party, for the party to say that it has any.
    """
    every = OneHot(tuple(tuple(names) for names in vocabularies))
    kept = []
    for codes, names in zip(every.codes(rows).T, every.vocabularies, strict=True):
        counts = table(sums, codes, len(names) + 1, minimum=minimum).counts
        kept.append(tuple(name for name, count in zip(names, counts[:-1], strict=True) if count))
    return OneHot(tuple(kept))
