"""Decides which sequences of unequal lengths share a row, so that few tokens are padding.

A packed row says of each token which of its sequences it belongs to, and where in it; models
let a token see its own sequence only, so a packed sequence has the losses that it has alone
(Krell et al., arXiv 2107.02027).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardpar.errors import DataError
from shardpar.planner.bins import first_fit_decreasing

Rows = tuple[tuple[int, ...], ...]
"""For each row, the numbers of the sequences in it, ascending."""

WINDOW = 1024
"""So many sequences are packed together: more leave less padding and mix the data wider."""


def pack(lengths: Sequence[int], row_tokens: int, window: int = WINDOW) -> Rows:
    """Packs sequences into rows, each sequence whole and exactly once.

    Args:
      lengths: tokens that each sequence takes of a row, 1 or more.
      row_tokens: of a row.
      window: sequences that are packed together; no row has sequences of two windows.

    Raises:
      DataError: a sequence is longer than a row.

    >>> pack([6, 3, 5, 2, 4], row_tokens=8)
    ((0, 3), (1, 2), (4,))
    >>> pack([6, 3, 5, 2, 4], row_tokens=8, window=3)
    ((0,), (1, 2), (3, 4))
    """
    if window < 1 or row_tokens < 1:
        raise DataError(
            f"rows of {row_tokens} tokens were asked for, packed from windows of {window} "
            "sequences; write 1 or more for both"
        )
    long = np.flatnonzero(np.asarray(lengths) > row_tokens)
    if long.size:
        raise DataError(
            f"sequence {long[0]} takes {lengths[long[0]]} tokens and a row has {row_tokens}; "
            "cut the sequence, or give rows more tokens"
        )
    rows: list[tuple[int, ...]] = []
    for first in range(0, len(lengths), window):
        for items in first_fit_decreasing(lengths[first : first + window], row_tokens):
            rows.append(tuple(first + item for item in items))
    return tuple(rows)


def fill(
    sequences: Sequence[np.ndarray],
    rows: Rows,
    row_tokens: int,
    weights: Sequence[np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of packed rows.

    A sequence of n tokens takes n - 1 places: in each, a token and the one that follows it in
    the same sequence, so that nothing is predicted across a border.

    Args:
      sequences: the ids of each, 2 or more.
      rows: what `pack` made of their sizes less 1.
      row_tokens: of a row.
      weights: of each sequence's predictions, one less than it has tokens; None weighs all 1.

    Returns:
      int32 [rows, row_tokens]: `inputs`, `targets`, `segment_ids` (1 for the first sequence of
      a row, 0 for padding), `positions` (from 0 in each sequence); float32 of the same shape:
      `weights` of the loss, 0 for padding.

    >>> for name, array in fill([np.array([5, 6, 7]), np.array([8, 9])], ((0, 1),), 4).items():
    ...     print(name, array.tolist())
    inputs [[5, 6, 8, 0]]
    targets [[6, 7, 9, 0]]
    segment_ids [[1, 1, 2, 0]]
    positions [[0, 1, 0, 0]]
    weights [[1.0, 1.0, 1.0, 0.0]]
    """
    batch = empty_rows(len(rows), row_tokens)
    for row, numbers in enumerate(rows):
        at = 0
        for segment, number in enumerate(numbers, 1):
            ids = sequences[number]
            weight = 1.0 if weights is None else weights[number]
            at = _place(batch, row, at, segment, ids, weight)
    return batch


def empty_rows(count: int, row_tokens: int) -> dict[str, np.ndarray]:
    """Rows of padding alone: the arrays of `fill` before anything is in them."""
    shape = (count, row_tokens)
    names = ("inputs", "targets", "segment_ids", "positions")
    return {
        **{name: np.zeros(shape, np.int32) for name in names},
        "weights": np.zeros(shape, np.float32),
    }


def _place(
    batch: dict[str, np.ndarray],
    row: int,
    at: int,
    segment: int,
    ids: np.ndarray,
    weight: np.ndarray | float,
) -> int:
    """Writes a sequence into a row from a place on; returns the next free one."""
    end = at + len(ids) - 1
    if end <= at or end > batch["inputs"].shape[1]:
        raise DataError(
            f"a sequence of {len(ids)} tokens was to lie at {at} of a row of "
            f"{batch['inputs'].shape[1]}; give 2 tokens or more, and rows made by pack() of "
            "the sequences' sizes less 1"
        )
    batch["inputs"][row, at:end] = ids[:-1]
    batch["targets"][row, at:end] = ids[1:]
    batch["segment_ids"][row, at:end] = segment
    batch["positions"][row, at:end] = np.arange(end - at)
    batch["weights"][row, at:end] = weight
    return end


def pieces(ends: np.ndarray, longest: int) -> np.ndarray:
    """Documents back to back, cut so that none predicts more than so many tokens.

    Each token but a document's first is still predicted once, from those before it in its piece.

    Args:
      ends: where each document ends; documents have 2 tokens or more.
      longest: the most tokens that a piece predicts.

    Returns:
      int64 [pieces, 2]: the first input of each, and how many tokens it predicts.

    Raises:
      DataError: a document has fewer than 2 tokens.

    >>> pieces(np.array([3, 9]), 4).tolist()
    [[0, 2], [3, 4], [7, 1]]
    """
    begins = np.concatenate([[0], ends]).astype(np.int64)[:-1]
    predicted = ends - begins - 1
    if predicted.size and predicted.min() < 1:
        document = int(np.argmin(predicted))
        raise DataError(
            f"document {document} has {predicted[document] + 1} tokens; leave out what "
            "has fewer than 2"
        )
    count = -(-predicted // longest)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    offset = number * longest
    left = np.repeat(predicted, count) - offset
    return np.stack([np.repeat(begins, count) + offset, np.minimum(left, longest)], axis=1)


def digest_of(tokens: np.ndarray, ends: np.ndarray) -> str:
    """A short name that two lists of documents share only if they are the same."""
    ids = hashlib.blake2b(tokens.dtype.str.encode(), digest_size=8)
    ids.update(np.ascontiguousarray(tokens).data)
    ids.update(np.ascontiguousarray(ends, np.int64).data)
    return ids.hexdigest()


@dataclass(frozen=True, eq=False)
class PackedDocuments:
    """Documents as rows that can be read in any order: what `data.packing` makes of a text.

    A document longer than a row is cut: each of its tokens but the first is still predicted
    once, from those before it in the same piece.

    Attributes:
      tokens: the ids of all documents back to back, of any unsigned dtype.
      ends: int64, where each document ends in `tokens`; documents have 2 tokens or more.
      sequence_length: tokens of a row.
      tokenizer: digest of what made the ids; part of the identity of the data.

    >>> documents = PackedDocuments(np.arange(9, dtype=np.uint8), np.array([3, 5, 9]), 4)
    >>> len(documents), documents[0]["inputs"].tolist(), documents[0]["segment_ids"].tolist()
    (2, [3, 5, 6, 7], [1, 2, 2, 2])
    """

    tokens: np.ndarray
    ends: np.ndarray
    sequence_length: int
    tokenizer: str = ""

    @cached_property
    def _pieces(self) -> np.ndarray:
        return pieces(self.ends, self.sequence_length)

    @cached_property
    def rows(self) -> Rows:
        """The pieces of documents in each row."""
        return pack(self._pieces[:, 1].tolist(), self.sequence_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return {key: array[0] for key, array in self.gather(np.array([sample])).items()}

    def gather(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of these ids as one batch, as from `fill`, with the ids as `sample`."""
        samples = np.asarray(samples, np.int64)
        batch = empty_rows(len(samples), self.sequence_length)
        for row, sample in enumerate(samples.tolist()):
            at = 0
            for segment, piece in enumerate(self.rows[sample], 1):
                first, predicted = self._pieces[piece].tolist()
                at = _place(
                    batch, row, at, segment, self.tokens[first : first + predicted + 1], 1.0
                )
        return {**batch, "sample": samples}

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """What two runs must share to see the same samples under the same ids."""
        return {
            "packing": f"first-fit-decreasing/{WINDOW}",
            "sequence_length": self.sequence_length,
            "tokenizer": self.tokenizer,
            "samples": len(self),
            "tokens": digest_of(self.tokens, self.ends),
        }
