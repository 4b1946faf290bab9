"""Real numbers as integers of one public scale.

Every number has the same number of fraction bits: an exponent of its own, as other libraries keep
beside the ciphertext, would tell everyone how large it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FixedPoint:
    """Numbers from -most to most in steps of 2^-fraction_bits.

    >>> fixed = FixedPoint(fraction_bits=8, most=100.0)
    >>> fixed.encode([1.5, -0.25])
    [384, -64]
    >>> fixed.decode([384, -64]).tolist()
    [1.5, -0.25]
    >>> fixed.decode([384 * -64], factors=2).tolist()
    [-0.375]
    """

    fraction_bits: int
    most: float

    def __post_init__(self) -> None:
        if self.fraction_bits < 0 or not 0 < self.most < math.inf:
            raise ValueError(
                f"fraction_bits={self.fraction_bits} and most={self.most:g}: the first is at least "
                "0, the second finite and above 0"
            )

    @property
    def most_encoded(self) -> int:
        """The largest integer that stands for a number."""
        return math.ceil(math.ldexp(self.most, self.fraction_bits))

    def encode(self, numbers: Sequence[float] | np.ndarray) -> list[int]:
        """The nearest integers, of a whole array in C order.

        Raises:
          OverflowError: a number is beyond `most`, or not finite.
        """
        array = np.asarray(numbers, np.float64).reshape(-1)
        if array.size and not np.abs(array).max() <= self.most:
            worst = array[~(np.abs(array) <= self.most)][0]
            raise OverflowError(
                f"{worst:g} is not between -{self.most:g} and {self.most:g}: clip or scale the "
                "numbers, or state a larger `most`"
            )
        scaled = np.rint(np.ldexp(array, self.fraction_bits))
        if self.most_encoded < 1 << 62:
            return scaled.astype(np.int64).tolist()
        return [int(number) for number in scaled.tolist()]

    def decode(self, integers: Sequence[int], factors: int = 1) -> np.ndarray:
        """float64 of integers, or of products of so many factors of this scale."""
        unit = 1 << (self.fraction_bits * factors)
        return np.array([integer / unit for integer in integers], np.float64)
