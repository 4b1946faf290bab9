"""Numbers that are read many at once are those that Python reads one by one."""

from __future__ import annotations

import math
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.ps.data.tokens import COLON, Text, blank_or, parse_digits, parse_numbers, split


def cut(lines):
    text = Text.of(lines)
    return text, split(text, blank_or(COLON, text.data), merge=True)


def read(words):
    text, tokens = cut([b" ".join(words)])
    return parse_numbers(text, tokens)


def test_tokens_are_what_a_plain_split_gives():
    lines = [b"1 2:3  4:5 ", b"", b"  x\t:y", b"a::b\r", b"-1.5 qid:3 7:.5e3"]
    text, tokens = cut(lines)
    expected = [piece for line in lines for word in line.split() for piece in word.split(b":")]
    found = [text.slice(a, b) for a, b in zip(tokens.starts, tokens.ends, strict=True)]
    assert found == expected
    assert tokens.counts.tolist() == [
        sum(len(word.split(b":")) for word in line.split()) for line in lines
    ]


def test_lines_with_control_characters_are_pointed_out():
    _, tokens = cut([b"1 2:3", b"1 2:3\x00", b"1 2:3\t\r", b"\x1b1 2:3"])
    assert set(tokens.strange.tolist()) == {1, 3}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=20), st.sampled_from("gre"))
def test_floats_are_bit_for_bit_those_of_python(values, how):
    words = [(repr(v) if how == "r" else f"{v:.10{how}}").encode() for v in values]
    found, right = read(words)
    assert right.all()
    assert found.tolist() == [float(word) for word in words]


def test_many_short_decimals_are_bit_for_bit_those_of_python():
    draw = random.Random(0)
    words = [
        f"{draw.choice(['', '-', '+'])}{draw.randrange(10 ** draw.randrange(1, 9))}"
        f"{draw.choice(['', '.', f'.{draw.randrange(10**7)}', f'.{draw.randrange(9):03d}'])}"
        for _ in range(20_000)
    ]
    found, right = read([word.encode() for word in words])
    assert right.all()
    assert found.tolist() == [float(word) for word in words]


def test_what_is_no_number_is_not_read_as_one():
    wrong = [b"-", b"+", b".", b"1.2.3", b"1-2", b"1_0", b"0x10", b"1e", b"e5", b"--1", b"1,5",
             b"nano", b"1" * 41, "٣".encode(), b"-.", b"1.e", b"/", b"12345678x",
             b"x12345678"]  # fmt: skip
    for word in wrong:
        _, right = read([b"1", word, b"2.5"])
        assert right.tolist() == [True, False, True], word


def test_not_a_number_and_infinity_are_read_as_such():
    found, right = read([b"nan", b"-inf", b"Infinity"])
    assert right.all()
    assert math.isnan(found[0])
    assert found[1:].tolist() == [-math.inf, math.inf]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**18 - 1), min_size=1, max_size=20))
def test_whole_numbers_of_up_to_eighteen_digits_are_exact(values):
    text, tokens = cut([" ".join(map(str, values)).encode()])
    found, right = parse_digits(text, tokens.starts, tokens.ends)
    assert right.all()
    assert found.tolist() == values


def test_every_byte_that_is_no_digit_is_seen_at_every_place():
    for length in (1, 2, 3, 8, 9, 16, 17):
        words = [
            b"1" * place + bytes([byte]) + b"1" * (length - place - 1)
            for place in range(length)
            for byte in set(range(33, 256)) - set(b"0123456789:.")
        ]
        text, tokens = cut(words)
        assert tokens.counts.tolist() == [1] * len(words)
        _, right = parse_digits(text, tokens.starts, tokens.ends)
        assert not right.any()
    text, tokens = cut([b"1" * 19])
    assert not parse_digits(text, tokens.starts, tokens.ends)[1][0]


def test_values_do_not_depend_on_what_stands_beside_them():
    words = [b"7", b"12345678", b"123456789012", b"0.25"]
    alone = np.concatenate([read([word])[0] for word in words])
    assert read(words)[0].tolist() == alone.tolist()
