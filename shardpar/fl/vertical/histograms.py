"""Sums of encrypted derivatives by bin, and how pairs of them share a ciphertext.

After Fu et al., VF²Boost (SIGMOD'21), and Chen et al., SecureBoost+ (2021): first and second
derivative of a row are one plain number, so that one addition adds both; all have the same fixed
point, so that nothing is scaled; what a node's splits have on their left is packed many to a
ciphertext before it is decrypted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from gmpy2 import invert, mpz, powmod

from shardpar.fl.he.ciphertexts import Ciphertexts, PublicKey
from shardpar.fl.he.packing import Packing
from shardpar.fl.he.pool import Pool, joined, unjoined
from shardpar.fl.vertical.bins import Bins

_CHUNK_PER_BIN = 32
"""Rows to a job, per bin: merging what jobs found then costs a thirtieth of adding up."""
_COMMON_SHARE = 4
"""A bin with more than one row in so many is not added up."""


def pair_packing(key: PublicKey, most: int, rows: int) -> Packing:
    """How pairs of derivatives up to `most`, summed over so many rows, lie in a plain number.

    Raises:
      OverflowError: not even one pair fits.
    """
    packing = Packing.of(key, most=most, additions=max(rows, 1))
    if packing.slots < 2:
        raise OverflowError(
            f"two slots of {packing.slot_bits} bits for a key that takes {key.most.bit_length()}: "
            "use fewer gradient_bits, or a larger key"
        )
    return replace(packing, slots=packing.slots // 2 * 2)


def pairs_of(packing: Packing, first: np.ndarray, second: np.ndarray) -> list[int]:
    """Plain numbers, each a row's first and second derivative."""
    largest = max(int(np.abs(each).max(initial=0)) for each in (first, second))
    if largest > packing.most:
        raise OverflowError(f"a derivative of {largest} for slots of up to {packing.most}")
    shift = packing.slot_bits
    return [a + (b << shift) for a, b in zip(first.tolist(), second.tolist(), strict=True)]


def opened(packing: Packing, numbers: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and second halves of so many pairs, int64, from decrypted numbers.

    Raises:
      OverflowError: a sum is larger than it can be.
    """
    flat = packing.unpack(numbers, 2 * count)
    pairs = np.array(flat, np.int64).reshape(count, 2)
    return pairs[:, 0], pairs[:, 1]


def stacked(packing: Packing, pairs: Ciphertexts) -> Ciphertexts:
    """Encrypted pairs, as many to a ciphertext as fit."""
    modulus, shift = pairs.key.modulus, 1 << (2 * packing.slot_bits)
    values = []
    for start in range(0, len(pairs), packing.slots // 2):
        *rest, number = pairs.values[start : start + packing.slots // 2]
        for value in reversed(rest):
            number = powmod(number, shift, modulus) * value % modulus
        values.append(number)
    return Ciphertexts(pairs.key, values)


class EncryptedHistogram:
    """Sums by column and bin, of rows that come in parts.

    Args:
      key: under which the rows' pairs are.
      columns: how many.
      width: bins of a column.
    """

    def __init__(self, key: PublicKey, columns: int, width: int) -> None:
        self._key, self._columns, self._width = key, columns, width
        self.values = [mpz(1)] * (columns * width)

    def add(
        self,
        values: list[mpz],
        binned: np.ndarray,
        pool: Pool,
        go_on: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Adds rows.

        Args:
          values: each row's ciphertext.
          binned: their bins, [rows, columns].
          pool: adds parts of them at once.
          go_on: is asked in between.

        Returns:
          Whether all were added: False once `go_on` said no.
        """
        for part in pool.mapped(_job, self._jobs(values, binned)):
            if not go_on():
                return False
            self._merge(unjoined(part, self._key.width_bytes))
        return True

    def left_of(self, bins: Bins) -> Ciphertexts:
        """What each split has on its left; its order is that of `bins.splits`."""
        modulus, splits, width = self._key.modulus, bins.splits, self._width
        sums, left = list(self.values), []
        for at in range(len(sums)):
            if at % width:
                sums[at] = sums[at - 1] if sums[at] == 1 else sums[at - 1] * sums[at] % modulus
        for column, last, missing_left in zip(
            splits.column.tolist(), splits.bin.tolist(), splits.missing_left.tolist(), strict=True
        ):
            value = sums[column * width + last]
            if missing_left:
                gap = self.values[column * width + len(bins.edges[column]) + 1]
                value = value * gap % modulus
            left.append(value)
        return Ciphertexts(self._key, left)

    def _jobs(
        self, values: list[mpz], binned: np.ndarray
    ) -> Iterator[tuple[PublicKey, bytes, np.ndarray, int]]:
        size = max(_CHUNK_PER_BIN * self._width, 1)
        for start in range(0, len(values), size):
            part = slice(start, start + size)
            yield (
                self._key,
                joined(values[part], self._key.width_bytes),
                binned[part],
                self._width,
            )

    def _merge(self, values: list[mpz]) -> None:
        modulus = self._key.modulus
        self.values = [
            b if a == 1 else a if b == 1 else a * b % modulus
            for a, b in zip(self.values, values, strict=True)
        ]


def _job(job: tuple[PublicKey, bytes, np.ndarray, int]) -> bytes:
    key, data, binned, width = job
    held = Ciphertexts(key, unjoined(data, key.width_bytes))
    return joined(sums_by_bin(held, binned, width), key.width_bytes)


def sums_by_bin(held: Ciphertexts, binned: np.ndarray, width: int) -> list[mpz]:
    """The sum of each column's bins, one column after the other.

    The rows of a bin that holds many, such as the zeros of a sparse column, are not added up: they
    are all rows less the others.

    Args:
      held: a ciphertext per row.
      binned: [rows, columns].
      width: bins of a column.
    """
    modulus, everything = held.key.modulus, None
    found: list[mpz] = []
    for column in binned.T:
        counts = np.bincount(column, minlength=width)
        common = int(counts.argmax())
        if counts[common] * _COMMON_SHARE <= len(column):
            found += held.sums(column, width).values
            continue
        sums = held.sums(np.where(column == common, -1, column), width).values
        if everything is None:
            everything = _product(held.values, modulus)
        sums[common] = everything * invert(_product(sums, modulus), modulus) % modulus
        found += sums
    return found


def _product(values: list[mpz], modulus: mpz) -> mpz:
    product = mpz(1)
    for value in values:
        product = product * value % modulus
    return product
