"""Sharing a secret so that any t parties can restore it and fewer learn nothing.

Shamir, "How to share a secret" (CACM 1979), over the field of the prime 2^256 + 297, so that every
32-byte secret is an element. Coefficients come from `secrets`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence

PRIME = (1 << 256) + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, points: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Shares of a secret, one for each point.

    Args:
      secret: 32 bytes.
      points: where the polynomial is evaluated: a different number from 1 for every holder.
      threshold: how many shares restore the secret.

    Returns:
      For each point its share, 33 bytes.

    Raises:
      ValueError: points repeat or are not in 1..PRIME-1, or there are fewer than the threshold.

    >>> shares = split(bytes(range(32)), [1, 2, 3], threshold=2)
    >>> restore({1: shares[1], 3: shares[3]}, threshold=2) == bytes(range(32))
    True
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes; shares are made of {SECRET_BYTES}")
    _check_points(points)
    if not 1 <= threshold <= len(points):
        raise ValueError(f"threshold {threshold} for {len(points)} shares; use 1..{len(points)}")
    polynomial = [int.from_bytes(secret, "big")]
    polynomial += [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    return {point: _value(polynomial, point).to_bytes(SHARE_BYTES, "big") for point in points}


def restore(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret that shares were made of.

    Shares beyond the threshold are used to find wrong ones.

    Args:
      shares: for each point its share.
      threshold: the one they were made with.

    Raises:
      ValueError: fewer shares than the threshold, one that is no share, or shares that are not of
        one secret.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares of a secret that takes {threshold} to restore")
    _check_points(list(shares))
    values = {}
    for point, share in shares.items():
        value = int.from_bytes(share, "big")
        if len(share) != SHARE_BYTES or value >= PRIME:
            raise ValueError(f"the share at point {point} is not an element of the field")
        values[point] = value
    base = sorted(values)[:threshold]
    for point in sorted(values)[threshold:]:
        if _interpolated(values, base, point) != values[point]:
            raise ValueError(f"the share at point {point} belongs to another secret than the rest")
    secret = _interpolated(values, base, 0)
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("the shares are not of one secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def _value(polynomial: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % PRIME
    return value


def _interpolated(values: Mapping[int, int], base: Sequence[int], at: int) -> int:
    total = 0
    for point in base:
        others = [other for other in base if other != point]
        above = math.prod(at - other for other in others) % PRIME
        below = math.prod(point - other for other in others) % PRIME
        total += values[point] * above * pow(below, -1, PRIME)
    return total % PRIME


def _check_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points):
        raise ValueError(f"points repeat in {sorted(points)}; every holder needs one of its own")
    if any(not 0 < point < PRIME for point in points):
        raise ValueError("a point outside 1..PRIME-1; at 0 a share would be the secret itself")
