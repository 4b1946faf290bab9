"""What guest and host say to each other while they grow trees. Nodes: 1, its children 2 and 3, …"""

from __future__ import annotations

from typing import Literal

import numpy as np

from shardpar.errors import PartyError
from shardpar.fl.he.ciphertexts import CiphertextsMessage
from shardpar.fl.messages import Message


class SplitsOfHost(Message):
    """From the host, once: how many splits its bins allow."""

    count: int


class TreeBegins(Message):
    """From the guest, before a tree's encrypted derivatives, or instead of one more tree.

    Attributes:
      more: whether a tree follows.
      most: larger than any derivative.
    """

    more: bool
    most: int


class Command(Message):
    """From the guest, about a node of the tree.

    Attributes:
      action: "split": the rows go as `left` says. "yours": the host splits by the first of its
        candidates `best`, answers with a `Placement` and forgets what it knew below. "end": of the
        tree.
      node: which.
      attempt: how often this node has been split, from 1.
      left: a bit for each of the node's rows.
      best: candidates, as the host numbered them for this tree.
    """

    action: Literal["split", "yours", "end"]
    node: int = 0
    attempt: int = 0
    left: bytes = b""
    best: tuple[int, ...] = ()


class Candidates(Message):
    """From the host: what each of its splits has on the left at a node, in an order only it knows.

    Attributes:
      tree: number of the tree, from 1.
      node: whose rows were summed; its sibling's are its parent's less these.
      attempt: at the parent.
      sums: first and second derivatives, several splits to a ciphertext.
      allowed: a bit for each split, whether both sides have enough rows.
      sibling_allowed: the same of the sibling.
    """

    tree: int
    node: int
    attempt: int
    sums: CiphertextsMessage
    allowed: bytes
    sibling_allowed: bytes


class Placement(Message):
    """From the host: how it split a node.

    Attributes:
      node: which.
      split: its number in the host's half of the model.
      left: a bit for each of the node's rows.
    """

    node: int
    split: int
    left: bytes


def bits_of(flags: np.ndarray) -> bytes:
    """Truth values, eight to a byte."""
    return np.packbits(flags.astype(bool), bitorder="little").tobytes()


def flags_of(data: bytes, count: int, party: str) -> np.ndarray:
    """So many truth values.

    Raises:
      PartyError: there are more or fewer.
    """
    if len(data) != -(-count // 8):
        raise PartyError(f"{party} sent {len(data)} bytes for {count} bits", party=party)
    return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[:count].astype(bool)


def built_child(left: int, rows: int) -> int:
    """Which child's rows the host sums, the one with fewer: 0 for the left, 1 for the right.

    Args:
      left: rows that go left.
      rows: of the node.
    """
    return int(2 * left > rows)
