"""Derivatives, gains and leaves of boosted trees, from sums of integers.

Chen and Guestrin, "XGBoost" (KDD'16). Derivatives are rounded to fixed point once; their sums are
exact, so that trees depend neither on the order of additions nor on who added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

from shardpar.errors import DataError
from shardpar.fl.vertical.options import TreeOptions


@dataclass(frozen=True)
class Best:
    """The best of some splits.

    Attributes:
      gain: its gain; minus infinity where none is allowed.
      at: the splits that have it, rising.
    """

    gain: float
    at: tuple[int, ...]


def base_of(labels: np.ndarray, options: TreeOptions) -> float:
    """The score before the first tree: the mean, or its log-odds.

    Raises:
      DataError: labels that cannot be learned.
    """
    if options.objective == "squared":
        if not np.isfinite(labels).all():
            raise DataError("labels are finite numbers")
        return float(labels.mean())
    if not np.isin(labels, (0, 1)).all() or len(np.unique(labels)) < 2:
        raise DataError("labels of logistic trees are 0 and 1, and both of them")
    return float(logit(labels.mean()))


def derivatives_of(
    scores: np.ndarray, labels: np.ndarray, options: TreeOptions
) -> tuple[np.ndarray, np.ndarray]:
    """(first, second) derivatives of the loss by the score, int64 of gradient_bits, [rows]."""
    if options.objective == "squared":
        first, second = scores - labels, np.ones_like(scores)
    else:
        chance = expit(scores)
        first, second = chance - labels, chance * (1 - chance)
    bits = options.gradient_bits
    return tuple(np.rint(np.ldexp(each, bits)).astype(np.int64) for each in (first, second))


def best_of(
    left: tuple[np.ndarray, np.ndarray],
    total: tuple[int, int],
    allowed: np.ndarray,
    options: TreeOptions,
) -> Best:
    """The best split of a node.

    Args:
      left: sums of first and of second derivatives on each split's left, int64 [splits].
      total: of the node.
      allowed: whether each split has enough rows on both sides, bool [splits].
      options: of the trees.
    """
    unit = np.ldexp(1.0, -options.gradient_bits)
    (gl, hl), (g, h) = (each * unit for each in left), (each * unit for each in total)
    gr, hr = g - gl, h - hl
    l2, least = options.l2, options.min_child_weight
    fits = allowed & (hl >= least) & (hr >= least) & (hl + l2 > 0) & (hr + l2 > 0)
    if not fits.any():
        return Best(-np.inf, ())
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = 0.5 * (gl * gl / (hl + l2) + gr * gr / (hr + l2) - g * g / (h + l2))
    gain = np.where(fits, gain, -np.inf)
    most = float(gain.max())
    if not most > options.min_gain:
        return Best(-np.inf, ())
    return Best(most, tuple(np.flatnonzero(gain == most).tolist()))


def leaf_of(total: tuple[int, int], options: TreeOptions) -> float:
    """What a leaf adds to the score."""
    unit = np.ldexp(1.0, -options.gradient_bits)
    weight = total[1] * unit + options.l2
    return float(-options.learning_rate * (total[0] * unit) / weight) if weight > 0 else 0.0
