"""Vectors of ciphertexts under one key, and what can be computed on them unread.

A result that was computed is not sent as it is: whoever has the key, or has seen its inputs, would
learn how it was made. `rerandomised` hides that, and `to_message` insists on it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from gmpy2 import gcd, mpz

from shardpar.errors import PartyError
from shardpar.fl.he.powers import power, product_of_powers
from shardpar.fl.messages import Message


class CiphertextsMessage(Message):
    """Ciphertexts on their way.

    Attributes:
      key: the fingerprint of the public key that they are under.
      count: how many.
      width_bytes: of each.
      data: all of them, little-endian.
    """

    key: bytes
    count: int
    width_bytes: int
    data: bytes


class PublicKey(ABC):
    """What encrypts, and what ciphertexts are computed with; each scheme has its own.

    Attributes:
      modulus: ciphertexts are units below it.
      most: plain numbers are between -most and most; sums that leave that by up to half of it are
        noticed when they are decrypted, larger ones wrap around unseen.
    """

    modulus: mpz
    most: int

    @abstractmethod
    def unmasked(self, number: int) -> mpz:
        """The ciphertext of a number that anyone can read: to compute with, never to send."""

    @abstractmethod
    def masks(self, count: int) -> list[mpz]:
        """That many fresh encryptions of 0."""

    @abstractmethod
    def fields(self) -> tuple[int, ...]:
        """The numbers that the key consists of."""

    @cached_property
    def width_bytes(self) -> int:
        """Bytes of a ciphertext."""
        return -(-int(self.modulus).bit_length() // 8)

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes that stand for the key."""
        text = f"{type(self).__module__} {' '.join(f'{field:x}' for field in self.fields())}"
        return hashlib.sha256(text.encode()).digest()[:16]

    def encrypt(self, numbers: Iterable[int]) -> Ciphertexts:
        """Encrypts integers.

        Raises:
          OverflowError: one is beyond `most`; use fewer fraction bits or slots, or a larger key.
        """
        numbers = self.checked(numbers)
        modulus = self.modulus
        masks = self.masks(len(numbers))
        values = [
            self.unmasked(number) * mask % modulus
            for number, mask in zip(numbers, masks, strict=True)
        ]
        return Ciphertexts(self, values, fresh=True)

    def zero(self, count: int) -> Ciphertexts:
        """Zeros to add to; anyone can read them until they are re-randomised."""
        return Ciphertexts(self, [mpz(1)] * count)

    def checked(self, numbers: Iterable[int]) -> list[int]:
        """The numbers as Python integers.

        Raises:
          TypeError: one is not an integer; encode it first.
          OverflowError: one is beyond `most`.
        """
        listed = integers(numbers)
        for number in listed:
            if not -self.most <= number <= self.most:
                raise OverflowError(
                    f"a number of {number.bit_length()} bits for a key that takes "
                    f"{self.most.bit_length()}: use fewer fraction bits or slots, or a larger key"
                )
        return listed


@dataclass(frozen=True, eq=False, slots=True)
class Ciphertexts:
    """A vector of encrypted integers. Never changed in place.

    Attributes:
      key: whose.
      values: the ciphertexts.
      fresh: whether each carries randomness of its own that nobody has seen used: encryptions and
        re-randomised results do, computed and received ones do not.
    """

    key: PublicKey
    values: list[mpz]
    fresh: bool = False

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"Ciphertexts({len(self)} under key {self.key.fingerprint.hex()[:8]})"

    def __add__(self, other: Ciphertexts | Iterable[int]) -> Ciphertexts:
        """Sums, elementwise, with ciphertexts or with plain integers."""
        modulus = self.key.modulus
        theirs = self._of(other)
        return self._computed([a * b % modulus for a, b in zip(self.values, theirs, strict=True)])

    def __sub__(self, other: Ciphertexts | Iterable[int]) -> Ciphertexts:
        """Differences, elementwise."""
        if isinstance(other, Ciphertexts):
            return self + (-other)
        return self + [-number for number in integers(other)]

    def __neg__(self) -> Ciphertexts:
        return self._computed([power(c, -1, self.key.modulus) for c in self.values])

    def times(self, numbers: Iterable[int]) -> Ciphertexts:
        """Products with plain integers, elementwise."""
        modulus = self.key.modulus
        return self._computed(
            [
                power(c, number, modulus)
                for c, number in zip(self.values, integers(numbers), strict=True)
            ]
        )

    def dot(self, numbers: Iterable[int]) -> Ciphertexts:
        """The one sum of the products with plain integers; zeros cost nothing."""
        return self._computed([product_of_powers(self.values, integers(numbers), self.key.modulus)])

    def matmul(self, matrix: Any) -> Ciphertexts:
        """The vector times an integer matrix; costs grow with its non-zeros.

        Args:
          matrix: shaped [len(self), columns]: a NumPy array of integers (of Python's, where 64
            bits do not suffice), nested lists, or a scipy.sparse matrix.

        Raises:
          ValueError: its rows are not as many as the ciphertexts.
        """
        if getattr(matrix, "ndim", 2) != 2:
            raise ValueError(f"a matrix has 2 dims, this one is shaped {matrix.shape}")
        modulus = self.key.modulus
        return self._computed(
            [
                product_of_powers([self.values[row] for row in rows], numbers, modulus)
                for rows, numbers in columns_of(matrix, len(self))
            ]
        )

    def sums(self, groups: Iterable[int], count: int) -> Ciphertexts:
        """The sum of each group: one histogram.

        Args:
          groups: the group of each ciphertext, below `count`; negative ones are in no group.
          count: how many groups.

        Raises:
          IndexError: a group is not below `count`.
        """
        modulus = self.key.modulus
        sums: list[mpz | None] = [None] * count
        for value, group in zip(self.values, integers(groups), strict=True):
            if group >= 0:
                held = sums[group]
                sums[group] = value if held is None else held * value % modulus
        return self._computed([mpz(1) if held is None else held for held in sums])

    def take(self, indices: Iterable[int]) -> Ciphertexts:
        """The ciphertexts at some places, in that order; one taken twice is no longer fresh."""
        places = integers(indices)
        fresh = self.fresh and len(set(places)) == len(places) and min(places, default=0) >= 0
        return replace(self, values=[self.values[place] for place in places], fresh=fresh)

    def concat(self, *others: Ciphertexts) -> Ciphertexts:
        """The vector followed by the others.

        Raises:
          ValueError: one is under another key.
        """
        values = list(self.values)
        for other in others:
            values += self._of(other)
        fresh = self.fresh and all(other.fresh for other in others)
        return replace(self, values=values, fresh=fresh and len(set(values)) == len(values))

    def rerandomised(self) -> Ciphertexts:
        """The same numbers under fresh randomness: nothing shows how they were computed."""
        modulus = self.key.modulus
        masks = self.key.masks(len(self))
        values = [c * mask % modulus for c, mask in zip(self.values, masks, strict=True)]
        return replace(self, values=values, fresh=True)

    def to_message(self) -> CiphertextsMessage:
        """These as they are sent.

        Raises:
          ValueError: they were computed or received, and not re-randomised since.
        """
        if not self.fresh:
            raise ValueError(
                "computed ciphertexts show how they were made to whoever has the key or has seen "
                "their inputs; send .rerandomised().to_message()"
            )
        width = self.key.width_bytes
        data = b"".join(value.to_bytes(width, "little") for value in self.values)
        return CiphertextsMessage(self.key.fingerprint, len(self), width, data)

    @classmethod
    def from_message(
        cls,
        key: PublicKey,
        message: CiphertextsMessage,
        *,
        count: int | None = None,
        party: str = "a party",
    ) -> Ciphertexts:
        """The ciphertexts in a message, none of them fresh.

        Args:
          key: the key that they must be under.
          message: as it came.
          count: how many there must be.
          party: who sent it.

        Raises:
          PartyError: they are under another key, of another number or size, or not ciphertexts.
        """
        width = key.width_bytes
        if message.key != key.fingerprint:
            raise PartyError(f"{party} sent ciphertexts under another key", party=party)
        if message.width_bytes != width or message.count * width != len(message.data):
            raise PartyError(
                f"{party} sent {len(message.data)} bytes for {message.count} ciphertexts of "
                f"{message.width_bytes} bytes; under this key they have {width}",
                party=party,
            )
        if count is not None and message.count != count:
            raise PartyError(
                f"{party} sent {message.count} ciphertexts where the protocol has {count}",
                party=party,
            )
        data = memoryview(message.data)
        values = [
            mpz.from_bytes(bytes(data[i : i + width]), "little") for i in range(0, len(data), width)
        ]
        product = mpz(1)
        for value in values:
            if not 0 < value < key.modulus:
                raise PartyError(f"{party} sent a number that is no ciphertext", party=party)
            product = product * value % key.modulus
        # One that shares a factor with the modulus would make the product share it.
        if gcd(product, key.modulus) != 1:
            raise PartyError(f"{party} sent a number that is no ciphertext", party=party)
        return cls(key, values)

    def _computed(self, values: list[mpz]) -> Ciphertexts:
        return Ciphertexts(self.key, values)

    def _of(self, other: Ciphertexts | Iterable[int]) -> list[mpz]:
        if not isinstance(other, Ciphertexts):
            return [self.key.unmasked(number) for number in self.key.checked(other)]
        if other.key is not self.key and other.key != self.key:
            raise ValueError("these ciphertexts are under different keys")
        return other.values


def integers(numbers: Iterable[int]) -> list[int]:
    """Numbers as Python integers.

    Raises:
      TypeError: one is not an integer.
    """
    if isinstance(numbers, np.ndarray):
        numbers = numbers.tolist()
    listed = list(numbers)
    for place, number in enumerate(listed):
        if type(number) is not int:
            if isinstance(number, float) or not hasattr(number, "__index__"):
                raise TypeError(
                    f"{number!r} is not an integer; encode real numbers with "
                    "shardpar.fl.he.encoding.FixedPoint"
                )
            listed[place] = number.__index__()
    return listed


def columns_of(matrix: Any, rows: int) -> list[tuple[Sequence[int], list[int]]]:
    """(rows, numbers) of the non-zeros of each column.

    Raises:
      ValueError: the matrix has another number of rows.
    """
    if hasattr(matrix, "tocsc"):
        sparse = matrix.tocsc()
        shape, ends = sparse.shape, sparse.indptr.tolist()
        places, numbers = sparse.indices.tolist(), integers(sparse.data)
        found = [(places[a:b], numbers[a:b]) for a, b in pairwise(ends)]
    else:
        dense = matrix if isinstance(matrix, np.ndarray) else np.array(matrix, dtype=object)
        dense = dense.reshape(0, 0) if not dense.size and dense.ndim == 1 else dense
        shape = dense.shape
        found = []
        for column in dense.T:
            (nonzero,) = np.nonzero(column)
            found.append((nonzero.tolist(), integers(column[nonzero])))
    if shape[0] != rows:
        raise ValueError(f"a matrix of {shape[0]} rows for {rows} ciphertexts")
    return found


def signed(value: mpz, space: mpz) -> int:
    """A decrypted number, negative where it lies in the top third of the space.

    Raises:
      OverflowError: it lies in the middle third, where no sum within bounds ends.
    """
    third = space // 3
    if value <= third:
        return int(value)
    if value >= space - third:
        return int(value - space)
    raise OverflowError(
        "a sum overflowed the key's plain numbers: use fewer fraction bits or slots, or a larger "
        "key"
    )
