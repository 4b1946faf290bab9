"""Which clients agree on masks with each other: everyone, or a random k-regular graph.

Bell, Bonawitz, Gascón, Lepoint and Raykova, "Secure single-server aggregation with
(poly)logarithmic overhead" (CCS 2020): a ring in random order where each client meets the k / 2
next to it on either side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from shardpar.fl.streams import joined


def neighbours_of(
    parties: Sequence[str], degree: int | None, seed: bytes
) -> dict[str, tuple[str, ...]]:
    """Each party's neighbours, in the order of `parties`.

    Args:
      parties: all of them, in an order that all agree on.
      degree: how many neighbours each has, rounded up to an even number; None for all others.
      seed: public, and the same for all; who sits beside whom follows from it.

    >>> neighbours_of(["a", "b", "c"], None, b"")["b"]
    ('a', 'c')
    >>> {len(near) for near in neighbours_of("abcdefgh", 3, b"seed").values()}
    {4}
    """
    if degree is None or degree + degree % 2 >= len(parties) - 1:
        return {p: tuple(other for other in parties if other != p) for p in parties}
    reach = (degree + 1) // 2
    ring = sorted(parties, key=lambda party: hashlib.sha256(joined(seed, party)).digest())
    order = {party: at for at, party in enumerate(parties)}
    found = {}
    for at, party in enumerate(ring):
        near = {ring[(at + step) % len(ring)] for step in range(-reach, reach + 1)} - {party}
        found[party] = tuple(sorted(near, key=order.__getitem__))
    return found
