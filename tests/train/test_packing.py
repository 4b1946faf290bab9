"""Packing: every sequence once and whole, the arrays that say so, and documents as samples."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import DataError
from shardpar.planner.bins import first_fit_decreasing
from shardpar.train.corpus import Corpus
from shardpar.train.data import load_text, train_batches
from shardpar.train.options import DataOptions
from shardpar.train.packing import WINDOW, PackedDocuments, fill, pack
from shardpar.train.tokenizer import ByteTokenizer, encode_documents


def documents_of(sizes, row_tokens=8):
    ids = np.random.default_rng(0).integers(0, 256, sum(sizes), np.uint8)
    return PackedDocuments(ids, np.cumsum(sizes, dtype=np.int64), row_tokens)


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), max_size=60), st.integers(1, 20))
def test_every_sequence_is_in_one_row_and_rows_hold_no_more_than_they_may(lengths, window):
    rows = pack(lengths, 12, window)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    for row in rows:
        assert 0 < sum(lengths[i] for i in row) <= 12
        assert len({i // window for i in row}) == 1
    assert rows == pack(lengths, 12, window)


def fewest_bins(sizes, capacity):
    """Brute force: sizes one after another into every bin they fit, bins alike tried once."""

    def place(left, free):
        if not left:
            return len(free)
        best = len(free) + len(left)
        for i in {f: i for i, f in enumerate(free) if f >= left[0]}.values():
            best = min(best, place(left[1:], [*free[:i], free[i] - left[0], *free[i + 1 :]]))
        return min(best, place(left[1:], [*free, capacity - left[0]]))

    return place(sorted(sizes, reverse=True), [])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=7))
def test_bins_are_as_few_as_the_theorem_says(sizes):
    fewest = fewest_bins(tuple(sizes), 10)
    assert fewest <= len(first_fit_decreasing(sizes, 10)) <= 11 / 9 * fewest + 6 / 9


@settings(deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=20), st.randoms())
def test_filled_rows_say_of_each_token_where_it_is_from(sizes, random):
    sequences = [np.array([random.randrange(1, 99) for _ in range(n)]) for n in sizes]
    rows = pack([n - 1 for n in sizes], 8)
    batch = fill(sequences, rows, 8)
    for r, row in enumerate(rows):
        for segment, number in enumerate(row, 1):
            at = np.flatnonzero(batch["segment_ids"][r] == segment)
            assert (np.diff(at) == 1).all()
            assert batch["inputs"][r, at].tolist() == sequences[number][:-1].tolist()
            assert batch["targets"][r, at].tolist() == sequences[number][1:].tolist()
            assert batch["positions"][r, at].tolist() == list(range(len(at)))
    padding = batch["segment_ids"] == 0
    assert not any(array[padding].any() for array in batch.values())
    assert (batch["weights"] == ~padding).all()
    assert {a.dtype.name for a in batch.values()} == {"int32", "float32"}


def test_each_prediction_has_the_weight_it_is_given():
    batch = fill(
        [np.array([1, 2, 3]), np.array([4, 5])], ((0, 1),), 4,
        [np.array([0.0, 2.0]), np.array([0.5])],
    )  # fmt: skip
    assert batch["weights"].tolist() == [[0.0, 2.0, 0.5, 0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pack([3, 9], 8),
            "sequence 1 takes 9 tokens and a row has 8; cut the sequence, or give rows more tokens",
        ),
        (
            lambda: pack([3, 0], 8),
            "sequence 1 has 0 tokens, and a row holds 1 to 8; cut the sequence, or let rows hold 3",
        ),
        (
            lambda: pack([3], 8, window=0),
            "rows of 8 tokens were asked for, packed from windows of 0 sequences; "
            "write 1 or more for both",
        ),
        (
            lambda: fill([np.array([1])], ((0,),), 8),
            "a sequence of 1 tokens was to lie at 0 of a row of 8; give 2 tokens or more, and rows "
            "made by pack() of the sequences' sizes less 1",
        ),
        (
            lambda: len(documents_of([3, 1])),
            "document 1 has 1 tokens; leave out what has fewer than 2",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(call, message):
    with pytest.raises(DataError) as caught:
        call()
    assert str(caught.value) == message


@settings(deadline=None)
@given(st.lists(st.integers(2, 40), max_size=30))
def test_documents_have_each_token_but_their_first_predicted_once(sizes):
    documents = documents_of(sizes)
    batch = documents.gather(np.arange(len(documents)))
    real = batch["weights"] > 0
    assert int(real.sum()) == sum(size - 1 for size in sizes)
    expected = [
        documents.tokens[i]
        for begin, end in itertools.pairwise([0, *documents.ends.tolist()])
        for i in range(begin + 1, end)
    ]
    assert sorted(batch["targets"][real].tolist()) == sorted(map(int, expected))


def test_documents_end_with_the_separator():
    ids, ends = encode_documents(ByteTokenizer(), Corpus.of(["ab", "cde"]))
    batch = PackedDocuments(ids, ends, 12)[0]
    assert bytes(batch["targets"][:7].astype(np.uint8)) == b"b\n\nde\n\n"
    assert batch["segment_ids"].tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 0]


def test_a_packed_text_goes_on_exactly_where_it_stopped(tmp_path):
    path = tmp_path / "rows.jsonl"
    random = np.random.default_rng(0)
    lines = ["word " * int(n) for n in random.integers(1, 20, 200)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    options = DataOptions("jsonl", str(path), sequence_length=64, packing=True)
    windows = load_text(options).train
    assert isinstance(windows, PackedDocuments)
    with train_batches(windows, 4, seed=0) as batches:
        seen = [next(batches) for _ in range(2)]
        position = batches.position
        expected = [next(batches) for _ in range(len(windows) // 4)]
    with train_batches(load_text(options).train, 2, seed=0) as batches:
        batches.restore(json.loads(json.dumps(position)))
        got = [next(batches) for _ in range(2)]
    for key, array in expected[0].items():
        assert np.array_equal(np.concatenate([batch[key] for batch in got]), array), key
    consumed = np.concatenate([b["sample"] for b in (*seen, *expected)])[: len(windows)]
    assert sorted(consumed.tolist()) == list(range(len(windows)))


def test_a_position_of_windows_does_not_fit_packed_documents():
    plain, packed = (load_text(DataOptions(packing=p)).train for p in (False, True))
    with train_batches(plain, 4, seed=0) as batches:
        position = batches.position
    with (
        train_batches(packed, 4, seed=0) as batches,
        pytest.raises(DataError) as caught,
    ):
        batches.restore(position)
    assert str(caught.value) == (
        "data position: data.packing was off when the run began, in the manner None, and is in the "
        f"manner first-fit-decreasing/{WINDOW} now; use the data.packing and the shardpar version "
        "that it began with, or begin a new run"
    )
