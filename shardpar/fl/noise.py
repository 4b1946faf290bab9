"""Noise for differential privacy: exact discrete Gaussians from secure randomness, on a grid.

Samplers are those of Canonne, Kamath and Steinke, "The discrete Gaussian for differential privacy"
(NeurIPS 2020), algorithms 1 to 3, over whole vectors, in integers throughout: no rounding makes an
outcome likelier than it should be. A Gaussian in floating point would: which floats can occur at
all tells the value below the noise (Mironov, "On significance of the least significant bits for
differential privacy", CCS 2012).
"""

from __future__ import annotations

import math

import numpy as np

from shardpar.errors import SpecError
from shardpar.fl.streams import Randomness

# The acceptance test squares proposals: up to 180 sigma that stays below 2^63, and further out none
# comes in the life of the universe.
MOST_SIGMA = 1 << 24
_BATCH = 1 << 16


def discrete_gaussian(sigma: int, count: int, random: Randomness) -> np.ndarray:
    """Integers x with probability proportional to exp(-x² / 2σ²), exactly.

    Args:
      sigma: σ, a whole number up to 2^24; scale the grid to make it one.
      count: how many.
      random: secure; a given key makes a test repeatable.

    Returns:
      int64 [count].

    Raises:
      SpecError: sigma is not in 1..2^24.

    >>> discrete_gaussian(5, 3, Randomness()).shape
    (3,)
    """
    _check_sigma(sigma)
    kept = np.empty(count, np.int64)
    done = 0
    while done < count:
        # About three in four are accepted; a batch stays in the cache.
        need = count - done
        proposed = discrete_laplace(sigma, min(_BATCH, need + need // 2 + 16), random)
        away = np.abs(proposed) - sigma
        accepted = proposed[_bernoulli_exp(away * away, 2 * sigma * sigma, random)][:need]
        kept[done : done + accepted.size] = accepted
        done += accepted.size
    return kept


def discrete_laplace(scale: int, count: int, random: Randomness) -> np.ndarray:
    """Integers x with probability proportional to exp(-|x| / scale), exactly, int64 [count].

    Raises:
      SpecError: the scale is not in 1..2^24.
    """
    _check_sigma(scale)
    kept = np.empty(count, np.int64)
    done = 0
    while done < count:
        need = min(_BATCH, 2 * (count - done) + 16)
        within = random.below(scale, need).astype(np.int64)
        within = within[_bernoulli_exp(within, scale, random)]
        # How often a coin of exp(-1) falls heads: the whole multiples of the scale.
        times = np.zeros(within.size, np.int64)
        tossing = np.arange(within.size)
        while tossing.size:
            tossing = tossing[_bernoulli_exp_fraction(np.ones(tossing.size, np.int64), 1, random)]
            times[tossing] += 1
        size = within + scale * times
        negative = random.below(2, size.size).astype(bool)
        # Zero has one sign, so that it is not twice as likely.
        fit = ~(negative & (size == 0))
        values = np.where(negative, -size, size)[fit][: count - done]
        kept[done : done + values.size] = values
        done += values.size
    return kept


def _bernoulli_exp(above: np.ndarray, below: int, random: Randomness) -> np.ndarray:
    """True with probability exp(-above / below) for each; above >= 0."""
    whole, rest = np.divmod(above, below)
    heads = _bernoulli_exp_fraction(rest, below, random)
    left = np.flatnonzero(heads & (whole > 0))
    while left.size:
        again = _bernoulli_exp_fraction(np.ones(left.size, np.int64), 1, random)
        heads[left[~again]] = False
        whole[left] -= 1
        left = left[again & (whole[left] > 0)]
    return heads


def _bernoulli_exp_fraction(above: np.ndarray, below: int, random: Randomness) -> np.ndarray:
    """True with probability exp(-above / below) for each; 0 <= above / below <= 1.

    Tosses coins of γ / 1, γ / 2, γ / 3, … until one falls tails: the first tails is at an odd
    place with probability exp(-γ).
    """
    odd = np.ones(above.size, bool)
    left = np.arange(above.size)
    place = 1
    while left.size:
        heads = random.below(below * place, left.size) < above[left].astype(np.uint64)
        odd[left[~heads]] = place % 2 == 1
        left = left[heads]
        place += 1
    return odd


def grid_loss(sigma: int, dims: int, tail: float) -> float:
    """What a discrete Gaussian may add to the ε of the continuous one of equal σ, per release.

    Rounding continuous noise on integer data is post-processing, so the Gaussian's accounting holds
    for it exactly. The discrete Gaussian's probabilities differ from that noise's by a factor
    within exp(±max(1/8, B²/24)/σ²) per coordinate up to |x| <= Bσ, and beyond it lies `tail`, over
    all coordinates; both of two neighbouring outputs may differ so.

    Args:
      sigma: of the noise, in steps of the grid.
      dims: coordinates of a release.
      tail: probability left aside, to be added to δ.
    """
    bound2 = 2 * math.log(2 * dims / tail)
    # The normalising constant differs from the continuous one by 2.1 exp(-2π²σ²).
    constant = 2.1 * math.exp(-min(2 * math.pi**2 * sigma**2, 700.0))
    return 2 * dims * (max(1 / 8, bound2 / 24) / sigma**2 + constant)


def sum_loss(sigma: int, clients: int, dims: int) -> float:
    """What a sum of clients' discrete Gaussians may add to the ε of one of the same variance.

    Kairouz, Liu and Steinke, "The distributed discrete Gaussian mechanism for federated learning
    with secure aggregation" (ICML 2021): probabilities differ by a factor within exp(±τ) per
    coordinate.
    """
    tau = 10 * sum(
        math.exp(-min(2 * math.pi**2 * sigma**2 * k / (k + 1), 700.0)) for k in range(1, clients)
    )
    return 2 * dims * tau


def _check_sigma(sigma: int) -> None:
    if sigma != int(sigma) or not 1 <= sigma <= MOST_SIGMA:
        raise SpecError(f"sigma {sigma} of discrete noise must be a whole number in 1..2^24")
