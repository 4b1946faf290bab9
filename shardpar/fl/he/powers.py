"""Products of many powers, as few multiplications as their exponents allow.

Buckets per digit follow Pippenger (FOCS'76): with m factors and windows of w bits a window costs
m + 2^(w+1) multiplications, so a dot product with 16-bit numbers costs two or three per number
instead of the twenty-four of separate powers.
"""

from __future__ import annotations

from collections.abc import Sequence

from gmpy2 import invert, mpz, powmod

_SEPARATE = 0.9
"""What a bit of a separate power costs, in multiplications modulo a number of 4096 bits."""


def power(base: mpz, exponent: int, modulus: mpz) -> mpz:
    """base^exponent; negative exponents invert."""
    return powmod(base, exponent, modulus) if exponent else mpz(1)


def product_of_powers(bases: Sequence[mpz], exponents: Sequence[int], modulus: mpz) -> mpz:
    """The product of base^exponent, exponents of either sign; zeros cost nothing.

    >>> product_of_powers([mpz(3), mpz(5), mpz(7)], [2, 0, -1], mpz(11)) == 9 * pow(7, -1, 11) % 11
    True
    """
    above = [(base, e) for base, e in zip(bases, exponents, strict=True) if e > 0]
    below = [(base, -e) for base, e in zip(bases, exponents, strict=True) if e < 0]
    product = _product(above, modulus)
    return product * invert(_product(below, modulus), modulus) % modulus if below else product


def _product(factors: list[tuple[mpz, int]], modulus: mpz) -> mpz:
    if not factors:
        return mpz(1)
    bits = max(e.bit_length() for _, e in factors)
    width = _width(len(factors), bits)
    if width == 0:
        product = mpz(1)
        for base, e in factors:
            product = product * (base if e == 1 else powmod(base, e, modulus)) % modulus
        return product
    product = mpz(1)
    for shift in reversed(range(0, bits, width)):
        if product != 1:
            product = powmod(product, 1 << width, modulus)
        product = product * _window(factors, shift, width, modulus) % modulus
    return product


def _width(count: int, bits: int) -> int:
    """The cheapest window, or 0 for separate powers."""
    costs = {w: -(-bits // w) * (count + (2 << w if w > 1 else 0) + w) for w in range(1, 13)}
    width = min(costs, key=costs.__getitem__)
    separate = count * (1 + (_SEPARATE * bits if bits > 1 else 0))
    return 0 if separate <= costs[width] else width


def _window(factors: list[tuple[mpz, int]], shift: int, width: int, modulus: mpz) -> mpz:
    """The product of base^digit for the digit of each exponent at a place."""
    least = (1 << width) - 1
    buckets: list[mpz | None] = [None] * (1 << width)
    for base, exponent in factors:
        digit = exponent >> shift & least
        if digit:
            held = buckets[digit]
            buckets[digit] = base if held is None else held * base % modulus
    # The suffix products, multiplied, give each bucket as often as its digit says.
    suffix = product = None
    for bucket in reversed(buckets[1:]):
        if bucket is not None:
            suffix = bucket if suffix is None else suffix * bucket % modulus
        if suffix is not None:
            product = suffix if product is None else product * suffix % modulus
    return mpz(1) if product is None else product
