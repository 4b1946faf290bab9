"""CKKS: sums and products of vectors of real numbers, approximately, that only the owner reads.

Cheon, Kim, Kim and Song, "Homomorphic encryption for arithmetic of approximate numbers", 2017, by
TenSEAL over Microsoft SEAL; needs the extra `ckks`. A decrypted number tells of its noise: who
makes ciphertexts and learns exact answers finds the key (Li and Micciancio, "On the security of
homomorphic encryption on approximate numbers", 2021), so `decrypt` asks the caller to vouch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardpar.errors import ConfigError, PartyError
from shardpar.fl.messages import Message

try:
    import tenseal
    import tenseal.sealapi  # registers the types that a context is inspected by
except ModuleNotFoundError as error:
    if error.name != "tenseal":
        raise
    raise ConfigError(
        "CKKS is computed by tenseal, which is not installed; run: pip install 'shardpar[ckks]'"
    ) from None

_END_BITS = 60
_MOST_BITS = {8192: 218, 16384: 438}
"""Bits of all moduli at 128-bit security, by degree (Albrecht et al., HE standard, 2018)."""
_MOST_CHUNKS = 4096


@dataclass(frozen=True)
class CKKSOptions:
    """What the owner of a key decides.

    Attributes:
      depth: products one after the other that an encrypted vector can go through, 1 to 7.
      scale_bits: of the fraction: the error of a number is about 2^(20 - scale_bits) times the
        largest of the vector, and more after products.
      sums: whether others may add up a vector's numbers; keys for that are tens of megabytes.

    >>> CKKSOptions().degree, CKKSOptions().slots
    (8192, 4096)
    """

    depth: int = 2
    scale_bits: int = 40
    sums: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= 7 or not 30 <= self.scale_bits <= 50:
            raise ConfigError(
                f"CKKS of depth {self.depth} with scale_bits {self.scale_bits}; depth is 1 to 7 "
                "and scale_bits 30 to 50"
            )
        if sum(self.moduli) > max(_MOST_BITS.values()):
            raise ConfigError(
                f"depth {self.depth} with scale_bits {self.scale_bits} needs {sum(self.moduli)} "
                "bits of moduli, and 438 are secure; lower one of them"
            )

    @property
    def moduli(self) -> list[int]:
        """Bits of each modulus."""
        return [_END_BITS, *[self.scale_bits] * self.depth, _END_BITS]

    @property
    def degree(self) -> int:
        """Of the polynomials: the least that is as hard as 128 bits."""
        return min(n for n, most in _MOST_BITS.items() if sum(self.moduli) <= most)

    @property
    def slots(self) -> int:
        """Numbers in one ciphertext."""
        return self.degree // 2


class KeyOfCKKS(Message):
    """A public key on its way.

    Attributes:
      depth, scale_bits, sums: as in `CKKSOptions`.
      context: TenSEAL's, without the secret key.
    """

    depth: int
    scale_bits: int
    sums: bool
    context: bytes


class VectorOfCKKS(Message):
    """An encrypted vector on its way.

    Attributes:
      size: how many numbers.
      chunks: ciphertexts, of as many numbers as have room in one.
    """

    size: int
    chunks: tuple[bytes, ...]


@dataclass(frozen=True, eq=False)
class PublicKey:
    """With which everyone encrypts and computes."""

    options: CKKSOptions
    context: Any = field(repr=False)

    def encrypt(self, numbers: np.ndarray | Sequence[float]) -> Vector:
        """A vector float[n], n of at least 1.

        Raises:
          ValueError: it is no vector, empty, or not finite.
        """
        vector = np.asarray(numbers, np.float64)
        if vector.ndim != 1 or not len(vector) or not np.isfinite(vector).all():
            raise ValueError(f"{vector.shape} numbers; give a vector of finite ones, not empty")
        slots = self.options.slots
        chunks = [
            tenseal.ckks_vector(self.context, vector[i : i + slots].tolist())
            for i in range(0, len(vector), slots)
        ]
        return Vector(self, len(vector), chunks)

    def to_message(self) -> KeyOfCKKS:
        """The key as it is sent; the secret key is not in it."""
        options = self.options
        context = self.context.serialize(
            save_public_key=True,
            save_secret_key=False,
            save_galois_keys=options.sums,
            save_relin_keys=True,
        )
        return KeyOfCKKS(options.depth, options.scale_bits, options.sums, context)

    @classmethod
    def from_message(cls, message: KeyOfCKKS, *, party: str = "a party") -> PublicKey:
        """The key in a message.

        Raises:
          PartyError: it is none, or of other parameters than it says.
        """
        try:
            options = CKKSOptions(message.depth, message.scale_bits, message.sums)
            context = tenseal.context_from(message.context)
            parms = context.seal_context().data.key_context_data().parms()
            moduli = [modulus.bit_count() for modulus in parms.coeff_modulus()]
            # SEAL may have made a modulus a bit shorter than asked for, and never longer.
            is_as_said = parms.poly_modulus_degree() == options.degree and len(moduli) == len(
                options.moduli
            )
            is_as_said &= all(0 <= a - b <= 1 for a, b in zip(options.moduli, moduli, strict=False))
            is_as_said &= context.global_scale == 2**options.scale_bits
            is_as_said &= context.has_public_key() and context.has_relin_keys()
            is_as_said &= not message.sums or context.has_galois_keys()
        except (ConfigError, ValueError, RuntimeError, TypeError, IndexError) as error:
            raise PartyError(f"{party} sent no CKKS key: {error}", party=party) from None
        if not is_as_said or context.has_secret_key():
            raise PartyError(
                f"{party} sent a CKKS key of other parameters than it says", party=party
            )
        return cls(options, context)


@dataclass(frozen=True, eq=False)
class SecretKey:
    """Which decrypts; made by `generate`. Never sent, never logged."""

    public: PublicKey
    context: Any = field(repr=False)

    def decrypt(self, vector: Vector, *, trusted: bool = False) -> np.ndarray:
        """The numbers of a vector, float64 [n].

        Args:
          vector: under this key.
          trusted: the caller vouches that the exact answer never goes to whoever had a hand in
            the ciphertext; round it, or add noise, before it leaves.

        Raises:
          ValueError: nobody vouched, or it is under another key.
        """
        if not trusted:
            raise ValueError(
                "who made a CKKS ciphertext and learns the exact answer finds the secret key: pass "
                "trusted=True where the answer stays here, or leaves with noise"
            )
        if vector.key is not self.public:
            raise ValueError("this vector is under another key; read it with that key's owner")
        secret = self.context.secret_key()
        parts = [np.array(chunk.decrypt(secret), np.float64) for chunk in vector.chunks]
        return np.concatenate(parts)


def generate(options: CKKSOptions = CKKSOptions()) -> SecretKey:
    """A new key.

    >>> import numpy as np
    >>> secret = generate()
    >>> held = secret.public.encrypt([0.5, -2.0]) * [4.0, 1.5] + [1.0, 1.0]
    >>> np.round(secret.decrypt(held, trusted=True), 3).tolist()
    [3.0, -2.0]
    """
    secret = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, options.degree, coeff_mod_bit_sizes=options.moduli
    )
    secret.global_scale = 2**options.scale_bits
    if options.sums:
        secret.generate_galois_keys()
    public = secret.copy()
    public.make_context_public()
    return SecretKey(PublicKey(options, public), secret)


@dataclass(frozen=True, eq=False)
class Vector:
    """An encrypted vector of `size` numbers; it never changes, computing makes a new one."""

    key: PublicKey
    size: int
    chunks: Sequence[Any] = field(repr=False)

    def __add__(self, other: Vector | np.ndarray | Sequence[float]) -> Vector:
        """With another vector under the same key, or with numbers that are known.

        Raises:
          ValueError: of another size or key, or not finite.
        """
        return self._with(other, lambda a, b: a + b)

    def __mul__(self, other: Vector | np.ndarray | Sequence[float]) -> Vector:
        """Number by number; costs one of the key's depth.

        Raises:
          ValueError: of another size or key, not finite, or the depth is used up.
        """
        return self._with(other, lambda a, b: a * b)

    def sum(self) -> Vector:
        """The sum of the numbers, as a vector of one.

        Raises:
          ValueError: the key is not made for sums.
        """
        if not self.key.options.sums:
            raise ValueError("this key cannot add up a vector: generate it with sums=True")
        parts = [chunk.sum() for chunk in self.chunks]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return Vector(self.key, 1, [total])

    def dot(self, other: Vector | np.ndarray | Sequence[float]) -> Vector:
        """The sum of the products, as a vector of one.

        Raises:
          ValueError: as for products and sums.
        """
        return (self * other).sum()

    def to_message(self) -> VectorOfCKKS:
        """The vector as it is sent."""
        return VectorOfCKKS(self.size, tuple(chunk.serialize() for chunk in self.chunks))

    @classmethod
    def from_message(
        cls, message: VectorOfCKKS, key: PublicKey, *, party: str = "a party"
    ) -> Vector:
        """The vector in a message.

        Raises:
          PartyError: it is none under this key, or of another size than it says.
        """
        slots = key.options.slots
        count = -(-message.size // slots)
        if not 0 < count <= _MOST_CHUNKS or count != len(message.chunks):
            raise PartyError(
                f"{party} sent {len(message.chunks)} ciphertexts for {message.size} numbers",
                party=party,
            )
        # Two polynomials of eight bytes for each modulus but the last, and a little around them.
        most = 2 * 8 * key.options.degree * (len(key.options.moduli) - 1) + 4096
        chunks = []
        for number, data in enumerate(message.chunks):
            size = min(slots, message.size - number * slots)
            try:
                if len(data) > most:
                    raise ValueError(f"{len(data)} bytes where {most} have room for it")
                chunk = tenseal.ckks_vector_from(key.context, data)
                if chunk.size() != size:
                    raise ValueError(f"{chunk.size()} numbers where {size} are due")
            except (ValueError, RuntimeError, TypeError, IndexError) as error:
                raise PartyError(f"{party} sent no CKKS ciphertext: {error}", party=party) from None
            chunks.append(chunk)
        return cls(key, message.size, chunks)

    def _with(self, other: Any, combine: Any) -> Vector:
        if isinstance(other, Vector):
            if other.key is not self.key:
                raise ValueError("these vectors are under different keys")
            if other.size != self.size:
                raise ValueError(f"vectors of {self.size} and {other.size} numbers")
            others: Sequence[Any] = other.chunks
        else:
            known = np.asarray(other, np.float64)
            if known.shape != (self.size,) or not np.isfinite(known).all():
                raise ValueError(
                    f"numbers of shape {known.shape} beside a vector of {self.size}; give as many "
                    "finite ones"
                )
            slots = self.key.options.slots
            others = [known[i : i + slots].tolist() for i in range(0, self.size, slots)]
        try:
            made = [combine(a, b) for a, b in zip(self.chunks, others, strict=True)]
        except ValueError as error:
            depth = self.key.options.depth
            raise ValueError(
                f"CKKS cannot compute this: {error}; products one after the other may be {depth}, "
                "as this key was generated"
            ) from None
        return Vector(self.key, self.size, made)
