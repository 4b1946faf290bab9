"""Token streams become blocks of centres, their contexts and shared negatives, on the host.

A block is a run of consecutive tokens: all its pairs, and all its negatives, come to one small
matrix product. Sentences follow each other in the run; how far each centre sees to the left
and to the right says where they end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardpar.errors import DataError


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens in a row and how far each sees.

    Attributes:
      ids: int32[n].
      left, right: int32[n], contexts of each token on either side.
    """

    ids: np.ndarray
    left: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class BlockShape:
    """How blocks are cut.

    Attributes:
      blocks: in a batch.
      centres: of a block.
      window: contexts on either side, at most.
      shared: negatives of a block.
    """

    blocks: int
    centres: int
    window: int
    shared: int

    @property
    def contexts(self) -> int:
        """Tokens of a block that may be a context: the centres, and a window on both sides."""
        return self.centres + 2 * self.window


def sentences_of(items: Iterable[Any], vocabulary: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Flat tokens and sentence lengths of each item.

    Args:
      items: int[n], one sentence, or int[m, n], m sentences, with -1 after the end of each.
      vocabulary: tokens are below it.

    Raises:
      DataError: an item has another form, or a token is outside the vocabulary.
    """
    for number, item in enumerate(items):
        array = np.asarray(item)
        if array.ndim not in (1, 2) or (array.size and array.dtype.kind not in "iu"):
            raise DataError(
                f"item {number} of the sentences is {array.dtype}{list(array.shape)}; give int[n], "
                "a sentence, or int[m, n], m sentences"
            )
        there = array >= 0
        lengths = np.atleast_1d(there.sum(axis=-1))
        flat = array.reshape(-1) if there.all() else array[there]
        if flat.size and flat.max() >= vocabulary:
            raise DataError(
                f"item {number} of the sentences has token {flat.max()}; tokens are 0 to "
                f"{vocabulary - 1}"
            )
        yield flat.astype(np.int32, copy=False), lengths


def seen(
    flat: np.ndarray,
    lengths: np.ndarray,
    window: int,
    kept: np.ndarray | None,
    random: np.random.Generator,
) -> Tokens:
    """How far each token sees: up to a random part of the window, within its sentence.

    Args:
      flat: int32[n], sentence after sentence.
      lengths: int[sentences].
      window: contexts on either side, at most.
      kept: float[vocabulary], the chance of each token not to be left out; None keeps all.
      random: where the draws come from.
    """
    if kept is not None:
        stays = random.random(len(flat)) < kept[flat]
        sentence = np.repeat(np.arange(len(lengths)), lengths)
        lengths = np.bincount(sentence[stays], minlength=len(lengths))
        flat = flat[stays]
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(flat)) - np.repeat(starts, lengths)
    reach = random.integers(1, window + 1, len(flat), dtype=np.int32)
    left = np.minimum(reach, place)
    right = np.minimum(reach, np.repeat(lengths, lengths) - 1 - place)
    return Tokens(flat, left.astype(np.int32), right.astype(np.int32))


def batches(
    sentences: Iterable[tuple[np.ndarray, np.ndarray]],
    shape: BlockShape,
    cumulative: np.ndarray,
    kept: np.ndarray | None,
    random: np.random.Generator,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of blocks; the last is filled with tokens that are none.

    Args:
      sentences: from `sentences_of`.
      shape: of the blocks.
      cumulative: float64[vocabulary], cumulative chance of each token to be a negative.
      kept: as for `seen`.
      random: where the draws come from.

    Yields:
      "centres" int32[blocks, centres], -1 for none; "others" int32[blocks, contexts + shared],
      the block's contexts and then its negatives; "left", "right" int32[blocks, centres].
    """
    size = shape.blocks * shape.centres
    rest = Tokens(*(np.zeros(0, np.int32),) * 3)
    before = np.full(shape.window, -1, np.int32)
    for joined in _gathered(sentences, size):
        more = seen(*joined, shape.window, kept, random)
        tokens = Tokens(
            np.concatenate([rest.ids, more.ids]),
            np.concatenate([rest.left, more.left]),
            np.concatenate([rest.right, more.right]),
        )
        # Enough is held back for the right contexts of the last centre that goes.
        whole = max(0, len(tokens.ids) - shape.window) // size * size
        if whole:
            yield from _cut(tokens, whole, before, shape, cumulative, random)
            before = np.concatenate([before, tokens.ids[:whole]])[-shape.window :]
        rest = Tokens(tokens.ids[whole:], tokens.left[whole:], tokens.right[whole:])
    if len(rest.ids):
        yield from _cut(rest, -(-len(rest.ids) // size) * size, before, shape, cumulative, random)


def _gathered(
    sentences: Iterable[tuple[np.ndarray, np.ndarray]], size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sentences together, until there are about as many tokens as a batch takes."""
    flats, lengths, held = [], [], 0
    for flat, length in sentences:
        flats.append(flat)
        lengths.append(length)
        held += len(flat)
        if held >= size:
            yield np.concatenate(flats), np.concatenate(lengths)
            flats, lengths, held = [], [], 0
    if held:
        yield np.concatenate(flats), np.concatenate(lengths)


def _cut(
    tokens: Tokens,
    whole: int,
    before: np.ndarray,
    shape: BlockShape,
    cumulative: np.ndarray,
    random: np.random.Generator,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the first `whole` tokens, which may be more than there are."""
    around = np.full(shape.window + whole + shape.window, -1, np.int32)
    around[: shape.window] = before
    there = min(len(tokens.ids), whole + shape.window)
    around[shape.window : shape.window + there] = tokens.ids[:there]
    centres = around[shape.window : shape.window + whole].copy()
    centres[len(tokens.ids) :] = -1
    left, right = (_filled(part, whole) for part in (tokens.left, tokens.right))
    contexts = np.lib.stride_tricks.sliding_window_view(around, shape.contexts)[:: shape.centres]
    rows = (-1, shape.centres)
    centres, left, right = centres.reshape(rows), left.reshape(rows), right.reshape(rows)
    for at in range(0, len(centres), shape.blocks):
        now = slice(at, at + shape.blocks)
        draws = random.random((shape.blocks, shape.shared))
        negatives = np.searchsorted(cumulative, draws, side="right").astype(np.int32)
        yield {
            "centres": centres[now],
            "others": np.concatenate([contexts[now], negatives], axis=1),
            "left": left[now],
            "right": right[now],
        }


def _filled(part: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros(size, np.int32)
    out[: min(size, len(part))] = part[:size]
    return out
