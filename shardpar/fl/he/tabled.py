"""Encrypted vector times a matrix of many columns, from a table of each ciphertext's powers.

A ciphertext that meets hundreds of columns earns a table of its small powers: then each of a
matrix' numbers costs one multiplication per digit, two for 16 bits, where Pippenger's buckets
(`powers`), which begin anew at every column, cost four. Digits are signed and those below zero are
multiplied up apart, so that an output takes one inversion. Tables after Brickell, Gordon, McCurley
and Wilson (EUROCRYPT'92), with the bases, not the exponent, in the outer loop.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gmpy2 import invert, mpz, powmod

from shardpar.fl.he.ciphertexts import Ciphertexts, PublicKey
from shardpar.fl.he.pool import Pool, joined, unjoined

_MOST_BITS = 30
_MOST_WINDOW = 10


def tabled_matmul(
    ciphertexts: Ciphertexts, matrix: np.ndarray, pool: Pool | None = None
) -> Ciphertexts:
    """As `ciphertexts.matmul(matrix)`, for a matrix with many columns of small integers.

    Args:
      ciphertexts: a vector.
      matrix: integers below 2^30 in magnitude, [len(ciphertexts), columns]; zeros cost nothing.
      pool: splits the rows over its processes.

    Returns:
      One ciphertext per column, not fresh.

    Raises:
      ValueError: the matrix has another number of rows, or is none of small integers.

    >>> from shardpar.fl.he import paillier
    >>> secret = paillier.generate(512, unsafe_small_key_for_tests=True)
    >>> held = secret.public.encrypt([3, -4])
    >>> secret.decrypt(tabled_matmul(held, np.array([[2, 0, -300], [5, 1, 7]])))
    [-14, -4, -928]
    """
    key = ciphertexts.key
    if matrix.ndim != 2 or matrix.dtype.kind not in "iu":
        raise ValueError(f"a matrix of integers, not {matrix.dtype} shaped {matrix.shape}")
    if len(matrix) != len(ciphertexts):
        raise ValueError(f"a matrix of {len(matrix)} rows for {len(ciphertexts)} ciphertexts")
    if matrix.size and int(np.abs(matrix.astype(np.int64)).max()).bit_length() > _MOST_BITS:
        raise ValueError(f"a number of more than {_MOST_BITS} bits: use Ciphertexts.matmul")
    processes = 1 if pool is None else pool.processes
    if pool is None or processes == 1 or len(ciphertexts) < 2 * processes:
        return Ciphertexts(key, _product(ciphertexts.values, matrix, key.modulus))
    total = [mpz(1)] * matrix.shape[1]
    for part in pool.mapped(_job, _jobs(key, ciphertexts.values, matrix, processes)):
        values = unjoined(part, key.width_bytes)
        total = [a * b % key.modulus for a, b in zip(total, values, strict=True)]
    return Ciphertexts(key, total)


def signed_digits(numbers: np.ndarray, window_bits: int) -> np.ndarray:
    """Digits between -2^(w-1) and 2^(w-1), the lowest first, [digits, *numbers.shape].

    >>> signed_digits(np.array([300, -129]), 8).tolist()
    [[44, 127], [1, -1]]
    """
    half, base = 1 << (window_bits - 1), 1 << window_bits
    left, digits = numbers.astype(np.int64), []
    while left.any():
        digit = (left + half) % base - half
        digits.append(digit)
        left = (left - digit) >> window_bits
    return np.stack(digits) if digits else np.zeros((0, *numbers.shape), np.int64)


def _jobs(
    key: PublicKey, values: list[mpz], matrix: np.ndarray, parts: int
) -> Iterator[tuple[PublicKey, bytes, np.ndarray]]:
    size = -(-len(values) // parts)
    for start in range(0, len(values), size):
        part = slice(start, start + size)
        yield key, joined(values[part], key.width_bytes), matrix[part]


def _job(job: tuple[PublicKey, bytes, np.ndarray]) -> bytes:
    key, data, matrix = job
    values = unjoined(data, key.width_bytes)
    return joined(_product(values, matrix, key.modulus), key.width_bytes)


def _window(bits: int, columns: int) -> int:
    """The window that costs least: half a table, and a multiplication per digit and column."""
    return min(
        range(2, _MOST_WINDOW + 1),
        key=lambda w: (1 << (w - 1)) + columns * -(-(bits + 1) // w),
    )


def _product(values: list[mpz], matrix: np.ndarray, modulus: mpz) -> list[mpz]:
    rows, columns = matrix.shape
    bits = int(np.abs(matrix.astype(np.int64)).max(initial=0)).bit_length()
    window = _window(bits, columns)
    digits = signed_digits(matrix, window)
    above = [[mpz(1)] * columns for _ in digits]
    below = [[mpz(1)] * columns for _ in digits]
    for row in range(rows):
        places = digits[:, row]
        table = [mpz(1), values[row]]
        for _ in range(int(np.abs(places).max(initial=0)) - 1):
            table.append(table[-1] * values[row] % modulus)
        for place, up, down in zip(places, above, below, strict=True):
            (columns_of_place,) = np.nonzero(place)
            digits_of_place = place[columns_of_place].tolist()
            for column, digit in zip(columns_of_place.tolist(), digits_of_place, strict=True):
                if digit > 0:
                    up[column] = up[column] * table[digit] % modulus
                else:
                    down[column] = down[column] * table[-digit] % modulus
    ups, downs = (_weighted(part, window, columns, modulus) for part in (above, below))
    return [
        up if down == 1 else up * invert(down, modulus) % modulus
        for up, down in zip(ups, downs, strict=True)
    ]


def _weighted(places: list[list[mpz]], window_bits: int, columns: int, modulus: mpz) -> list[mpz]:
    """The products of each place to the power of its weight."""
    total, shift = [mpz(1)] * columns, 1 << window_bits
    for place in reversed(places):
        total = [
            value if held == 1 else powmod(held, shift, modulus) * value % modulus
            for held, value in zip(total, place, strict=True)
        ]
    return total
