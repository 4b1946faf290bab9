"""The guest of boosted trees: has labels, the key, and decides every split.

After Fu et al., VF²Boost (SIGMOD'21). Derivatives are encrypted and sent in batches while the host
adds up earlier ones. While the host sums a node's rows, the guest has split that node by its own
columns already, so that the host goes on with its children; when the host's sums turn out to allow
a better split, the guest takes its own back and all that hung on it. The host sums the child with
fewer rows, and the guest subtracts from the parent's sums in the clear. Trees do not depend on
any of that.

Learns: how many columns the host has and, for each node, the sums of derivatives on the left of
each of the host's splits, in an order that changes from tree to tree, whether both sides have
enough rows, and how rows go at the splits it chooses; not of which column, nor at which number. A
guest that puts marks into derivatives could tell rows of a bin apart (reverse sum, Weng et al.,
2020): it would break the protocol.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shardpar.errors import PartyError
from shardpar.fl.he.ciphertexts import Ciphertexts
from shardpar.fl.he.packing import Packing
from shardpar.fl.vertical.bins import Bins, histogram_of
from shardpar.fl.vertical.gains import Best, best_of, derivatives_of, leaf_of
from shardpar.fl.vertical.histograms import opened, pair_packing, pairs_of
from shardpar.fl.vertical.host import is_below, is_summed
from shardpar.fl.vertical.link import Link
from shardpar.fl.vertical.options import TreeOptions
from shardpar.fl.vertical.tree_messages import (
    Candidates,
    Command,
    Placement,
    SplitsOfHost,
    TreeBegins,
    bits_of,
    built_child,
    flags_of,
)
from shardpar.fl.vertical.trees import GuestSplit, HostSplit, Leaf, TreeOfGuest

_NONE = Best(-np.inf, ())
Sums = tuple[np.ndarray, np.ndarray]


@dataclass
class _Node:
    """A node of the tree that is growing.

    Attributes:
      rows: that reach it.
      total: of their derivatives.
      own: the guest's best split.
      attempts: how often it has been split.
      left: what the host's splits have on their left; None until known.
      allowed: whether each of them has enough rows on both sides.
      guessed: whether it is split by `own` without knowing of the host's.
    """

    rows: np.ndarray
    total: tuple[int, int]
    own: Best
    attempts: int = 0
    left: Sums | None = None
    allowed: np.ndarray | None = None
    guessed: bool = False


@dataclass
class _Tree:
    number: int
    first: np.ndarray
    second: np.ndarray
    packing: Packing
    nodes: dict[int, _Node] = field(default_factory=dict)
    grown: dict[int, GuestSplit | HostSplit | Leaf] = field(default_factory=dict)
    awaited: dict[int, int] = field(default_factory=dict)
    """The parent whose children's sums are to come, and its attempt; 0 for the root's."""


class GuestOfTrees:
    """Grows trees with the host.

    Attributes:
      taken_back: how many splits were guessed wrong.
      guesses: how many were guessed.
      splits_of_host_taken: how many splits are the host's.
    """

    def __init__(self, link: Link, options: TreeOptions, bins: Bins, binned: np.ndarray) -> None:
        self._link, self._options, self._bins, self._binned = link, options, bins, binned
        self.taken_back = self.guesses = self.splits_of_host_taken = self._trees = 0
        self._splits_of_host = self._told_splits()

    def _told_splits(self) -> int:
        count = self._link.receive("splits", SplitsOfHost).count
        if not 0 <= count <= 512 * self._link.peer_columns:
            raise PartyError(f"{self._link.peer} has {count} splits", party=self._link.peer)
        return count

    def end(self) -> None:
        """Tells the host that there are no more trees."""
        self._link.send("tree", TreeBegins(False, 1))

    def grow(self, scores: np.ndarray, labels: np.ndarray) -> tuple[TreeOfGuest, np.ndarray]:
        """Grows a tree.

        Args:
          scores: so far, float64 [rows].
          labels: float64 [rows].

        Returns:
          (the tree, what it adds to each score).

        Raises:
          PartyError: the host is gone, or breaks the protocol.
        """
        tree = self._begun(scores, labels)
        self._open(tree, 1, np.arange(len(labels)))
        tree.awaited[0] = 0
        self._guess(tree, 1)
        while tree.awaited:
            parent = self._take(tree)
            for node in (
                () if parent is None else [1] if not parent else [2 * parent, 2 * parent + 1]
            ):
                self._decide(tree, node)
        self._link.send("command", Command("end"))
        return TreeOfGuest(tree.grown), self._added(tree)

    def _begun(self, scores: np.ndarray, labels: np.ndarray) -> _Tree:
        link, options = self._link, self._options
        first, second = derivatives_of(scores, labels, options)
        largest = max(int(np.abs(first).max()), int(second.max()), 1)
        most = 1 << largest.bit_length()
        packing = pair_packing(link.secret.public, most, len(labels))
        link.send("tree", TreeBegins(True, most))
        numbers = pairs_of(packing, first, second)
        for batch in link.pool.encrypt_in_batches(link.secret, numbers, options.batch):
            link.send("derivatives", batch.to_message())
        self._trees += 1
        return _Tree(self._trees, first, second, packing)

    def _open(self, tree: _Tree, node: int, rows: np.ndarray) -> None:
        """Finds the guest's best split of a node."""
        first, second = tree.first[rows], tree.second[rows]
        total = int(first.sum()), int(second.sum())
        own = _NONE
        if self._may_split(node, len(rows)):
            bins, binned = self._bins, self._binned[rows]
            splits, width = bins.splits, bins.width
            gl, hl = (
                splits.left_of(bins, histogram_of(binned, width, each)) for each in (first, second)
            )
            count = splits.left_of(bins, bins.counts(binned))
            least = self._options.min_samples
            allowed = (count >= least) & (len(rows) - count >= least)
            own = best_of((gl, hl), total, allowed, self._options)
        tree.nodes[node] = _Node(rows, total, own)

    def _may_split(self, node: int, rows: int) -> bool:
        return (
            node.bit_length() <= self._options.max_depth and rows >= 2 * self._options.min_samples
        )

    def _guess(self, tree: _Tree, node: int) -> None:
        held = tree.nodes[node]
        if self._options.optimistic and held.own.at:
            self.guesses += 1
            held.guessed = True
            self._split_by_own(tree, node)

    def _split_by_own(self, tree: _Tree, node: int) -> None:
        held = tree.nodes[node]
        left = self._bins.splits.goes_left(self._bins, held.own.at[0], self._binned[held.rows])
        held.attempts += 1
        self._link.send("command", Command("split", node, held.attempts, bits_of(left)))
        self._place(tree, node, left)

    def _place(self, tree: _Tree, node: int, left: np.ndarray) -> None:
        """Opens a node's children, and expects the host's sums of them."""
        held = tree.nodes[node]
        self._open(tree, 2 * node, held.rows[left])
        self._open(tree, 2 * node + 1, held.rows[~left])
        if is_summed(self._options, node, left):
            tree.awaited[node] = held.attempts

    def _take(self, tree: _Tree) -> int | None:
        """Takes the host's next sums; the parent whose children they are of, None if outdated."""
        link, key, count = self._link, self._link.secret.public, self._splits_of_host
        message = link.receive("candidates", Candidates)
        parent = message.node // 2
        # Sums that nobody waited for may be left over from a training before, under another key.
        of_now = message.sums.key == key.fingerprint and message.tree == tree.number
        if not of_now or tree.awaited.get(parent) != message.attempt:
            return None
        del tree.awaited[parent]
        if message.node != self._summed(tree, parent):
            raise PartyError(f"{link.peer} sums node {message.node}", party=link.peer)
        held = tree.nodes[message.node]
        held.left = self._opened(tree, message)
        held.allowed = flags_of(message.allowed, count, link.peer)
        if parent:
            above, sibling = tree.nodes[parent].left, tree.nodes[message.node ^ 1]
            sibling.left = above[0] - held.left[0], above[1] - held.left[1]
            sibling.allowed = flags_of(message.sibling_allowed, count, link.peer)
        return parent

    def _summed(self, tree: _Tree, parent: int) -> int:
        if not parent:
            return 1
        left, both = (len(tree.nodes[node].rows) for node in (2 * parent, parent))
        return 2 * parent + built_child(left, both)

    def _opened(self, tree: _Tree, message: Candidates) -> Sums:
        link, count = self._link, self._splits_of_host
        held = Ciphertexts.from_message(
            link.secret.public,
            message.sums,
            count=tree.packing.count(2 * count),
            party=link.peer,
        )
        try:
            return opened(tree.packing, link.decrypt(held), count)
        except OverflowError as error:
            raise PartyError(f"{link.peer} sent sums too large: {error}", party=link.peer) from None

    def _decide(self, tree: _Tree, node: int) -> None:
        """Splits a node for good, or makes it a leaf; the host's sums of it are there."""
        held = tree.nodes[node]
        theirs = _NONE
        if self._may_split(node, len(held.rows)):
            theirs = best_of(held.left, held.total, held.allowed, self._options)
        if theirs.gain > held.own.gain:
            tree.grown[node] = self._split_by_host(tree, node, theirs)
        elif held.own.at:
            if not held.guessed:
                self._split_by_own(tree, node)
            tree.grown[node] = self._split_of(held.own.at[0])
        else:
            tree.grown[node] = Leaf(leaf_of(held.total, self._options))
            return
        for child in (2 * node, 2 * node + 1):
            if node in tree.awaited:
                self._guess(tree, child)
            else:
                tree.grown[child] = Leaf(leaf_of(tree.nodes[child].total, self._options))

    def _split_by_host(self, tree: _Tree, node: int, best: Best) -> HostSplit:
        link, held = self._link, tree.nodes[node]
        if held.guessed:
            self.taken_back += 1
            for other in [other for other in tree.nodes if is_below(other, node)]:
                del tree.nodes[other]
            tree.awaited.pop(node, None)
        held.attempts += 1
        link.send("command", Command("yours", node, held.attempts, best=best.at))
        answer = link.receive("placement", Placement)
        if (answer.node, answer.split) != (node, self.splits_of_host_taken):
            raise PartyError(
                f"{link.peer} makes split {answer.split} at node {answer.node}, not split "
                f"{self.splits_of_host_taken} at node {node}",
                party=link.peer,
            )
        self.splits_of_host_taken += 1
        self._place(tree, node, flags_of(answer.left, len(held.rows), link.peer))
        return HostSplit(answer.split)

    def _split_of(self, at: int) -> GuestSplit:
        splits = self._bins.splits
        column, last = int(splits.column[at]), int(splits.bin[at])
        edges = (*self._bins.edges[column], np.inf)
        return GuestSplit(column, float(edges[last]), bool(splits.missing_left[at]))

    def _added(self, tree: _Tree) -> np.ndarray:
        added = np.empty(len(tree.first))
        for node, grown in tree.grown.items():
            if isinstance(grown, Leaf):
                added[tree.nodes[node].rows] = grown.value
        return added
