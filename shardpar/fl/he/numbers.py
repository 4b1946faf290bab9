"""Primes, random numbers and powers of a fixed base, on gmpy2; randomness from `secrets` alone.

Fixed-base powers follow Brickell, Gordon, McCurley and Wilson (EUROCRYPT'92): all digits of an
exponent are looked up, so a power costs one multiplication per digit and no squaring.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from functools import reduce

from gmpy2 import bit_length, f_mod_2exp, gcd, is_power, is_prime, mpz

LEAST_BITS = 2048
MOST_BITS = 8192
_ROUNDS = 40


def random_unit(modulus: mpz) -> mpz:
    """A uniform number below the modulus that has an inverse."""
    while True:
        value = mpz(secrets.randbelow(int(modulus)))
        if value > 1 and gcd(value, modulus) == 1:
            return value


def random_prime(bits: int, *, three_mod_four: bool = False) -> mpz:
    """A random prime whose two highest bits are set, so that a product of two is 2 * bits long.

    >>> p = random_prime(128, three_mod_four=True)
    >>> p.bit_length(), p % 4
    (128, mpz(3))
    """
    ones = (3 << (bits - 2)) | (3 if three_mod_four else 1)
    while True:
        candidate = mpz(secrets.randbits(bits) | ones)
        if is_prime(candidate, _ROUNDS):
            return candidate


def random_prime_with_factor(bits: int, factor: mpz) -> mpz:
    """A random prime p for which the factor divides p - 1; its highest bit is set."""
    rest = bits - int(bit_length(factor))
    while True:
        u = mpz(secrets.randbits(rest) | (1 << (rest - 1))) << 1
        candidate = factor * u + 1
        if bit_length(candidate) == bits and is_prime(candidate, _ROUNDS):
            return candidate


def short_exponent_bits(bits: int) -> int:
    """How long a random exponent must be for a modulus: four times its security level.

    >>> short_exponent_bits(2048), short_exponent_bits(3072)
    (448, 512)
    """
    return 448 if bits < 3072 else 512 if bits < 7680 else 768


def require_size(bits: int, unsafe_small_key_for_tests: bool) -> None:
    """Refuses moduli that are factored today, and ones nobody needs.

    Raises:
      ValueError: the size, and what to use.
    """
    least = 256 if unsafe_small_key_for_tests else LEAST_BITS
    if not least <= bits <= MOST_BITS or bits % 2:
        raise ValueError(
            f"keys of {bits} bits are not made: use 2048, or 3072 for data that must stay secret "
            f"beyond 2030 (even, at most {MOST_BITS}; tests may make smaller ones with "
            "unsafe_small_key_for_tests=True)"
        )


def flaw_of_modulus(n: mpz, *, unsafe_small_key_for_tests: bool = False) -> str | None:
    """Why a number that a party sent cannot be the modulus of a sound key; None if none is seen.

    That it has only two large prime factors is not proven: the owner of a key hurts only itself
    with another one, in the semi-honest model.

    >>> flaw_of_modulus(mpz(2) ** 2048 + 2)
    'it is even'
    """
    bits = int(bit_length(n))
    least = 254 if unsafe_small_key_for_tests else LEAST_BITS
    if not least <= bits <= MOST_BITS:
        return f"it has {bits} bits and not {least} to {MOST_BITS}"
    if not n % 2:
        return "it is even"
    if is_power(n):
        return "it is a power"
    if is_prime(n):
        return "it is a prime"
    if gcd(n, _PRIMORIAL) != 1:
        return "it has a small factor"
    return None


def _primorial(limit: int) -> mpz:
    return reduce(lambda product, p: product * p, filter(is_prime, range(3, limit)), mpz(1))


_PRIMORIAL = _primorial(2048)


class FixedBase:
    """Powers of one base: a table of base^(digit * 2^(window * place)) for each digit and place.

    The table takes 2^window_bits * exponent_bits / window_bits numbers of the modulus' size
    (10 MB for a 4096-bit modulus, 448-bit exponents and windows of 8).

    >>> powers = FixedBase(mpz(3), mpz(1009), exponent_bits=32)
    >>> powers(123456789) == pow(3, 123456789, 1009)
    True
    """

    def __init__(self, base: mpz, modulus: mpz, exponent_bits: int, window_bits: int = 8) -> None:
        self.modulus = modulus
        self.window_bits = window_bits
        self.places = -(-exponent_bits // window_bits)
        self._rows: list[list[mpz]] = []
        for _ in range(self.places):
            row = [mpz(1)]
            for _ in range((1 << window_bits) - 1):
                row.append(row[-1] * base % modulus)
            self._rows.append(row)
            base = row[-1] * base % modulus

    def __call__(self, exponent: int) -> mpz:
        """base^exponent.

        Raises:
          ValueError: the exponent is negative or longer than the table.
        """
        if exponent < 0 or int(exponent).bit_length() > self.places * self.window_bits:
            raise ValueError(
                f"an exponent of {int(exponent).bit_length()} bits for a table of "
                f"{self.places * self.window_bits}"
            )
        digits = []
        left = mpz(exponent)
        while left:
            digits.append(int(f_mod_2exp(left, self.window_bits)))
            left >>= self.window_bits
        return self.of_digits(digits)

    def of_digits(self, digits: Iterable[int]) -> mpz:
        """The power whose exponent has these digits, the lowest first."""
        modulus = self.modulus
        power = None
        for row, digit in zip(self._rows, digits, strict=False):
            if digit:
                power = row[digit] if power is None else power * row[digit] % modulus
        return mpz(1) if power is None else power


def random_digits(count: int, places: int, window_bits: int) -> list[Sequence[int]]:
    """The digits of `count` uniform exponents of places * window_bits bits.

    >>> [digits] = random_digits(1, 56, 8)
    >>> len(digits), max(digits) < 256
    (56, True)
    """
    width = 1 if window_bits <= 8 else 2
    words = memoryview(secrets.token_bytes(count * places * width)).cast("BH"[width - 1])
    least = (1 << window_bits) - 1
    digits = [word & least for word in words]
    return [digits[i * places : (i + 1) * places] for i in range(count)]
