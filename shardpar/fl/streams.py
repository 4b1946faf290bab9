"""Where secret randomness comes from: AES-256-CTR keystreams, keyed by HKDF or by the system.

A keystream between two parties is keyed by HKDF-SHA256 (RFC 5869) over their X25519 secret
(RFC 7748), bound to the job, the round, the pair and the purpose, and can be read once: two values
hidden by one stream would give away their difference. AES in counter mode is NIST SP 800-38A.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shardpar.errors import PartyError, RunError

KEY_BYTES = 32
# Words of a vector that are worked on at once: with their keystream they stay in a core's cache.
_CHUNK_WORDS = 1 << 15
_BLOCK_BYTES = 16


def joined(*parts: str | bytes | int) -> bytes:
    """Parts as one byte string from which they could be told apart again.

    >>> joined("ab", "c") == joined("a", "bc")
    False
    """
    raw = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return b"".join(len(part).to_bytes(8, "big") + part for part in raw)


def shared_secret(private: X25519PrivateKey, public: bytes, *, party: str) -> bytes:
    """The X25519 secret with another party, 32 bytes; a key is derived from it, it is not one.

    Args:
      private: this party's.
      public: the other's, 32 bytes.
      party: the other.

    Raises:
      PartyError: the public key is a point of low order, which would make the secret known to all.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise PartyError(
            f"{party} sent an X25519 key that no secret can be agreed on with: {error}",
            party=party,
        ) from None


def derived_key(
    secret: bytes, *, job: str, round_: str, first: str, second: str, purpose: str
) -> bytes:
    """The 256-bit key that two parties use for one purpose in one round.

    Args:
      secret: what only they know, such as `shared_secret`.
      job: names the federation.
      round_: names the round, its attempt and all else that both must agree on.
      first: the sender; of a key that both use alike, the one who is first in the agreed order.
      second: the receiver, or the other one.
      purpose: what the key is for.

    >>> names = dict(job="j", first="a", second="b", purpose="mask")
    >>> derived_key(bytes(32), round_="1", **names) == derived_key(bytes(32), round_="2", **names)
    False
    """
    info = joined("shardpar.fl", job, round_, first, second, purpose)
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


class KeyStream:
    """An AES-256-CTR keystream of 32-bit words that can be read once.

    >>> stream = KeyStream(bytes(32))
    >>> stream.words(2).tolist()
    [2025887196, 2307473570]
    >>> stream.words(2)
    Traceback (most recent call last):
    ...
    shardpar.errors.RunError: this keystream has been read; ...
    """

    def __init__(self, key: bytes) -> None:
        """A stream under a key of 32 bytes that nothing else uses."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key of {len(key)} bytes; AES-256 takes {KEY_BYTES}")
        self._key: bytes | None = key

    def _open(self) -> CipherContext:
        if self._key is None:
            raise RunError(
                "this keystream has been read; a second value hidden by it would reveal the "
                "difference of both. Derive a key for another round or purpose"
            )
        key, self._key = self._key, None
        # The key is for this stream alone, so the counter may start at 0.
        return _encryptor(key)

    def words(self, count: int) -> np.ndarray:
        """The first `count` words, uint32.

        Raises:
          RunError: the stream has been read.
        """
        total = np.zeros(count, np.uint32)
        add_streams(total, [self], [])
        return total


def add_streams(total: np.ndarray, plus: Sequence[KeyStream], minus: Sequence[KeyStream]) -> None:
    """Adds keystreams to a vector modulo 2^32, or subtracts them, in place.

    Memory beside the vector is a few hundred KiB however many streams there are.

    Args:
      total: uint32 [words].
      plus: streams to add.
      minus: streams to subtract.

    Raises:
      RunError: one of the streams has been read.
    """
    if total.dtype != np.uint32 or total.ndim != 1:
        raise ValueError(f"masks are for flat uint32 vectors, not {total.dtype} {total.shape}")
    adding, taking = [s._open() for s in plus], [s._open() for s in minus]
    chunk = min(_CHUNK_WORDS, max(total.size, 1))
    zeros = memoryview(bytes(chunk * 4))
    buffer = bytearray(chunk * 4 + _BLOCK_BYTES)
    words = np.frombuffer(buffer, "<u4", count=chunk)
    for start in range(0, total.size, chunk):
        part = total[start : start + chunk]
        source, mask = zeros[: part.size * 4], words[: part.size]
        for stream in adding:
            stream.update_into(source, buffer)
            np.add(part, mask, out=part)
        for stream in taking:
            stream.update_into(source, buffer)
            np.subtract(part, mask, out=part)


class Randomness:
    """Secure random words in bulk: an AES-256-CTR keystream that goes on, and never repeats.

    Its key comes from the operating system unless one is given, which only tests do.

    >>> Randomness().words(3).dtype
    dtype('uint64')
    """

    def __init__(self, key: bytes | None = None) -> None:
        """A stream of its own."""
        self._stream = _encryptor(os.urandom(KEY_BYTES) if key is None else key)

    def words(self, count: int) -> np.ndarray:
        """The next `count` words, uint64, each uniform and independent."""
        buffer = bytearray(count * 8 + _BLOCK_BYTES)
        self._stream.update_into(bytes(count * 8), buffer)
        return np.frombuffer(buffer, "<u8", count=count)

    def below(self, bound: int, count: int) -> np.ndarray:
        """Integers in [0, bound), uint64 [count], exactly uniform; `bound` is at most 2^63."""
        if not 0 < bound <= 1 << 63:
            raise ValueError(f"bound {bound} is not in 1..2^63")
        words = self.words(count)
        if bound & (bound - 1) == 0:
            return words & np.uint64(bound - 1)
        # Words from the last, incomplete run of residues would favour small ones.
        limit = np.uint64((1 << 64) - (1 << 64) % bound)
        while (over := np.flatnonzero(words >= limit)).size:
            words = words.copy()
            words[over] = self.words(over.size)
        return words % np.uint64(bound)


def _encryptor(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK_BYTES))).encryptor()
