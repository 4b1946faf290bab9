"""Points of curve25519 from bytes: RFC 9380's curve25519_XMD:SHA-512_ELL2_NU_, u-coordinates only.

Only field arithmetic is done here; multiplication on the curve is left to X25519, whose scalars are
multiples of 8, so that the suite's last step, clearing the cofactor, is part of it. Encoding is not
uniform over the curve, as the suite with RO is, and need not be where only values behind a secret
scalar are shown: Elligator 2 (CCS'13) can be inverted, so that a hash can be programmed to give a
point whose logarithm is known, which is all that proofs of Diffie-Hellman intersections ask of it.
Not hardened against measuring the time taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from gmpy2 import invert, jacobi, mpz

POINT_BYTES = 32
PRIME = mpz(2) ** 255 - 19
_A = mpz(486662)
# The bytes that a field element is reduced from: 128 bits more than it has, so nearly uniform.
_ELEMENT_BYTES = 48
_BLOCK_BYTES = 128
_MOST_DST_BYTES = 255


def expand_message(message: bytes, dst: bytes, length: int) -> bytes:
    """RFC 9380's expand_message_xmd with SHA-512, up to one digest long.

    Args:
      message: any bytes.
      dst: domain separation tag, 1 to 255 bytes.
      length: how many bytes, at most 64.

    Raises:
      ValueError: the tag or the length is out of range.
    """
    if not 0 < len(dst) <= _MOST_DST_BYTES:
        raise ValueError(f"a domain separation tag of {len(dst)} bytes; use 1 to {_MOST_DST_BYTES}")
    if not 0 < length <= hashlib.sha512().digest_size:
        raise ValueError(f"{length} bytes; one SHA-512 gives 1 to 64")
    tag = dst + bytes([len(dst)])
    first = hashlib.sha512(bytes(_BLOCK_BYTES))
    first.update(message + length.to_bytes(2, "big") + b"\0" + tag)
    return hashlib.sha512(first.digest() + b"\1" + tag).digest()[:length]


def field_element(message: bytes, dst: bytes) -> mpz:
    """RFC 9380's hash_to_field, one element."""
    return mpz.from_bytes(expand_message(message, dst, _ELEMENT_BYTES), "big") % PRIME


def elligator2(elements: Sequence[mpz]) -> list[mpz]:
    """RFC 9380's map_to_curve_elligator2_curve25519, its u-coordinates, many with one inversion.

    >>> [int(x) == PRIME - 486662 for x in elligator2([mpz(0)])]
    [False]
    """
    numerators, denominators = [], []
    for element in elements:
        twice = 2 * element * element % PRIME
        # Never 0: -1/2 is no square modulo this prime.
        below = 1 + twice
        # Whether the curve has a point over -A / below, without dividing yet.
        square = -_A * below * (below * below - _A * _A * twice)
        numerators.append(-_A if jacobi(square, PRIME) >= 0 else -_A * twice)
        denominators.append(below)
    inverses = _inverses(denominators)
    return [a * b % PRIME for a, b in zip(numerators, inverses, strict=True)]


def encode_to_curve(messages: Sequence[bytes], dst: bytes) -> list[bytes]:
    """For each message, the u-coordinate of its point, as X25519 takes it: 32 bytes, little-endian.

    The cofactor is not cleared; X25519 does that with every scalar.
    """
    points = elligator2([field_element(message, dst) for message in messages])
    return [point.to_bytes(POINT_BYTES, "little") for point in points]


def _inverses(values: Sequence[mpz]) -> list[mpz]:
    """Inverses of units, by one inversion and three products each (Montgomery's trick)."""
    before, product = [], mpz(1)
    for value in values:
        before.append(product)
        product = product * value % PRIME
    after = invert(product, PRIME)
    inverses = [mpz(0)] * len(values)
    for at in range(len(values) - 1, -1, -1):
        inverses[at] = after * before[at] % PRIME
        after = after * values[at] % PRIME
    return inverses
