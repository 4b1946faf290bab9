"""Blocks: the pairs of all blocks are those of the sentences, none lost, none invented."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from shardpar.errors import DataError
from shardpar.ps.algorithms.skipgram_blocks import BlockShape, batches, seen, sentences_of


def pairs_of_blocks(found, window):
    pairs = Counter()
    for batch in found:
        for block, others in enumerate(batch["others"]):
            for at, centre in enumerate(batch["centres"][block]):
                left, right = batch["left"][block, at], batch["right"][block, at]
                if centre < 0:
                    assert left == right == 0
                here = at + window
                for place in [*range(here - left, here), *range(here + 1, here + right + 1)]:
                    pairs[int(centre), int(others[place])] += 1
    return pairs


SHAPES = [BlockShape(2, 4, 2, 3), BlockShape(1, 3, 1, 1), BlockShape(3, 16, 5, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("matrix", [False, True])
def test_pairs_are_those_within_a_window_of_each_sentence(shape, matrix):
    random = np.random.default_rng(3)
    if matrix:
        ends = random.integers(0, 9, 40)
        walks = np.where(np.arange(8) < ends[:, None], np.arange(320).reshape(40, 8), -1)
        items, vocabulary = np.split(walks, 8), 320
        sentences = [row[row >= 0] for row in walks]
    else:
        lengths = random.integers(0, 30, 25)
        sentences = np.split(np.arange(lengths.sum()), np.cumsum(lengths)[:-1])
        items, vocabulary = sentences, int(lengths.sum())
    noise = np.linspace(0, 1, vocabulary + 1)[1:]
    stream = sentences_of(items, vocabulary)
    found = list(batches(stream, shape, noise, None, np.random.default_rng(0)))
    pairs = pairs_of_blocks(found, shape.window)
    # Tokens are distinct, so a centre's contexts say how far it saw.
    seen_by = {c: {o for a, o in pairs if a == c} for c, _ in pairs}
    for sentence in sentences:
        for at, centre in enumerate(sentence):
            possible = [
                {*sentence[max(0, at - reach) : at], *sentence[at + 1 : at + 1 + reach]}
                for reach in range(1, shape.window + 1)
            ]
            assert seen_by.get(int(centre), set()) in [{int(o) for o in p} for p in possible]
    assert max(pairs.values()) == 1
    centres = np.concatenate([batch["centres"].reshape(-1) for batch in found])
    np.testing.assert_array_equal(centres[centres >= 0], np.concatenate(sentences))


def test_every_reach_is_as_likely_as_the_others():
    flat = np.zeros(30_000, np.int32)
    tokens = seen(flat, np.array([30_000]), 3, None, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(tokens.left[5:])[1:4] / 30_000, 1 / 3, atol=0.02)


def test_tokens_are_left_out_before_windows_are_laid():
    flat = np.array([0, 1, 2, 3, 4], np.int32)
    kept = np.array([1.0, 0.0, 1.0, 0.0, 1.0])
    tokens = seen(flat, np.array([3, 2]), 1, kept, np.random.default_rng(0))
    assert tokens.ids.tolist() == [0, 2, 4]
    assert (tokens.left.tolist(), tokens.right.tolist()) == ([0, 1, 0], [1, 0, 0])


def test_negatives_come_as_often_as_the_noise_says():
    noise = np.cumsum([0.5, 0.0, 0.3, 0.2])
    shape = BlockShape(64, 4, 1, 8)
    sentences = sentences_of([np.zeros(10_000, int)], 4)
    found = list(batches(sentences, shape, noise, None, np.random.default_rng(0)))
    drawn = np.concatenate([batch["others"][:, shape.contexts :].reshape(-1) for batch in found])
    share = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(share, [0.5, 0, 0.3, 0.2], atol=0.02)


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ([0, 4], "has token 4; tokens are 0 to 3"),
        ([0.5], "float64"),
        (np.zeros((1, 1, 1), int), "item 1"),
    ],
)
def test_items_that_are_no_sentences_are_refused(item, says):
    with pytest.raises(DataError, match=says):
        list(sentences_of([[1, 2], item], 4))
