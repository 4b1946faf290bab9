"""Several integers in one plain number, so that one encryption or decryption serves all of them.

As VF²Boost (SIGMOD'21) packs histograms: before encryption where the values are known, and by
shifting and adding ciphertexts before they are decrypted. Slots are signed and have room for the
carries of a stated number of additions, and as much again, where an overflow is noticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gmpy2 import powmod

from shardpar.fl.he.ciphertexts import Ciphertexts, PublicKey


@dataclass(frozen=True)
class Packing:
    """How integers lie in a plain number; make one with `Packing.of`.

    Attributes:
      most: the largest absolute value before anything is added.
      additions: how many such values are summed in a slot, at most.
      slots: how many slots a plain number has.
    """

    most: int
    additions: int
    slots: int

    @classmethod
    def of(cls, key: PublicKey, *, most: int, additions: int = 1) -> Packing:
        """The packing with as many slots as fit.

        Raises:
          OverflowError: not even one fits.
        """
        if most < 1 or additions < 1:
            raise ValueError(f"most={most} and additions={additions}: both are at least 1")
        slots = (key.most.bit_length() - 1) // _slot_bits(most, additions)
        if not slots:
            raise OverflowError(
                f"a slot of {_slot_bits(most, additions)} bits for a key that takes "
                f"{key.most.bit_length()}: use fewer fraction bits, or a larger key"
            )
        return cls(most, additions, slots)

    @property
    def slot_bits(self) -> int:
        """The width of a slot: of the largest sum, its sign and the guard band."""
        return _slot_bits(self.most, self.additions)

    def count(self, values: int) -> int:
        """How many plain numbers hold so many values."""
        return -(-values // self.slots)

    def pack(self, values: Sequence[int]) -> list[int]:
        """Values in order, `slots` to a plain number.

        Raises:
          OverflowError: a value is beyond `most`.
        """
        width, packed = self.slot_bits, []
        for start in range(0, len(values), self.slots):
            number = 0
            for value in reversed(values[start : start + self.slots]):
                if not -self.most <= value <= self.most:
                    raise OverflowError(f"{value} does not fit a slot for values up to {self.most}")
                number = (number << width) + value
            packed.append(number)
        return packed

    def pack_ciphertexts(self, ciphertexts: Ciphertexts) -> Ciphertexts:
        """The same on ciphertexts, whose values may be sums already.

        Unread, nothing can be checked: `unpack` notices a slot that overflowed by less than double.
        """
        modulus, shift = ciphertexts.key.modulus, 1 << self.slot_bits
        packed = []
        for start in range(0, len(ciphertexts), self.slots):
            *rest, number = ciphertexts.values[start : start + self.slots]
            for value in reversed(rest):
                number = powmod(number, shift, modulus) * value % modulus
            packed.append(number)
        return Ciphertexts(ciphertexts.key, packed)

    def unpack(self, packed: Sequence[int], count: int) -> list[int]:
        """The values, or their sums.

        Args:
          packed: plain numbers, decrypted.
          count: how many values there are.

        Raises:
          ValueError: so many values are not packed in so many numbers.
          OverflowError: a sum is beyond what `additions` allows.
        """
        if len(packed) != self.count(count):
            raise ValueError(
                f"{count} values are packed in {self.count(count)} numbers, not in {len(packed)}"
            )
        width, largest = self.slot_bits, self.most * self.additions
        least, half = (1 << width) - 1, 1 << (width - 1)
        values: list[int] = []
        for number in packed:
            for _ in range(min(self.slots, count - len(values))):
                value = number & least
                value -= (value >= half) << width
                number = (number - value) >> width
                if not -largest <= value <= largest:
                    raise OverflowError(_OVERFLOW.format(self.additions, self.most))
                values.append(value)
            if number:
                raise OverflowError(_OVERFLOW.format(self.additions, self.most))
        return values


_OVERFLOW = "a slot holds more than {} values up to {} can sum to: state more additions"


def _slot_bits(most: int, additions: int) -> int:
    return (most * additions).bit_length() + 2
