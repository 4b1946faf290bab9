"""Third powers of shared numbers: (a + b)³ where the guest has a and the host has b.

The guest sends a and a² encrypted; the host forms a² · 3b + a · 3b² under a mask, and each adds its
own cube. One round, after the same paper as `products`. Revealed: how many numbers there are.
"""

from __future__ import annotations

import numpy as np

from shardpar.fl.he.ciphertexts import Ciphertexts
from shardpar.fl.he.powers import product_of_powers
from shardpar.fl.vertical.link import Link
from shardpar.fl.vertical.products import masked, offer, unmasked
from shardpar.fl.vertical.ring import MODULUS, RING_BITS

_BITS = 2 * RING_BITS + 1


def cubes(link: Link, share: np.ndarray, mask_bits: int) -> np.ndarray:
    """Shares of the cubes, modulo 2^128, of shared numbers."""
    count = len(share)
    if link.is_guest:
        offer(link, "cubes", np.concatenate([share, share * share % MODULUS]))
        mixed = unmasked(link, "cubes", count, _BITS, mask_bits)
    else:
        held = link.receive_ciphertexts("cubes/share", link.key, 2 * count)
        ones, twos = 3 * share * share % MODULUS, 3 * share % MODULUS
        sums = [
            product_of_powers([a, square], [one, two], link.key.modulus)
            for a, square, one, two in zip(
                held.values[:count], held.values[count:], ones.tolist(), twos.tolist(), strict=True
            )
        ]
        mixed = masked(link, "cubes", Ciphertexts(link.key, sums), _BITS, mask_bits)
    return (mixed + share * share % MODULUS * share) % MODULUS
