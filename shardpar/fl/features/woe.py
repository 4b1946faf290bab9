"""Weight of evidence: each bin's value is how much likelier rows with label 1 are to lie in it.

Also the information value of each column, by which columns are selected (Siddiqi, Credit Risk
Scorecards, 2006). For rows that lie at several parties; where another party has the labels, see
`vertical_woe`. Revealed to all parties and the aggregator: rows of each label in each bin, without
cells that parties leave out (`shardpar.fl.stats.table`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardpar.errors import DataError
from shardpar.fl.features.binning import Binning
from shardpar.fl.stats import table
from shardpar.fl.sums import Sums
from shardpar.fl.suppression import MINIMUM


@dataclass(frozen=True)
class WeightOfEvidence:
    """What stands for each bin.

    Attributes:
      binning: of the columns.
      weights: of each column's bins, the last for missing values.
      information: the information value of each column.
    """

    binning: Binning
    weights: tuple[tuple[float, ...], ...]
    information: tuple[float, ...]

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """The weight of each value's bin, float64 [rows, columns].

        Raises:
          DataError: another number of columns.
        """
        bins = self.binning.apply(rows)
        columns = [np.array(w)[bins[:, at]] for at, w in enumerate(self.weights)]
        return np.stack(columns, axis=1)


def weight_of_evidence(
    sums: Sums,
    rows: np.ndarray,
    labels: np.ndarray,
    binning: Binning,
    *,
    minimum: int = MINIMUM,
) -> WeightOfEvidence:
    """Fits over all parties.

    Args:
      sums: over all parties.
      rows: this party's, float [rows, columns], NaN where a value is missing.
      labels: 0 or 1 for each row.
      binning: the same at all parties.
      minimum: fewest rows that any number may be of.

    Raises:
      DataError: labels are not 0 and 1, one for each row.
    """
    labels = checked_labels(labels, len(rows))
    weights, information = [], []
    for bins, size in zip(binning.apply(rows).T, binning.sizes, strict=True):
        counts = table(sums, bins + size * labels, 2 * size, minimum=minimum).counts
        weight, value = evidence(counts[size:], counts[:size], minimum / 2)
        weights.append(tuple(weight.tolist()))
        information.append(value)
    return WeightOfEvidence(binning, tuple(weights), tuple(information))


def evidence(ones: np.ndarray, zeros: np.ndarray, missing: float = 0.5) -> tuple[np.ndarray, float]:
    """(the weight of each bin, the information value) of rows of each label in each bin.

    ln of (ones here / all ones) / (zeros here / all zeros); 0 for a bin without rows.

    Args:
      ones: rows with label 1 in each bin.
      zeros: with label 0.
      missing: rows added to a bin's cells when one of them is empty: it may hold rows that were
        left out, and its logarithm must be finite.

    >>> weights, value = evidence(np.array([8, 2]), np.array([2, 8]))
    >>> weights.round(4).tolist(), round(value, 4)
    ([1.3863, -1.3863], 1.6636)
    """
    ones, zeros = np.asarray(ones, np.float64), np.asarray(zeros, np.float64)
    added = np.where((ones == 0) != (zeros == 0), missing, 0.0)
    good = (ones + added) / max(ones.sum(), 1)
    bad = (zeros + added) / max(zeros.sum(), 1)
    there = (ones + zeros) > 0
    weights = np.zeros(ones.shape)
    weights[there] = np.log(good[there] / bad[there])
    return weights, float(((good - bad) * weights).sum())


def checked_labels(labels: np.ndarray, rows: int) -> np.ndarray:
    """Labels as int64.

    Raises:
      DataError: they are not 0 and 1, one for each row.
    """
    labels = np.asarray(labels)
    if labels.shape != (rows,) or not np.isin(labels, (0, 1)).all():
        raise DataError(f"labels of shape {labels.shape} for {rows} rows must all be 0 or 1")
    return labels.astype(np.int64)
