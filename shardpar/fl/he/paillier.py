"""Paillier's encryption (EUROCRYPT'99) as Damgård, Jurik and Nielsen do it (IJIS 2010).

Masks are powers h^(n*r) of one public base with a short random r, so that tables make them cheap;
p = q = 3 (mod 4) makes the base generate what it must. Safe against whoever sends ciphertexts to
decrypt, as long as they do not learn the answer. Not hardened against measuring the time taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from gmpy2 import divexact, gcd, invert, jacobi, mpz, powmod

from shardpar.errors import PartyError
from shardpar.fl.he.ciphertexts import Ciphertexts, signed
from shardpar.fl.he.ciphertexts import PublicKey as AnyPublicKey
from shardpar.fl.he.numbers import (
    FixedBase,
    flaw_of_modulus,
    random_digits,
    random_prime,
    random_unit,
    require_size,
    short_exponent_bits,
)
from shardpar.fl.messages import Message

WINDOW_BITS = 10


class PublicKeyMessage(Message):
    """A public key on its way: its modulus and its base, little-endian."""

    n: bytes
    h: bytes


@dataclass(frozen=True)
class PublicKey(AnyPublicKey):
    """A modulus n and the base h of the masks; made by `generate` or `from_message`."""

    n: mpz
    h: mpz

    def __reduce__(self) -> tuple[type[PublicKey], tuple[mpz, mpz]]:
        return PublicKey, (self.n, self.h)

    @cached_property
    def modulus(self) -> mpz:  # type: ignore[override]
        """n²."""
        return self.n * self.n

    @cached_property
    def most(self) -> int:  # type: ignore[override]
        """A third of n: what is between that and two thirds can only be an overflow."""
        return int(self.n // 3)

    def fields(self) -> tuple[int, ...]:
        """n and h."""
        return int(self.n), int(self.h)

    def unmasked(self, number: int) -> mpz:
        """1 + number * n."""
        return (1 + number * self.n) % self.modulus

    def masks(self, count: int) -> list[mpz]:
        """That many fresh encryptions of 0."""
        powers = self._powers
        digits = random_digits(count, powers.places, powers.window_bits)
        return [powers.of_digits(each) for each in digits]

    @cached_property
    def _powers(self) -> FixedBase:
        base = powmod(self.h, self.n, self.modulus)
        bits = short_exponent_bits(int(self.n).bit_length())
        return FixedBase(base, self.modulus, bits, WINDOW_BITS)

    def to_message(self) -> PublicKeyMessage:
        """The key as it is sent."""
        width = -(-int(self.n).bit_length() // 8)
        return PublicKeyMessage(self.n.to_bytes(width, "little"), self.h.to_bytes(width, "little"))

    @classmethod
    def from_message(
        cls,
        message: PublicKeyMessage,
        *,
        party: str = "a party",
        unsafe_small_key_for_tests: bool = False,
    ) -> PublicKey:
        """The key in a message.

        Raises:
          PartyError: it is too small or too large, or visibly not a product of two primes that are
            3 (mod 4), or its base is not one.
        """
        n, h = mpz.from_bytes(message.n, "little"), mpz.from_bytes(message.h, "little")
        flaw = flaw_of_modulus(n, unsafe_small_key_for_tests=unsafe_small_key_for_tests)
        if flaw is None and n % 4 != 1:
            flaw = "it is not a product of two primes that are 3 (mod 4)"
        if flaw is None and not (1 < h < n - 1 and gcd(h, n) == 1 and jacobi(h, n) == 1):
            flaw = "its base is no negated square"
        if flaw is not None:
            raise PartyError(f"{party} sent an unsound Paillier key: {flaw}", party=party)
        return cls(n, h)


@dataclass(frozen=True)
class SecretKey:
    """The factors of a modulus; made by `generate`. Never sent, never logged."""

    public: PublicKey
    p: mpz = field(repr=False)
    q: mpz = field(repr=False)

    def __reduce__(self) -> tuple[type[SecretKey], tuple[PublicKey, mpz, mpz]]:
        return SecretKey, (self.public, self.p, self.q)

    def decrypt(self, ciphertexts: Ciphertexts, *, trusted: bool = False) -> list[int]:
        """The numbers in ciphertexts under this key.

        Args:
          ciphertexts: of which nobody may learn more of the numbers than the protocol says.
          trusted: without meaning here; `okamoto_uchiyama` asks for it.

        Raises:
          ValueError: they are under another key.
          OverflowError: a sum overflowed.
        """
        if ciphertexts.key != self.public:
            raise ValueError("these ciphertexts are under another key")
        n = self.public.n
        return [signed(self._residue(c), n) for c in ciphertexts.values]

    def encrypt(self, numbers: list[int]) -> Ciphertexts:
        """As the public key does, about twice as fast, by working modulo p² and q².

        Raises:
          OverflowError: a number is beyond `public.most`.
        """
        public, modulus = self.public, self.public.modulus
        numbers = public.checked(numbers)
        modulo_p, modulo_q, p2_inverse = self._tables
        p2, q2 = modulo_p.modulus, modulo_q.modulus
        values = []
        digits = random_digits(len(numbers), modulo_p.places, modulo_p.window_bits)
        for number, each in zip(numbers, digits, strict=True):
            a, b = modulo_p.of_digits(each), modulo_q.of_digits(each)
            mask = a + (b - a) * p2_inverse % q2 * p2
            values.append(public.unmasked(number) * mask % modulus)
        return Ciphertexts(public, values, fresh=True)

    @cached_property
    def _tables(self) -> tuple[FixedBase, FixedBase, mpz]:
        n, h = self.public.n, self.public.h
        bits = short_exponent_bits(int(n).bit_length())
        p2, q2 = self.p * self.p, self.q * self.q
        return (
            FixedBase(powmod(h, n, p2), p2, bits, WINDOW_BITS),
            FixedBase(powmod(h, n, q2), q2, bits, WINDOW_BITS),
            invert(p2, q2),
        )

    @cached_property
    def _scales(self) -> tuple[mpz, mpz, mpz]:
        p, q, n = self.p, self.q, self.public.n
        return (
            invert(_quotient(powmod(1 + n, p - 1, p * p), p), p),
            invert(_quotient(powmod(1 + n, q - 1, q * q), q), q),
            invert(p, q),
        )

    def _residue(self, c: mpz) -> mpz:
        p, q = self.p, self.q
        scale_p, scale_q, p_inverse = self._scales
        a = _quotient(powmod(c, p - 1, p * p), p) * scale_p % p
        b = _quotient(powmod(c, q - 1, q * q), q) * scale_q % q
        return a + (b - a) * p_inverse % q * p


def generate(bits: int = 2048, *, unsafe_small_key_for_tests: bool = False) -> SecretKey:
    """A new key.

    Args:
      bits: of the modulus: 2048, or 3072 for what must stay secret beyond 2030.
      unsafe_small_key_for_tests: allows sizes that are broken in minutes.

    Raises:
      ValueError: a size that is not made.

    >>> secret = generate(512, unsafe_small_key_for_tests=True)
    >>> held = secret.public.encrypt([3, -4]) + [10, 10]
    >>> secret.decrypt(held.dot([2, 5]).rerandomised())
    [56]
    """
    require_size(bits, unsafe_small_key_for_tests)
    p = random_prime(bits // 2, three_mod_four=True)
    q = p
    # Factors close to each other are found by Fermat's method; FIPS 186-5 demands this distance.
    while abs(p - q) < mpz(1) << max(bits // 2 - 100, 2):
        q = random_prime(bits // 2, three_mod_four=True)
    n = p * q
    h = n - random_unit(n) ** 2 % n
    return SecretKey(PublicKey(n, h), p, q)


def _quotient(u: mpz, p: mpz) -> mpz:
    return divexact(u - 1, p)
