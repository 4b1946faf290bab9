"""A party's half of vertical boosted trees: trained, kept in a file, and asked for predictions.

To predict, the host says of every row how it goes at each split that it has in the model, and the
guest walks the trees. So the guest learns those answers, also of splits that a row does not reach;
the host learns only which rows were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from scipy.special import expit

from shardpar.errors import DataError
from shardpar.fl.channel import Channel
from shardpar.fl.he.pool import Pool
from shardpar.fl.messages import Message
from shardpar.fl.vertical.bins import Bins
from shardpar.fl.vertical.files import read, write
from shardpar.fl.vertical.gains import base_of
from shardpar.fl.vertical.guest import GuestOfTrees
from shardpar.fl.vertical.host import HostOfTrees
from shardpar.fl.vertical.link import Role, greet
from shardpar.fl.vertical.options import KeyOptions, TreeOptions
from shardpar.fl.vertical.tree_messages import bits_of, flags_of
from shardpar.fl.vertical.trees import Cut, Grown, TreeOfGuest, answers_of

_MOST_ANSWER_BYTES = 1 << 20


class ModelName(Message):
    """From the guest after training: what both halves are called."""

    model: bytes


class Answers(Message):
    """From the host: whether each of some rows goes left at each of its splits, a bit each."""

    left: bytes


@dataclass(frozen=True)
class Progress:
    """What is known after a tree.

    Attributes:
      tree: its number, from 1.
      guesses: splits by the guest's own columns before the host's were known; 0 at the host.
      taken_back: of those.
    """

    tree: int
    guesses: int
    taken_back: int


class _GuestFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="vertical-trees-g1"):
    model: bytes
    names: tuple[str, ...]
    options: TreeOptions
    base: float
    trees: tuple[dict[int, Grown], ...]
    splits: int


class _HostFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="vertical-trees-h1"):
    model: bytes
    names: tuple[str, ...]
    options: TreeOptions
    cuts: tuple[Cut, ...]


@dataclass(frozen=True)
class TreesHalf:
    """One party's half.

    Attributes:
      role: the party's.
      model: bytes that both halves of a model have.
      names: of this party's columns.
      options: as trained.
      base: the score before the first tree; 0 at the host.
      trees: the guest's; none at the host.
      cuts: the host's splits by number; none at the guest.
      splits: how many the host has; 0 at the host.
    """

    role: Role
    model: bytes
    names: tuple[str, ...]
    options: TreeOptions
    base: float = 0.0
    trees: tuple[TreeOfGuest, ...] = ()
    cuts: tuple[Cut, ...] = ()
    splits: int = 0

    def save(self, path: Path) -> None:
        """Writes the half, whole or not at all."""
        if self.role == "host":
            write(path, _HostFile(self.model, self.names, self.options, self.cuts))
            return
        trees = tuple(tree.nodes for tree in self.trees)
        write(
            path,
            _GuestFile(self.model, self.names, self.options, self.base, trees, self.splits),
        )

    @classmethod
    def load(cls, path: Path) -> TreesHalf:
        """The half in a file.

        Raises:
          DataError: there is none.
        """
        file = read(path, _GuestFile | _HostFile)
        if isinstance(file, _HostFile):
            return cls("host", file.model, file.names, file.options, cuts=file.cuts)
        trees = tuple(TreeOfGuest(nodes) for nodes in file.trees)
        return cls(
            "guest", file.model, file.names, file.options, file.base, trees, splits=file.splits
        )


def fit(
    channel: Channel,
    role: Role,
    columns: np.ndarray,
    labels: np.ndarray | None,
    options: TreeOptions,
    keys: KeyOptions,
    *,
    names: Sequence[str] | None = None,
    row_ids: Sequence[str] | None = None,
    on_tree: Callable[[Progress], None] = lambda _: None,
) -> TreesHalf:
    """Grows trees with the other party, which calls it too.

    Args:
      channel: to the other.
      role: this party's.
      columns: this party's, float [rows, columns], NaN where a number is missing.
      labels: the guest's, [rows]: 0 and 1, or real numbers for "squared"; None at the host.
      options: as agreed.
      keys: how keys are made; only the guest's is used.
      names: of the columns; None numbers them.
      row_ids: of the rows, to be sure that both have the same.
      on_tree: is told about each; not at the host.

    Raises:
      DataError: columns or labels that cannot be trained on.
      PartyError: the other is gone, has other rows or options, or breaks the protocol.
    """
    if (labels is None) != (role == "host"):
        raise DataError("the guest has the labels and the host none: give them there only")
    columns = np.asarray(columns, np.float64)
    bins = Bins.of(columns, most=options.max_bins)
    binned = bins.sorted(columns)
    named = tuple([str(at) for at in range(columns.shape[1])] if names is None else names)
    targets = None if labels is None else _targets(labels, len(columns))
    base = 0.0 if targets is None else base_of(targets, options)
    with Pool(keys.processes) as pool:
        link = greet(
            channel, role, options, keys,
            topic="trees/fit", rows=len(columns), columns=columns.shape[1], row_ids=row_ids,
            pool=pool,
        )  # fmt: skip
        if targets is None:
            host = HostOfTrees(link, options, bins, binned)
            host.grow()
            model = link.receive("model", ModelName).model
            return TreesHalf(role, model, named, options, cuts=cuts_of(bins, host.chosen))
        guest, scores, trees = (
            GuestOfTrees(link, options, bins, binned),
            np.full(len(targets), base),
            [],
        )
        for number in range(options.trees):
            tree, added = guest.grow(scores, targets)
            scores = scores + added
            trees.append(tree)
            on_tree(Progress(number + 1, guest.guesses, guest.taken_back))
        guest.end()
        model = link.secret.public.fingerprint
        link.send("model", ModelName(model))
    splits = guest.splits_of_host_taken
    return TreesHalf(role, model, named, options, base, tuple(trees), splits=splits)


def cuts_of(bins: Bins, chosen: Sequence[int]) -> tuple[Cut, ...]:
    """The host's splits, with numbers for bins."""
    splits, cuts = bins.splits, []
    for at in chosen:
        column = int(splits.column[at])
        edges = (*bins.edges[column], np.inf)
        cuts.append(Cut(column, float(edges[splits.bin[at]]), bool(splits.missing_left[at])))
    return tuple(cuts)


def predict(
    channel: Channel,
    half: TreesHalf,
    columns: np.ndarray,
    keys: KeyOptions,
    *,
    row_ids: Sequence[str] | None = None,
) -> np.ndarray | None:
    """Predictions for rows of which each party has its columns; both call it.

    Returns:
      At the guest probabilities, or numbers for "squared", float64 [rows]; None at the host.

    Raises:
      DataError: other columns than trained on.
      PartyError: the other is gone, has another model or other rows, or breaks the protocol.
    """
    columns = np.asarray(columns, np.float64)
    if columns.ndim != 2 or columns.shape[1] != len(half.names):
        raise DataError(f"columns shaped {columns.shape} for a model of {len(half.names)} columns")
    agreed = _Prediction(half.model.hex())
    with Pool(1) as pool:
        link = greet(
            channel, half.role, agreed, keys,
            topic="trees/predict", rows=len(columns), columns=columns.shape[1], row_ids=row_ids,
            pool=pool,
        )  # fmt: skip
    splits = len(half.cuts) if half.role == "host" else half.splits
    size = max(1, 8 * _MOST_ANSWER_BYTES // max(splits, 1))
    scores = [np.zeros(0)]
    for start in range(0, len(columns), size):
        part = columns[start : start + size]
        if half.role == "host":
            link.send("answers", Answers(bits_of(answers_of(half.cuts, part))))
            continue
        held = link.receive("answers", Answers)
        answers = flags_of(held.left, splits * len(part), link.peer).reshape(len(part), splits)
        score = np.full(len(part), half.base)
        for tree in half.trees:
            score = score + tree.added(part, answers)
        scores.append(score)
    if half.role == "host":
        return None
    score = np.concatenate(scores)
    return score if half.options.objective == "squared" else expit(score)


@dataclass(frozen=True)
class _Prediction:
    """What both must have alike to predict."""

    model: str


def _targets(labels: np.ndarray, rows: int) -> np.ndarray:
    labels = np.asarray(labels, np.float64)
    if labels.shape != (rows,):
        raise DataError(f"labels shaped {labels.shape} for {rows} rows")
    return labels
