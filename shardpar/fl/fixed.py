"""Real numbers as integers modulo 2^32, so that masks hide them and their sum comes out exact.

A scale is a power of two: the product with it is exact in any float type, so NumPy in one process
and a compiled simulation in another make the same integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from shardpar.errors import SpecError
from shardpar.fl.streams import Randomness

_HALF = 1 << 31
_FEWEST_LEVELS = 128
# One addend alone could use all of 31 bits; int32 in a compiled program must not overflow.
_MOST_LEVELS = 1 << 30


@dataclass(frozen=True)
class FixedPoint:
    """Numbers in [-limit, limit] as multiples of 1 / scale; at most `addends` of them are added.

    Build one with `FixedPoint.of`, which chooses the scale.

    Attributes:
      limit: larger numbers are cut to it.
      scale: integers per unit, a power of two.
      addends: how many encoded numbers one sum may have.
    """

    limit: float
    scale: float
    addends: int

    def __post_init__(self) -> None:
        """Checks the headroom: a sum that wraps around would be decoded wrong without a sign."""
        if not (self.limit > 0 and math.isfinite(self.limit) and self.addends > 0):
            raise SpecError(f"limit {self.limit} and addends {self.addends} must be positive")
        if self.scale <= 0 or math.frexp(self.scale)[0] != 0.5:
            raise SpecError(f"scale {self.scale} is not a power of two")
        # Values in float32 are cut to the limit in float32, which may be a little more.
        most = self.addends * math.ceil(max(self.limit, np.float32(self.limit)) * self.scale)
        if most >= _HALF:
            raise SpecError(
                f"{self.addends} addends up to {self.limit:g} at scale {self.scale:g} reach {most},"
                f" past 2^31 = {_HALF}; lower the scale, the limit or the number of clients"
            )

    @classmethod
    def of(cls, limit: float, addends: int, bits: int | None = None) -> FixedPoint:
        """The finest scale at which the sum cannot wrap around.

        Args:
          limit: of one number's magnitude.
          addends: of one sum.
          bits: of one number, its sign too; None for as many as fit.

        Raises:
          SpecError: `bits` are too many for so many addends, or too few are left.

        >>> FixedPoint.of(1.0, addends=100).scale
        16777216.0
        >>> FixedPoint.of(1.0, addends=100, bits=28)
        Traceback (most recent call last):
        ...
        shardpar.errors.SpecError: 100 addends of 28 bits ... use bits <= 25 or fewer clients
        """
        if not (limit > 0 and math.isfinite(limit) and addends > 0):
            raise SpecError(f"limit {limit} and addends {addends} must be positive")
        room = min((_HALF - 1) // addends, _MOST_LEVELS)
        if room < _FEWEST_LEVELS:
            raise SpecError(
                f"{addends} addends leave {room} levels for each in 32 bits; add up fewer clients "
                "at once"
            )
        levels = room if bits is None else (1 << (bits - 1)) - 1
        if levels > room:
            raise SpecError(
                f"{addends} addends of {bits} bits do not fit 32 bits; use bits <= "
                f"{(room + 1).bit_length()} or fewer clients"
            )
        if levels < _FEWEST_LEVELS - 1:
            raise SpecError(f"bits {bits} leave {levels} levels; use bits >= 8")
        scale = 2.0 ** math.floor(math.log2(levels / limit))
        while addends * math.ceil(max(limit, np.float32(limit)) * scale) >= _HALF:
            scale /= 2
        return cls(float(limit), scale, addends)

    def integers(self, values: Any) -> Any:
        """Numbers as int32, as `encode` makes them, from inside a compiled program."""
        limit = jnp.asarray(self.limit, values.dtype)
        return jnp.rint(jnp.clip(values, -limit, limit) * self.scale).astype(jnp.int32)

    def encode(self, values: np.ndarray, random: Randomness | None = None) -> np.ndarray:
        """Numbers as integers modulo 2^32, uint32 of the same shape.

        Args:
          values: finite floats; those beyond the limit are cut to it (`cut` counts them).
          random: rounds up or down at random, so that the mean is kept; None rounds to the nearest,
            ties to even.

        Raises:
          SpecError: a value is not finite.

        >>> codec = FixedPoint.of(1.0, addends=2)
        >>> codec.decode(codec.encode(np.float32([.5, 9])) + codec.encode(np.float32([.25, 1])))
        array([0.75, 2.  ])
        """
        values = np.asarray(values)
        if not np.isfinite(values).all():
            raise SpecError("an update has values that are not finite; the round would be lost")
        limit = values.dtype.type(self.limit)
        scaled = np.clip(values, -limit, limit).astype(np.float64) * self.scale
        if random is None:
            whole = np.rint(scaled).astype(np.int64)
        else:
            floor = np.floor(scaled)
            above = random.words(scaled.size).reshape(scaled.shape) >> np.uint64(11)
            # 53 random bits: as many as the fraction of a float64 can have.
            whole = floor.astype(np.int64) + (above * 2.0**-53 < scaled - floor)
        return (whole & 0xFFFFFFFF).astype(np.uint32)

    def decode(self, total: np.ndarray) -> np.ndarray:
        """The sum that integers modulo 2^32 stand for, float64."""
        return np.asarray(total, np.uint32).view(np.int32).astype(np.float64) / self.scale

    def cut(self, values: np.ndarray) -> int:
        """How many values are beyond the limit."""
        return int(np.count_nonzero(np.abs(values) > self.limit))
