"""Private sums of updates: what clients clip and add, what the aggregator adds, what it costs.

`private_rounds` says how a round goes about it. Every mechanism is the same one: a vector in units
in which the noise has standard deviation 1 and one user, or record, moves it by at most
1 / noise_multiplier, on a grid of integers.

Neighbours differ by one user (or record) being there or not. Central: the aggregator sees the exact
sum, everyone else the noisy one. Distributed (Kairouz, Liu and Steinke, ICML 2021): under secure
aggregation the aggregator sees the noisy sum only; c clients who tell it their noise take c / least
of the promised variance away. Local: the aggregator sees each client's noisy update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardpar.errors import SpecError
from shardpar.fl.ledger import Release
from shardpar.fl.noise import MOST_SIGMA, discrete_gaussian, grid_loss, sum_loss
from shardpar.fl.streams import Randomness

Tree = Any
# Of each release's probability that is left aside and paid for in δ.
TAIL = 1e-12
# Sums of noise stay within so many standard deviations, or wrap around with odds of e^-72.
_SPREAD = 12.0
_WORDS = 1 << 31


def noised(vector: np.ndarray, noise_multiplier: float, random: Randomness) -> np.ndarray:
    """A vector plus noise of standard deviation 1 (a little more), on a grid of about 2^-24.

    Args:
      vector: float64 [dims]; neighbours' are within 1 / noise_multiplier of each other in L2.
      noise_multiplier: of the release.
      random: secure.

    Raises:
      SpecError: so many dims that rounding would cost much of the privacy.
    """
    steps = _steps(noise_multiplier, vector.size)
    whole = np.rint(np.asarray(vector, np.float64) * steps).astype(np.int64)
    return (whole + discrete_gaussian(MOST_SIGMA, vector.size, random)) / steps


def release_of(
    noise_multiplier: float, dims: int, *, sampling_rate: float = 1.0, count: int = 1
) -> Release:
    """What so many releases by `noised` are to be written down as."""
    _steps(noise_multiplier, dims)
    loss = grid_loss(MOST_SIGMA, dims, TAIL)
    return Release(noise_multiplier, sampling_rate, count, loss, TAIL)


def _steps(noise_multiplier: float, dims: int) -> float:
    # Rounding two neighbours may move them apart by one step more in every coordinate; the noise
    # is that much larger than 1 unit.
    rounding = noise_multiplier * math.sqrt(dims)
    if rounding > MOST_SIGMA / 64:
        raise SpecError(
            f"noise multiplier {noise_multiplier:g} over {dims} dims leaves the grid too coarse"
        )
    return MOST_SIGMA - rounding


def clip_update(update: Tree, clip: Any) -> tuple[Tree, jax.Array]:
    """A client's update for a private sum: (its mean, cut to an L2 norm; whether it was within).

    Args:
      update: what an algorithm's `client` returns. Everything but the weight and the loss is
        divided by the weight, so that no user counts for more than another, and cut together.
      clip: the norm.

    Returns:
      The update without weight and loss, which would need noise of their own; and +1/2 if it was
      within the clip, -1/2 if not. All are 0 of a client without examples.

    >>> update = {"delta": jnp.array([6.0, 8.0]), "weight": jnp.float32(2), "loss": jnp.float32(9)}
    >>> clipped, within = clip_update(update, 1.0)
    >>> clipped["delta"].round(3).tolist(), float(within)
    ([0.6..., 0.8...], -0.5)
    """
    weight = update["weight"]
    there = weight > 0
    scale = jnp.where(there, 1.0 / jnp.where(there, weight, 1.0), 0.0)
    mean = {k: v for k, v in update.items() if k not in ("weight", "loss")}
    mean = jax.tree.map(lambda x: x * scale, mean)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(mean)))
    factor = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30))
    within = jnp.where(there, jnp.where(norm <= clip, 0.5, -0.5), 0.0)
    return jax.tree.map(lambda x: x * factor, mean), within


@dataclass(frozen=True)
class UserMechanism:
    """The noisy sum of clipped updates, and of how many were within the clip if it adapts.

    Adapting is Andrew et al., "Differentially private learning with adaptive clipping" (NeurIPS
    2021): the clip follows a quantile by a noisy count, whose cost is in `noise_multiplier`.

    Attributes:
      noise_multiplier: of a round as a whole.
      clients: how many are expected in a round. Sums are divided by this fixed number: dividing by
        the true one would reveal it.
      quantile: the share of updates that the clip is to leave alone; None if it does not adapt.
      clip_rate: how fast it adapts.
      count_noise: standard deviation of the noise on the count; None for a twentieth of `clients`,
        but at least what leaves the updates all but a hundredth of the noise multiplier.
    """

    noise_multiplier: float
    clients: float
    quantile: float | None = None
    clip_rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        """Checks that the count's noise leaves something for the updates."""
        if self.noise_multiplier <= 0 or self.clients <= 0:
            raise SpecError("noise_multiplier and clients must be positive")
        if self.quantile is not None and 2 * self.sigma_count <= self.noise_multiplier:
            raise SpecError(
                f"count_noise {self.sigma_count} spends all of noise multiplier "
                f"{self.noise_multiplier:g}; use more than {self.noise_multiplier / 2:g}"
            )

    @property
    def sigma_count(self) -> float:
        """Of the noise on the count."""
        if self.count_noise is not None:
            return self.count_noise
        return max(self.clients / 20, 3.6 * self.noise_multiplier)

    @property
    def update_multiplier(self) -> float:
        """Noise of the updates over their clip, such that with the count it costs a round's."""
        if self.quantile is None:
            return self.noise_multiplier
        return (self.noise_multiplier**-2 - (2 * self.sigma_count) ** -2) ** -0.5

    def next_clip(self, clip: Any, within: Any) -> Any:
        """The clip after a round.

        Args:
          clip: of the round.
          within: the noisy sum of what `clip_update` says.
        """
        if self.quantile is None:
            return clip
        share = jnp.clip(within / self.clients + 0.5, 0.0, 1.0)
        return clip * jnp.exp(-self.clip_rate * (share - self.quantile))

    def units(self, clip: float, dims: int) -> np.ndarray:
        """Per coordinate of (updates, within) the standard deviation of its noise, [dims + 1]."""
        units = np.full(dims + 1, self.update_multiplier * clip)
        units[-1] = self.sigma_count
        return units

    def central(
        self, update: Tree, within: float, clip: float, random: Randomness
    ) -> tuple[Tree, float]:
        """The exact sums plus noise, by the aggregator.

        Args:
          update: the sum of clipped updates.
          within: the sum beside it; without a quantile no use is made of it and 0 comes back.
          clip: of the round.
          random: secure.
        """
        vector, back = _flat(update, 0.0 if self.quantile is None else within)
        units = self.units(clip, vector.size - 1)
        vector = noised(vector / units, self.noise_multiplier, random) * units
        return back(vector) if self.quantile is not None else (back(vector)[0], 0.0)

    def release(self, dims: int, sampling_rate: float = 1.0) -> Release:
        """What a round with central noise is written down as; dims of an update."""
        return release_of(self.noise_multiplier, dims + 1, sampling_rate=sampling_rate)


@dataclass(frozen=True)
class DistributedNoise:
    """Each client's part of the noise, in integers modulo 2^32 under secure aggregation.

    Each client adds a discrete Gaussian of 1 / least of the variance, so that any set of survivors
    that secure aggregation unmasks has all of it; more survivors have more. Vectors are not
    rotated: 32 bits leave room for a grid much finer than the noise, and the headroom is checked.

    Attributes:
      mechanism: what is promised.
      dims: of an update.
      most: clients in one sum at most.
      least: the threshold of secure aggregation.
    """

    mechanism: UserMechanism
    dims: int
    most: int
    least: int

    def __post_init__(self) -> None:
        """Checks that the grid is fine enough for so many clients."""
        if not 1 <= self.least <= self.most:
            raise SpecError(f"least {self.least} of most {self.most} clients")
        z, rounding = self.mechanism.noise_multiplier, self._rounding
        if self.steps < 4 * rounding:
            raise SpecError(
                f"{self.most} clients, {self.dims} dims and noise multiplier {z:g} leave a grid of "
                f"{self.steps} steps per unit of noise in 32 bits; use fewer of any"
            )

    @property
    def _rounding(self) -> float:
        # Rounding moves each coordinate by half a step, an update by half its root of dims.
        return self.mechanism.noise_multiplier * math.sqrt(self.dims + 1) / 2

    @property
    def steps(self) -> int:
        """Of the grid, per unit of noise: as many as keep `most` clients from wrapping around."""
        spread = _SPREAD * math.sqrt(self.most / self.least)
        fixed = self.most / 2 + spread * (self._rounding + math.sqrt(self.least))
        per_step = self.most / self.mechanism.noise_multiplier + spread
        fits = math.floor((_WORDS - 1 - fixed) / per_step)
        return max(min(fits, math.floor((MOST_SIGMA - 1) * math.sqrt(self.least) / 2)), 0)

    @property
    def sigma(self) -> int:
        """Of one client's noise, in steps."""
        return math.ceil((self.steps + self._rounding) / math.sqrt(self.least))

    @property
    def words(self) -> int:
        """Of the vector to mask."""
        return self.dims + 1

    def encode(self, update: Tree, within: float, clip: float, random: Randomness) -> np.ndarray:
        """A client's clipped update and its noise, uint32 [words], to be masked.

        Args:
          update: from `clip_update`; cut again in float64, in which its norm is certain.
          within: beside it.
          clip: of the round.
          random: secure.

        Raises:
          SpecError: the update has other dims, or values that are not finite.
        """
        vector, _ = _flat(update, within if self.mechanism.quantile is not None else 0.0)
        if vector.size != self.words or not np.isfinite(vector).all():
            raise SpecError(
                f"an update of {vector.size - 1} dims where {self.dims} were agreed on, or with "
                "values that are not finite"
            )
        vector = vector / self.mechanism.units(clip, self.dims)
        bound = 1 / self.mechanism.noise_multiplier
        norm = float(np.linalg.norm(vector))
        vector *= self.steps * min(1.0, bound / max(norm, 1e-30)) * (1 - 1e-12)
        noise = discrete_gaussian(self.sigma, self.words, random)
        return ((np.rint(vector).astype(np.int64) + noise) & 0xFFFFFFFF).astype(np.uint32)

    def decode(self, total: np.ndarray, update: Tree, clip: float) -> tuple[Tree, float]:
        """The noisy sums in a sum of such vectors; `update` gives the shapes."""
        _, back = _flat(jax.tree.map(lambda x: np.zeros(x.shape), update), 0.0)
        signed = np.asarray(total, np.uint32).view(np.int32).astype(np.float64)
        return back(signed / self.steps * self.mechanism.units(clip, self.dims))

    def release(self) -> Release:
        """What a round is written down as, before it is unmasked.

        Who takes part is no secret from the aggregator, so sampling clients hides none of them
        from it.
        """
        sigma = math.floor(self.sigma * math.sqrt(self.least))
        loss = grid_loss(sigma, self.words, TAIL) + sum_loss(self.sigma, self.most, self.words)
        return Release(self.mechanism.noise_multiplier, 1.0, 1, loss, TAIL)


def local_noise(
    update: Tree, clip: float, noise_multiplier: float, random: Randomness
) -> tuple[Tree, Release]:
    """A client's clipped update with all of its noise, and what the client's ledger is to hold.

    It hides which update it was among all within the clip, two of which are up to 2 clip apart; the
    noise has standard deviation 2 · clip · noise_multiplier in every coordinate.
    """
    vector, back = _flat(update, 0.0)
    norm = float(np.linalg.norm(vector))
    vector *= min(1.0, clip / max(norm, 1e-30)) * (1 - 1e-12)
    unit = 2 * clip * noise_multiplier
    out = noised(vector / unit, noise_multiplier, random) * unit
    return back(out)[0], release_of(noise_multiplier, vector.size)


def _flat(update: Tree, within: float) -> tuple[np.ndarray, Any]:
    leaves, structure = jax.tree.flatten(update)
    arrays = [np.asarray(leaf, np.float64) for leaf in leaves]
    ends = np.cumsum([0, *(a.size for a in arrays)])

    def back(vector: np.ndarray) -> tuple[Tree, float]:
        pieces = [
            vector[start:end].reshape(a.shape)
            for start, end, a in zip(ends[:-1], ends[1:], arrays, strict=True)
        ]
        return jax.tree.unflatten(structure, pieces), float(vector[-1])

    return np.concatenate([*(a.ravel() for a in arrays), [float(within)]]), back
