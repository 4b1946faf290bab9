"""libsvm, libffm and dummy are read as scikit-learn or a plain loop reads them."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.datasets import load_svmlight_file

from shardpar.ps.data.dummy import Dummy
from shardpar.ps.data.hashing import hash_integers
from shardpar.ps.data.libffm import Libffm
from shardpar.ps.data.libsvm import Libsvm
from shardpar.ps.data.rows import RowShape


def some_lines(make, count=300, seed=0, longest=9):
    draw = random.Random(seed)
    return [
        " ".join([draw.choice(["0", "1", "-1", "2.5"]),
                  *(make(draw) for _ in range(draw.randrange(0, longest)))]).encode()
        for _ in range(count)
    ]  # fmt: skip


def value(draw):
    return draw.choice(["1", "0.5", "-2", "1e-05", "3.25", f"{draw.random():.6f}", "+7", ".5"])


def dense(batch, columns):
    found = np.zeros((len(batch), columns))
    for row in range(len(batch)):
        np.add.at(found[row], batch.ids[row], batch.values[row])
    return found


def test_libsvm_is_what_scikit_learn_reads(tmp_path):
    draw = random.Random(1)
    lines = []
    for _ in range(400):
        ids = sorted(draw.sample(range(1, 30), draw.randrange(0, 12)))
        tail = draw.choice(["", " ", "  # a comment", "\r"])
        pairs = [f"{i}:{value(draw)}" for i in ids]
        lines.append((" ".join([draw.choice(["1", "-1"]), *pairs]) + tail).encode())
    path = tmp_path / "some.svm"
    path.write_bytes(b"\n".join(lines))
    matrix, labels = load_svmlight_file(str(path), n_features=29, zero_based=False)
    parsed = Libsvm(RowShape(slots=12)).parse(lines)
    assert parsed.bad == ()
    assert parsed.batch.labels.tolist() == labels.tolist()
    np.testing.assert_array_equal(dense(parsed.batch, 29), matrix.toarray().astype(np.float32))


def test_query_ids_are_what_scikit_learn_reads(tmp_path):
    lines = [b"1 qid:3 1:0.5 4:1", b"0 qid:3", b"2 qid:17 2:1.5", b"1 5:1"]
    path = tmp_path / "ranked.svm"
    path.write_bytes(b"\n".join(lines[:3]))
    _, _, queries = load_svmlight_file(str(path), query_id=True, zero_based=False)
    batch = Libsvm(RowShape(slots=2)).parse(lines).batch
    assert batch.queries.tolist() == [*queries.tolist(), 0]
    assert batch.ids.tolist() == [[0, 3], [0, 0], [1, 0], [4, 0]]


@pytest.mark.parametrize("longest", [2, 9])
def test_libffm_is_what_a_plain_loop_reads(longest):
    lines = some_lines(
        lambda draw: f"{draw.randrange(40)}:{draw.randrange(10**9)}:{value(draw)}", longest=longest
    )
    parsed = Libffm(RowShape(slots=8)).parse(lines)
    assert parsed.bad == ()
    for row, line in enumerate(lines):
        label, *features = line.decode().split()
        parts = [feature.split(":") for feature in features]
        pad = [0] * (8 - len(parts))
        assert parsed.batch.labels[row] == np.float32(label)
        assert parsed.batch.fields[row].tolist() == [int(p[0]) for p in parts] + pad
        assert parsed.batch.ids[row].tolist() == [int(p[1]) for p in parts] + pad
        assert parsed.batch.values[row].tolist() == [float(np.float32(p[2])) for p in parts] + pad


def test_dummy_is_what_a_plain_loop_reads():
    lines = some_lines(lambda draw: str(draw.randrange(10 ** draw.randrange(1, 17))))
    parsed = Dummy(RowShape(slots=8)).parse(lines)
    assert parsed.bad == ()
    for row, line in enumerate(lines):
        label, *ids = line.split()
        assert parsed.batch.labels[row] == np.float32(label)
        assert parsed.batch.ids[row].tolist() == [int(i) for i in ids] + [0] * (8 - len(ids))
        assert parsed.batch.values[row].tolist() == [1] * len(ids) + [0] * (8 - len(ids))


def test_ids_of_nineteen_digits_are_exact():
    largest = 2**63 - 1
    assert Dummy(RowShape(1)).parse([f"1 {largest}".encode()]).batch.ids[0, 0] == largest
    ((_, reason),) = Dummy(RowShape(1)).parse([f"1 {largest + 1}".encode()]).bad
    assert "from 0 to 9223372036854775807" in reason


def test_hashed_ids_are_those_of_their_fields():
    shape = RowShape(slots=3, rows=1000, hashed=True)
    batch = Libffm(shape).parse([b"1 0:7:1 1:7:1", b"0 4:9:1"]).batch
    expected = hash_integers(np.array([7, 7, 9]), np.array([0, 1, 4]), rows=1000).tolist()
    assert batch.ids.tolist() == [[*expected[:2], 0], [expected[2], 0, 0]]
    unsalted = Dummy(shape).parse([b"1 7"]).batch
    assert unsalted.ids[0, 0] == hash_integers(np.array([7]), rows=1000)[0]


def test_binary_labels_are_zero_and_one():
    batch = Dummy(RowShape(1, binary_labels=True)).parse([b"-1 3", b"1 3", b"0 3", b"5 3"]).batch
    assert batch.labels.tolist() == [0, 1, 0, 1]


BAD = [
    (Libsvm, b"1 0:1", "index 0, but libsvm counts from 1"),
    (Libsvm, b"1 3", "a feature must be index:value, got '3'"),
    (Libsvm, b"1 -3:1", "index -3 is negative"),
    (Libsvm, b"1 3:nan", "the value of index 3 is nan"),
    (Libsvm, b"1 3:-inf", "the value of index 3 is -inf"),
    (Libsvm, b"1 3:1e39", "too large for a 32-bit float"),
    (Libsvm, b"1 3:", "the value of index 3 is missing"),
    (Libsvm, b"1 3:1:2", "must be a number, got '1:2'"),
    (Libsvm, b"3:1 4:1", "the label must be a number, got '3:1'"),
    (Libsvm, b"# only a comment", "the label is missing"),
    (Libsvm, b"nan 3:1", "the label is nan"),
    (Libsvm, b"1 qid:x 3:1", "qid must be an integer"),
    (Libsvm, b"1 1:1 2:1 3:1 4:1", "it has 4 features and data.slots is 3"),
    (Libsvm, b"1 101:1", "id 100 is out of range, ids are 0 to 99"),
    (Libsvm, b"1 3:1\x00", "must be a number, got '1\\x00'"),
    (Libffm, b"1 3:1", "a feature must be field:id:value, got '3:1'"),
    (Libffm, b"1 5:3:1", "field 5 is out of range, fields are 0 to 4; write data.field_count=6"),
    (Libffm, b"1 1:3:x", "the value of id 3 must be a number, got 'x'"),
    (Libffm, b"1 1 3 1", "a feature must be field:id:value, got '1'"),
    (Libffm, b"1 1: 3:1", "a feature must be field:id:value, got '1:'"),
    (Dummy, b"1 2.5", "id must be an integer"),
    (Dummy, b"1 100", "id 100 is out of range"),
    (Dummy, b"1 3:1", "id must be an integer"),
    (Dummy, b"x 3", "the label must be a number, got 'x'"),
    (Dummy, b"1 \xff\xfe", "got '\\xff\\xfe'"),
]


@pytest.mark.parametrize(("form", "line", "reason"), BAD)
def test_a_bad_line_is_told_and_harms_no_other(form, line, reason):
    good = {Libsvm: b"1 3:1", Libffm: b"1 1:2:1", Dummy: b"1 2"}[form]
    shape = RowShape(slots=3, rows=100, field_count=5)
    parsed = form(shape).parse([good, line, good, good])
    ((row, found),) = parsed.bad
    assert row == 1
    assert reason in found
    assert parsed.batch.weights.tolist() == [1, 0, 1, 1]
    assert parsed.batch.ids[:, 0].tolist() == [2, 0, 2, 2]
    assert parsed.batch.values[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("form", [Libsvm, Libffm, Dummy])
def test_the_two_readers_of_a_format_agree(form):
    make = {
        Libsvm: lambda draw: f"{draw.randrange(1, 99)}:{value(draw)}",
        Libffm: lambda draw: f"{draw.randrange(5)}:{draw.randrange(99)}:{value(draw)}",
        Dummy: lambda draw: str(draw.randrange(99)),
    }[form]
    reader = form(RowShape(slots=9, rows=100, hashed=True, field_count=5))
    lines = some_lines(make, count=100, seed=3)
    together = reader.parse(lines).batch
    for row, line in enumerate(lines):
        alone = reader._single(line)
        for name in ("ids", "values", "fields"):
            if (array := getattr(alone, name)) is not None:
                assert array[0].tolist() == getattr(together, name)[row].tolist()
