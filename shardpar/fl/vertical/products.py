"""Products of one party's matrix and the other's shares: encrypted in between, shared afterwards.

The owner of a share sends it under its own key; the owner of the matrix multiplies, adds a mask
that is `mask_bits` longer than any product, and sends the sums back, several to a ciphertext. The
first decrypts the product plus the mask, the second keeps minus the mask: shares modulo 2^128 of a
product that neither has seen. After Chen et al., "When homomorphic encryption marries secret
sharing" (KDD'21).

Revealed: the matrix' shape. A masked product is within 2^-mask_bits of uniform, for each number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardpar.errors import PartyError
from shardpar.fl.he.ciphertexts import Ciphertexts, PublicKey
from shardpar.fl.he.packing import Packing
from shardpar.fl.he.tabled import tabled_matmul
from shardpar.fl.messages import Message
from shardpar.fl.vertical.link import Link
from shardpar.fl.vertical.ring import MODULUS, RING_BITS, masks, shares_of


class Opened(Message):
    """A share of a number that both may know, 16 bytes."""

    share: bytes


NUMBER_BITS = 15
"""Of the numbers in a matrix, beside their sign."""


def offer(link: Link, topic: str, share: np.ndarray) -> None:
    """Sends this party's share, encrypted, for the other to multiply by its matrix."""
    link.send_encrypted(f"{topic}/share", share.tolist())


def answer(link: Link, topic: str, matrix: np.ndarray, mask_bits: int) -> np.ndarray:
    """Multiplies what the other offered by this party's matrix.

    Args:
      link: to the other.
      topic: under which it offers.
      matrix: integers up to 2^15, [length of the share, columns].
      mask_bits: as agreed.

    Returns:
      This party's shares of share @ matrix, [columns].
    """
    terms = len(matrix)
    held = link.receive_ciphertexts(f"{topic}/share", link.key, terms)
    summed = tabled_matmul(held, matrix, link.pool)
    bits = _product_bits(terms)
    return masked(link, topic, summed, bits, mask_bits)


def masked(link: Link, topic: str, numbers: Ciphertexts, bits: int, mask_bits: int) -> np.ndarray:
    """Sends numbers of at most so many bits back to the key's owner, under masks.

    Returns:
      This party's shares of them.
    """
    packing = _packing(numbers.key, bits, mask_bits)
    hiding = masks(len(numbers), bits + mask_bits)
    sums = packing.pack_ciphertexts(numbers) + packing.pack(hiding)
    link.send(f"{topic}/product", link.pool.rerandomised(sums).to_message())
    return shares_of(-mask for mask in hiding)


def collect(link: Link, topic: str, terms: int, count: int, mask_bits: int) -> np.ndarray:
    """Shares, this party's, of `count` products of what it offered, `terms` numbers.

    Raises:
      PartyError: the other sent something else.
    """
    return unmasked(link, topic, count, _product_bits(terms), mask_bits)


def unmasked(link: Link, topic: str, count: int, bits: int, mask_bits: int) -> np.ndarray:
    """Shares, this party's, of `count` numbers of so many bits that the other sent by `masked`."""
    packing = _packing(link.secret.public, bits, mask_bits)
    held = link.receive_ciphertexts(f"{topic}/product", link.secret.public, packing.count(count))
    try:
        return shares_of(packing.unpack(link.decrypt(held), count))
    except OverflowError as error:
        raise PartyError(
            f"{link.peer} sent products that are not of this protocol: {error}", party=link.peer
        ) from None


def squared_norm(link: Link, share: np.ndarray, mask_bits: int) -> int:
    """The squared L2 norm of shared integers, told to both parties.

    Args:
      link: to the other.
      share: this party's, in an order that both agree on.
      mask_bits: as agreed.
    """
    bits = 2 * RING_BITS + len(share).bit_length()
    if link.is_guest:
        offer(link, "norm", share)
        cross = unmasked(link, "norm", 1, bits, mask_bits)
    else:
        held = link.receive_ciphertexts("norm/share", link.key, len(share))
        cross = masked(link, "norm", held.dot(share.tolist()), bits, mask_bits)
    own: Any = sum(number * number for number in share.tolist())
    mine = (own + 2 * cross[0]) % MODULUS
    link.send("norm/opened", Opened(mine.to_bytes(RING_BITS // 8, "little")))
    theirs = link.receive("norm/opened", Opened)
    return (mine + int.from_bytes(theirs.share, "little")) % MODULUS


def _product_bits(terms: int) -> int:
    return RING_BITS + NUMBER_BITS + terms.bit_length()


def _packing(key: PublicKey, bits: int, mask_bits: int) -> Packing:
    return Packing.of(key, most=1 << (bits + mask_bits + 1))
