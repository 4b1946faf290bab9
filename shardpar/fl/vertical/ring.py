"""Additive shares modulo 2^128: how they are made, multiplied by public matrices, and shortened.

A share alone is uniform and says nothing. Shortening each share by itself, after Mohassel and Zhang
(SecureML, S&P'17), is off by at most one unit, and by far more with probability
|number| / 2^127: below 2^-40 for numbers below 2^87. All sizes here are stated so that numbers stay
below 2^80.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

import numpy as np

RING_BITS = 128
MODULUS = 1 << RING_BITS
_LIMB_BITS = 16
_LIMBS = RING_BITS // _LIMB_BITS
_SHARE_BYTES = RING_BITS // 8
# int64 holds sums of products of a limb and a 15-bit number exactly up to so many terms.
_MOST_TERMS = 1 << (63 - _LIMB_BITS - 15)


def shares_of(numbers: Iterable[int]) -> np.ndarray:
    """Integers modulo 2^128, as Python's in an object array.

    >>> shares_of([-1]).tolist() == [2**128 - 1]
    True
    """
    array = np.empty(len(listed := list(numbers)), object)
    array[:] = [int(number) % MODULUS for number in listed]
    return array


def zeros(count: int) -> np.ndarray:
    """The shares of something that everyone knows to be 0."""
    return shares_of([0] * count)


def signed(numbers: np.ndarray) -> list[int]:
    """What numbers modulo 2^128 stand for: between -2^127 and 2^127."""
    half = MODULUS >> 1
    return [number - MODULUS if number >= half else number for number in numbers.tolist()]


def masks(count: int, bits: int) -> list[int]:
    """Uniform integers of so many bits, from the system's secure generator."""
    width = -(-bits // 8)
    data, extra = secrets.token_bytes(width * count), 8 * width - bits
    return [
        int.from_bytes(data[start : start + width], "little") >> extra
        for start in range(0, width * count, width)
    ]


def shortened(share: np.ndarray, bits: int, *, first: bool) -> np.ndarray:
    """A share of the number divided by 2^bits; both parties call it, one of them as the first.

    >>> number = shares_of([-1000])
    >>> mask = shares_of(masks(1, 128))
    >>> one = shortened((number - mask) % MODULUS, 3, first=True)
    >>> other = shortened(mask, 3, first=False)
    >>> abs(signed((one + other) % MODULUS)[0] + 125) <= 1
    True
    """
    if first:
        return share >> bits
    return -((-share % MODULUS) >> bits) % MODULUS


def product(matrix: np.ndarray, share: np.ndarray) -> np.ndarray:
    """matrix @ share modulo 2^128, exactly, by 16-bit limbs.

    Args:
      matrix: integers of at most 15 bits and a sign, [rows, columns].
      share: [columns].

    Raises:
      ValueError: larger integers, or billions of columns.
    """
    if matrix.shape[1] > _MOST_TERMS or np.abs(matrix).max(initial=0) > 1 << 15:
        raise ValueError(
            f"a matrix shaped {matrix.shape} of numbers up to {np.abs(matrix).max(initial=0)}: at "
            f"most {_MOST_TERMS} columns of numbers up to {1 << 15}"
        )
    raw = b"".join(number.to_bytes(_SHARE_BYTES, "little") for number in share.tolist())
    limbs = np.frombuffer(raw, "<u2").reshape(len(share), _LIMBS).astype(np.int64)
    sums = (matrix.astype(np.int64) @ limbs).astype(object)
    total = np.zeros(len(matrix), object)
    for limb in range(_LIMBS):
        total = total + (sums[:, limb] << (limb * _LIMB_BITS))
    return total % MODULUS


def to_bytes(share: np.ndarray) -> bytes:
    """Shares as they are kept and sent, 16 bytes each."""
    return b"".join(number.to_bytes(_SHARE_BYTES, "little") for number in share.tolist())


def from_bytes(data: bytes) -> np.ndarray:
    """The shares in some bytes.

    Raises:
      ValueError: the bytes are no whole number of shares.
    """
    if len(data) % _SHARE_BYTES:
        raise ValueError(f"{len(data)} bytes are no whole number of {_SHARE_BYTES}-byte shares")
    starts: Sequence[int] = range(0, len(data), _SHARE_BYTES)
    return shares_of(int.from_bytes(data[at : at + _SHARE_BYTES], "little") for at in starts)
