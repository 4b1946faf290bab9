"""Ids behind a secret scalar: hashed to the curve, multiplied by X25519, on all cores.

What others send is multiplied only if each point is canonical, comes once and is of no low order;
points on the curve's twist give nothing away under X25519 (Bernstein, PKC'06).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from shardpar.errors import PartyError
from shardpar.fl.hash_to_curve import POINT_BYTES, PRIME, encode_to_curve
from shardpar.fl.he.pool import Pool, batches
from shardpar.fl.psi_messages import TAG_BYTES, WINDOW_IDS
from shardpar.fl.streams import Randomness

# What one process does at a time: about 0.1 s.
_JOB_IDS = 1 << 11
_PRIME_BYTES = np.frombuffer(int(PRIME).to_bytes(POINT_BYTES, "little"), np.uint8)

_BlindJob = tuple[bytes, bytes, list[bytes]]
_MultiplyJob = tuple[bytes, bytes]


def fresh_scalar() -> bytes:
    """A secret scalar from the operating system's generator, 32 bytes."""
    return X25519PrivateKey.generate().private_bytes_raw()


@dataclass(frozen=True)
class Blinding:
    """A secret scalar, of one run; never sent, never used in another.

    Attributes:
      dst: under which ids are hashed.
      pool: of processes that multiply.
    """

    dst: bytes
    pool: Pool
    _scalar: bytes = field(repr=False, default_factory=fresh_scalar)

    def blinded(self, ids: Iterable[bytes]) -> Iterator[bytes]:
        """Points of ids behind the scalar, a message's worth at a time, in order."""
        jobs = ((self._scalar, self.dst, part) for part in batches(ids, _JOB_IDS))
        for parts in batches(self.pool.mapped(_blind, jobs), WINDOW_IDS // _JOB_IDS):
            yield b"".join(parts)

    def multiplied(self, points: bytes, *, party: str) -> bytes:
        """Another party's points behind this scalar too, in order.

        Raises:
          PartyError: a point is of low order, so that its product would say nothing of the id.
        """
        size = _JOB_IDS * POINT_BYTES
        parts = (points[at : at + size] for at in range(0, len(points), size))
        products = list(self.pool.mapped(_multiply, ((self._scalar, part) for part in parts)))
        if None in products:
            raise PartyError(f"{party} sent a point of low order in place of an id", party=party)
        return b"".join(part for part in products if part is not None)


def checked_points(points: bytes, count: int, *, party: str) -> bytes:
    """A message's points, once it has been found that they are what the protocol allows.

    Raises:
      PartyError: they are of another number than is due, or one is not canonical: 2^255 - 19 or
        above.
    """
    if len(points) != count * POINT_BYTES:
        raise PartyError(
            f"{party} sent {len(points)} bytes for {count} points of {POINT_BYTES}", party=party
        )
    table = np.frombuffer(points, np.uint8).reshape(count, POINT_BYTES)
    above = (table[:, 0] >= _PRIME_BYTES[0]) & (table[:, 1:] == _PRIME_BYTES[1:]).all(axis=1)
    if (above | (table[:, -1] > _PRIME_BYTES[-1])).any():
        raise PartyError(f"{party} sent a point that is not canonical", party=party)
    return points


def tags_of(points: bytes) -> bytes:
    """The first 16 bytes of each point: two of 2^32 are equal by chance once in 2^64 runs."""
    table = np.frombuffer(points, np.uint8).reshape(-1, POINT_BYTES)
    return table[:, :TAG_BYTES].tobytes()


def rows_of(data: bytes, width_bytes: int) -> np.ndarray:
    """Values of so many bytes as an array that sorts and compares, in order of their bytes."""
    return np.frombuffer(data, np.dtype((np.void, width_bytes)))


def check_distinct(values: np.ndarray, *, party: str) -> None:
    """Checks that a party counted no id twice.

    Raises:
      PartyError: it did.
    """
    if np.unique(values).size != values.size:
        raise PartyError(f"{party} sent an id more than once", party=party)


def secret_order(count: int) -> np.ndarray:
    """A permutation that nobody can guess, uniform, int64 [count].

    >>> sorted(secret_order(4).tolist())
    [0, 1, 2, 3]
    """
    random = Randomness()
    while True:
        keys = random.words(count)
        order = np.argsort(keys)
        drawn = keys[order]
        # Between equal keys the sort would choose, not chance.
        if not (drawn[1:] == drawn[:-1]).any():
            return order


def _blind(job: _BlindJob) -> bytes:
    scalar, dst, ids = job
    exchange = X25519PrivateKey.from_private_bytes(scalar).exchange
    read = X25519PublicKey.from_public_bytes
    return b"".join([exchange(read(point)) for point in encode_to_curve(ids, dst)])


def _multiply(job: _MultiplyJob) -> bytes | None:
    scalar, points = job
    exchange = X25519PrivateKey.from_private_bytes(scalar).exchange
    read = X25519PublicKey.from_public_bytes
    size = POINT_BYTES
    try:
        return b"".join(
            [exchange(read(points[at : at + size])) for at in range(0, len(points), size)]
        )
    except ValueError:
        # X25519 refuses the product that all low-order points have: 0.
        return None
