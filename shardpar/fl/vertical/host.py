"""The host of boosted trees: has columns, no labels, and no key to what it adds up.

Learns: how many rows and columns the guest has, which rows reach each node and where the guest's
splits send them, how large derivatives are at most, and which of its own splits were chosen. With
`optimistic` also where the guest would have sent rows had the host's split not been better.
Commands that lie ahead are read between parts of its work, so that a node which the guest has taken
back is dropped at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from gmpy2 import mpz

from shardpar.errors import PartyError
from shardpar.fl.he.ciphertexts import Ciphertexts, CiphertextsMessage
from shardpar.fl.he.packing import Packing
from shardpar.fl.streams import Randomness
from shardpar.fl.vertical.bins import Bins
from shardpar.fl.vertical.histograms import EncryptedHistogram, pair_packing, stacked
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


@dataclass(frozen=True)
class _Task:
    """Rows of a node to be summed."""

    node: int
    attempt: int


@dataclass
class _Tree:
    """What the host knows of the tree that is growing."""

    number: int
    pairs: list[mpz]
    packing: Packing
    order: np.ndarray
    rows: dict[int, np.ndarray] = field(default_factory=dict)
    tasks: deque[_Task] = field(default_factory=deque)
    ended: bool = False


class HostOfTrees:
    """Adds up, splits by its own columns when told to, and remembers its splits.

    Attributes:
      chosen: the splits that the guest chose, as places in `bins.splits`.
      dropped: how many nodes were given up because the guest took them back.
    """

    def __init__(self, link: Link, options: TreeOptions, bins: Bins, binned: np.ndarray) -> None:
        self._link, self._options, self._bins, self._binned = link, options, bins, binned
        self._waiting: deque[Command] = deque()
        self.chosen: list[int] = []
        self.dropped = 0

    def grow(self) -> None:
        """Grows trees until the guest has enough.

        Raises:
          PartyError: the guest is gone, or breaks the protocol.
        """
        self._link.send("splits", SplitsOfHost(len(self._bins.splits)))
        for number in count(1):
            begins = self._link.receive("tree", TreeBegins)
            if not begins.more:
                return
            tree = self._begun(number, begins)
            while not tree.ended:
                self._follow(tree)
                if tree.tasks:
                    self._sum(tree, tree.tasks.popleft())

    def _begun(self, number: int, begins: TreeBegins) -> _Tree:
        """Takes derivatives as they come, and sums the root meanwhile."""
        link, rows, pool = self._link, self._link.rows, self._link.pool
        if not 0 < begins.most < 1 << 63:
            raise PartyError(f"{link.peer} has derivatives of {begins.most}", party=link.peer)
        try:
            packing = pair_packing(link.key, begins.most, rows)
        except OverflowError as error:
            raise PartyError(
                f"{link.peer} has large derivatives: {error}", party=link.peer
            ) from None
        # The guest is not to know which split of which column a candidate is.
        order = np.argsort(Randomness().words(len(self._bins.splits)), kind="stable")
        tree = _Tree(number, [], packing, order)
        tree.rows[1] = np.arange(rows)
        histogram = self._histogram()
        while len(tree.pairs) < rows:
            message = link.receive("derivatives", CiphertextsMessage)
            start = len(tree.pairs)
            if not 0 < message.count <= rows - start:
                raise PartyError(f"{link.peer} sent {message.count} derivatives", party=link.peer)
            held = Ciphertexts.from_message(link.key, message, party=link.peer)
            histogram.add(held.values, self._binned[start : start + len(held)], pool)
            tree.pairs += held.values
        self._answer(tree, _Task(1, 0), histogram)
        return tree

    def _follow(self, tree: _Tree) -> None:
        """Carries out the commands that are there; waits for one when there is nothing to sum."""
        self._read_ahead(wait=not tree.tasks)
        while self._waiting and not tree.ended:
            command = self._waiting.popleft()
            if command.action == "end":
                tree.ended = True
            elif command.action == "split":
                flags = flags_of(command.left, len(self._rows(tree, command)), self._link.peer)
                self._split(tree, command, flags)
            else:
                self._split_by_own(tree, command)

    def _read_ahead(self, *, wait: bool) -> None:
        if wait and not self._waiting:
            self._waiting.append(self._link.receive("command", Command))
        while (command := self._link.receive_if_there("command", Command)) is not None:
            self._waiting.append(command)

    def _rows(self, tree: _Tree, command: Command) -> np.ndarray:
        rows = tree.rows.get(command.node)
        if rows is None or command.node.bit_length() > self._options.max_depth:
            raise PartyError(
                f"{self._link.peer} splits node {command.node}, which there is none of",
                party=self._link.peer,
            )
        return rows

    def _split(self, tree: _Tree, command: Command, left: np.ndarray) -> None:
        node, rows = command.node, self._rows(tree, command)
        self._forget_below(tree, node)
        tree.rows[2 * node], tree.rows[2 * node + 1] = rows[left], rows[~left]
        if is_summed(self._options, node, left):
            tree.tasks.append(
                _Task(2 * node + built_child(int(left.sum()), len(left)), command.attempt)
            )

    def _split_by_own(self, tree: _Tree, command: Command) -> None:
        link, splits = self._link, self._bins.splits
        if not command.best or not all(0 <= at < len(splits) for at in command.best):
            raise PartyError(f"{link.peer} chose splits {command.best[:8]}", party=link.peer)
        at = int(min(tree.order[list(command.best)]))
        left = splits.goes_left(self._bins, at, self._binned[self._rows(tree, command)])
        link.send("placement", Placement(command.node, len(self.chosen), bits_of(left)))
        self.chosen.append(at)
        self._split(tree, command, left)

    def _forget_below(self, tree: _Tree, node: int) -> None:
        for other in [other for other in tree.rows if is_below(other, node)]:
            del tree.rows[other]
        kept = [task for task in tree.tasks if not is_below(task.node, node)]
        self.dropped += len(tree.tasks) - len(kept)
        tree.tasks = deque(kept)

    def _is_dead(self, task: _Task) -> bool:
        """Whether a command that has come meanwhile takes the task's node back."""
        self._read_ahead(wait=False)
        return any(
            command.action == "end" or is_below(task.node, command.node)
            for command in self._waiting
        )

    def _sum(self, tree: _Tree, task: _Task) -> None:
        rows, histogram = tree.rows[task.node], self._histogram()
        pairs = [tree.pairs[row] for row in rows.tolist()]
        if histogram.add(
            pairs, self._binned[rows], self._link.pool, go_on=lambda: not self._is_dead(task)
        ):
            self._answer(tree, task, histogram)
        else:
            self.dropped += 1

    def _answer(self, tree: _Tree, task: _Task, histogram: EncryptedHistogram) -> None:
        link = self._link
        sums = stacked(tree.packing, histogram.left_of(self._bins).take(tree.order))
        rows = tree.rows
        sibling = b"" if task.node == 1 else self._allowed(tree, rows[task.node ^ 1])
        allowed = self._allowed(tree, rows[task.node])
        message = link.pool.rerandomised(sums).to_message()
        link.send(
            "candidates",
            Candidates(tree.number, task.node, task.attempt, message, allowed, sibling),
        )

    def _allowed(self, tree: _Tree, rows: np.ndarray) -> bytes:
        left = self._bins.splits.left_of(self._bins, self._bins.counts(self._binned[rows]))
        least = self._options.min_samples
        return bits_of(((left >= least) & (len(rows) - left >= least))[tree.order])

    def _histogram(self) -> EncryptedHistogram:
        return EncryptedHistogram(self._link.key, self._binned.shape[1], self._bins.width)


def is_below(node: int, other: int) -> bool:
    """Whether a node is somewhere below another.

    >>> is_below(11, 2), is_below(2, 2), is_below(6, 2)
    (True, False, False)
    """
    levels = node.bit_length() - other.bit_length()
    return levels > 0 and node >> levels == other


def is_summed(options: TreeOptions, node: int, left: np.ndarray) -> bool:
    """Whether the children of a node that is split so may be split in turn."""
    larger = max(int(left.sum()), len(left) - int(left.sum()))
    return node.bit_length() < options.max_depth and larger >= 2 * options.min_samples
