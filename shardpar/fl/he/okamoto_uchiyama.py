"""Okamoto and Uchiyama's encryption (EUROCRYPT'98): half of Paillier's size, several times faster.

p - 1 has a prime factor t of 256 bits whose power decrypts, after Coron, Naccache and Paillier
(Electronics Letters 1999). Whoever learns the decryption of a ciphertext of their own choice
factors the modulus: encrypt m > p, and m minus the answer is a multiple of p. So `decrypt` demands
that the caller vouches for who computed the ciphertexts; where no one can, use `paillier`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from gmpy2 import divexact, gcd, invert, mpz, powmod

from shardpar.errors import PartyError
from shardpar.fl.he.ciphertexts import Ciphertexts, signed
from shardpar.fl.he.ciphertexts import PublicKey as AnyPublicKey
from shardpar.fl.he.numbers import (
    FixedBase,
    flaw_of_modulus,
    random_digits,
    random_prime,
    random_prime_with_factor,
    random_unit,
    require_size,
    short_exponent_bits,
)
from shardpar.fl.messages import Message

WINDOW_BITS = 8


class PublicKeyMessage(Message):
    """A public key on its way: n = p²q, g and the base h of the masks, little-endian."""

    n: bytes
    g: bytes
    h: bytes


@dataclass(frozen=True)
class PublicKey(AnyPublicKey):
    """A modulus n = p²q, g, and h = g^n; made by `generate` or `from_message`."""

    n: mpz
    g: mpz
    h: mpz

    def __reduce__(self) -> tuple[type[PublicKey], tuple[mpz, mpz, mpz]]:
        return PublicKey, (self.n, self.g, self.h)

    @property
    def modulus(self) -> mpz:  # type: ignore[override]
        """n."""
        return self.n

    @cached_property
    def most(self) -> int:  # type: ignore[override]
        """Surely below a third of the secret p, of which only the length is known."""
        return 1 << (prime_bits(int(self.n).bit_length()) - 3)

    def fields(self) -> tuple[int, ...]:
        """n, g and h."""
        return int(self.n), int(self.g), int(self.h)

    def unmasked(self, number: int) -> mpz:
        """g^number."""
        power = self._powers_of_g(abs(number))
        return invert(power, self.n) if number < 0 else power

    def masks(self, count: int) -> list[mpz]:
        """That many fresh encryptions of 0."""
        powers = self._powers_of_h
        digits = random_digits(count, powers.places, powers.window_bits)
        return [powers.of_digits(each) for each in digits]

    @cached_property
    def _powers_of_g(self) -> FixedBase:
        return FixedBase(self.g, self.n, self.most.bit_length(), WINDOW_BITS)

    @cached_property
    def _powers_of_h(self) -> FixedBase:
        bits = short_exponent_bits(int(self.n).bit_length())
        return FixedBase(self.h, self.n, bits, WINDOW_BITS)

    def to_message(self) -> PublicKeyMessage:
        """The key as it is sent."""
        width = self.width_bytes
        return PublicKeyMessage(*(mpz(x).to_bytes(width, "little") for x in self.fields()))

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
          PartyError: it is too small or too large, or visibly not p²q, or g or h cannot be.
        """
        n, g, h = (mpz.from_bytes(x, "little") for x in (message.n, message.g, message.h))
        flaw = flaw_of_modulus(n, unsafe_small_key_for_tests=unsafe_small_key_for_tests)
        if flaw is None and not all(1 < x < n - 1 and gcd(x, n) == 1 for x in (g, h)):
            flaw = "its bases are no units"
        if flaw is None and powmod(g, n, n) != h:
            flaw = "h is not g^n"
        if flaw is not None:
            raise PartyError(f"{party} sent an unsound Okamoto-Uchiyama key: {flaw}", party=party)
        return cls(n, g, h)


@dataclass(frozen=True)
class SecretKey:
    """The factors of a modulus; made by `generate`. Never sent, never logged."""

    public: PublicKey
    p: mpz = field(repr=False)
    t: mpz = field(repr=False)

    def __reduce__(self) -> tuple[type[SecretKey], tuple[PublicKey, mpz, mpz]]:
        return SecretKey, (self.public, self.p, self.t)

    def encrypt(self, numbers: list[int]) -> Ciphertexts:
        """As the public key does."""
        return self.public.encrypt(numbers)

    def decrypt(self, ciphertexts: Ciphertexts, *, trusted: bool = False) -> list[int]:
        """The numbers in ciphertexts under this key.

        Args:
          ciphertexts: under this key.
          trusted: the caller vouches that whoever computed them follows the protocol, or never
            learns anything that depends on the answer. One answer to a party that cheats gives it
            the key, and nothing here can tell.

        Raises:
          ValueError: nobody vouched for them, or they are under another key.
          OverflowError: a sum overflowed.
        """
        if not trusted:
            raise ValueError(
                "the answer to an Okamoto-Uchiyama ciphertext of their own making gives a party "
                "the secret key: pass trusted=True where those who computed it follow the "
                "protocol, and use shardpar.fl.he.paillier where they may not"
            )
        if ciphertexts.key != self.public:
            raise ValueError("these ciphertexts are under another key")
        p, t = self.p, self.t
        p2, scale = self._scale
        return [
            signed(divexact(powmod(c, t, p2) - 1, p) * scale % p, p) for c in ciphertexts.values
        ]

    @cached_property
    def _scale(self) -> tuple[mpz, mpz]:
        p, p2 = self.p, self.p * self.p
        return p2, invert(divexact(powmod(self.public.g, self.t, p2) - 1, p), p)


def generate(bits: int = 2048, *, unsafe_small_key_for_tests: bool = False) -> SecretKey:
    """A new key.

    Args:
      bits: of the modulus: 2048, or 3072 for what must stay secret beyond 2030.
      unsafe_small_key_for_tests: allows sizes that are broken in minutes.

    Raises:
      ValueError: a size that is not made.

    >>> secret = generate(768, unsafe_small_key_for_tests=True)
    >>> held = secret.public.encrypt([3, -4]) + [10, 10]
    >>> secret.decrypt(held.dot([2, 5]).rerandomised(), trusted=True)
    [56]
    """
    require_size(bits, unsafe_small_key_for_tests)
    p_bits = prime_bits(bits)
    t, n = random_prime(min(256, p_bits // 2)), mpz(0)
    while int(n).bit_length() != bits:
        p = random_prime_with_factor(p_bits, t)
        p2 = p * p
        n = p2 * random_prime(bits - 2 * p_bits)
    while True:
        base = random_unit(n)
        # Of order t * p modulo p²: the u-th power for p - 1 = t * u.
        g = powmod(base, (p - 1) // t, n)
        # A base that is 1 modulo p would show p as gcd(g - 1, n).
        if powmod(g, t, p2) != 1 and g % p != 1:
            break
    return SecretKey(PublicKey(n, g, powmod(g, n, n)), p, t)


def prime_bits(bits: int) -> int:
    """How long p is for a modulus p²q of so many bits."""
    return bits // 3 + 1
