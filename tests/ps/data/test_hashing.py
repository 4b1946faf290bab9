"""Hashes are even, part the fields, and never change."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardpar.ps.data.hashing import hash_integers, hash_text, hash_tokens, mix
from shardpar.ps.data.tokens import Text


def many(texts, fields=None, rows=None):
    text = Text.of(texts)
    ends = 15 + np.cumsum([len(t) + 1 for t in texts])
    starts = np.array([e - len(t) for t, e in zip(texts, ends, strict=True)])
    fields = None if fields is None else np.array(fields)
    return hash_tokens(text.words, starts, ends, fields, rows).tolist()


def test_the_hash_is_splitmix64():
    # The finaliser of Java's SplittableRandom: its first outputs for seed 0.
    golden = 0x9E3779B97F4A7C15
    first = mix(np.array([golden, golden * 2 % 2**64], np.uint64)).tolist()
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_ids_are_those_that_trained_tables_were_made_with():
    assert hash_integers(np.array([0, 1, 2**62]), rows=2**20).tolist() == [0, 354593, 77331]
    assert hash_integers(np.array([5]), np.array([3])).tolist() == [5572844691250821415]
    assert [hash_text(t) for t in (b"", b"a", b"68fd1e64", b"68fd1e64x")] == [
        0, 6754272901643539897, 4179001020494124143, 3740109530480001145
    ]  # fmt: skip


@given(st.lists(st.tuples(st.binary(max_size=40).filter(lambda b: b"\n" not in b),
                          st.integers(0, 5000)), min_size=1, max_size=12))  # fmt: skip
def test_many_texts_hash_as_each_does(pairs):
    texts, fields = [list(part) for part in zip(*pairs, strict=True)]
    assert many(texts, fields, 1000) == [hash_text(t, f, 1000) for t, f in pairs]
    assert many(texts) == [hash_text(t) for t in texts]


def test_ids_spread_evenly_over_any_number_of_rows():
    for rows in (7, 1000, 2**20 + 3):
        ids = hash_integers(np.arange(200_000), rows=rows)
        assert ids.min() >= 0
        assert ids.max() < rows
        groups = np.bincount(ids * 7 // rows, minlength=7)
        assert np.abs(groups / 200_000 - 1 / 7).max() < 0.004


def test_equal_values_of_different_fields_part():
    value = np.full(100, 12345)
    assert np.unique(hash_integers(value, np.arange(100))).size == 100
    assert np.unique(many([b"x"] * 100, range(100))).size == 100


def test_texts_that_differ_in_zero_bytes_only_part():
    assert len({hash_text(b"\0" * n) for n in range(30)}) == 30
