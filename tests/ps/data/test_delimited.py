"""Criteo and CSV rows are what a plain loop over Python's csv module gives."""

from __future__ import annotations

import csv
import math
import random

import numpy as np
import pytest

from shardpar.errors import DataError
from shardpar.ps.data.criteo import criteo
from shardpar.ps.data.csv_columns import csv_format
from shardpar.ps.data.hashing import hash_integers, hash_text
from shardpar.ps.data.options import SparseDataOptions

ROWS = 2**16


def criteo_lines(count=200, seed=0):
    draw = random.Random(seed)
    return [
        "\t".join(
            [str(draw.randrange(2))]
            + [draw.choice(["", str(draw.randrange(-3, 9)), str(draw.randrange(10**6))])
               for _ in range(13)]
            + [draw.choice(["", f"{draw.randrange(2**32):08x}"]) for _ in range(26)]
        ).encode()
        for _ in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("integers", ["log", "raw", "bucket"])
@pytest.mark.parametrize("end", [b"", b"\r"])
def test_criteo_is_what_a_plain_loop_reads(integers, end):
    lines = criteo_lines()
    parsed = criteo(ROWS, integers).parse([line + end for line in lines])
    assert parsed.bad == ()
    bucketed = integers == "bucket"
    for row, line in enumerate(lines):
        cells = line.split(b"\t")
        numbers = [int(cell or 0) for cell in cells[1:14]]
        texts = [
            hash_text(cell, field + 13 * bucketed, ROWS) for field, cell in enumerate(cells[14:])
        ]
        assert parsed.batch.labels[row] == int(cells[0])
        assert parsed.batch.ids[row, 13 * bucketed :].tolist() == texts
        if bucketed:
            kept = [bucket(cell) for cell in cells[1:14]]
            expected = hash_integers(np.array(kept), np.arange(13), ROWS)
            assert parsed.batch.ids[row, :13].tolist() == expected.tolist()
        else:
            wanted = numbers if integers == "raw" else [math.log1p(max(n, 0)) for n in numbers]
            np.testing.assert_allclose(parsed.batch.dense[row], wanted, rtol=1e-6)


def bucket(cell):
    if not cell:
        return 0
    number = int(cell)
    return 8 + int(math.log(number) ** 2) if number > 2 else max(number, -3) + 4


def test_buckets_of_an_integer_part_small_from_large_and_missing():
    assert len({bucket(str(n).encode()) for n in range(-3, 4)} | {bucket(b"")}) == 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda cells: cells[:-1], "it has 39 columns where 40 are expected"),
        (lambda cells: [*cells, b""], "it has 41 columns where 40 are expected"),
        (lambda cells: [b"", *cells[1:]], "the label is missing"),
        (lambda cells: [b"x", *cells[1:]], "the label must be a number, got 'x'"),
        (lambda cells: [cells[0], b"ab", *cells[2:]], "column I1 must be a number, got 'ab'"),
        (lambda cells: [cells[0], b"nan", *cells[2:]], "column I1 is nan"),
    ],
)
def test_a_bad_criteo_line_is_told_and_harms_no_other(change, reason):
    lines = criteo_lines(4)
    lines[1] = b"\t".join(change(lines[1].split(b"\t")))
    parsed = criteo(ROWS).parse(lines)
    ((row, found),) = parsed.bad
    assert row == 1
    assert reason in found
    assert parsed.batch.weights.tolist() == [1, 0, 1, 1]
    kept = criteo(ROWS).parse([lines[0], *lines[2:]]).batch
    assert parsed.batch.take(np.array([0, 2, 3])).ids.tolist() == kept.ids.tolist()


OPTIONS = SparseDataOptions(
    format="csv", label="click", categorical=("site", "app"), numeric=("price",), rows=ROWS
)
HEADER = b"app,price,click,site,unused"


def test_csv_is_what_the_csv_module_reads(tmp_path):
    draw = random.Random(5)
    path = tmp_path / "some.csv"
    names = HEADER.decode().split(",")
    rows = [
        [draw.choice(["a", "b,c", 'q"q', "", "ü"]), f"{draw.random():.5f}", str(draw.randrange(2)),
         f"s{draw.randrange(1000)}", draw.choice(["", "x"])]
        for _ in range(300)
    ]  # fmt: skip
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])
    header, *lines = path.read_bytes().split(b"\n")[:-1]
    parsed = csv_format(header, OPTIONS, "some.csv").parse(lines)
    assert parsed.bad == ()
    for place, row in enumerate(rows):
        cells = dict(zip(names, row, strict=True))
        ids = [hash_text(cells[n].encode(), f, ROWS) for f, n in enumerate(OPTIONS.categorical)]
        assert parsed.batch.ids[place].tolist() == ids
        assert parsed.batch.dense[place].tolist() == [float(np.float32(cells["price"]))]
        assert parsed.batch.labels[place] == int(cells["click"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a,,1,s,", "column price is missing; write data.missing=0"),
        (b"a,1,1,s", "it has 4 columns where 5 are expected"),
        (b'a,"1,1,s,', "its quotes do not match"),
        (b"a,inf,1,s,", "column price is inf"),
        (b"a,1,,s,", "the label is missing"),
    ],
)
def test_a_bad_csv_line_is_told(line, reason):
    parsed = csv_format(HEADER, OPTIONS, "some.csv").parse([b"a,1,1,s,", line])
    assert [row for row, _ in parsed.bad] == [1]
    assert reason in parsed.bad[0][1]


def test_missing_numbers_count_as_said():
    options = SparseDataOptions(**vars(OPTIONS) | {"missing": -1.0})
    parsed = csv_format(HEADER, options, "some.csv").parse([b"a,,1,s,", b"a, 2 ,1,s,"])
    assert parsed.bad == ()
    assert parsed.batch.dense.tolist() == [[-1], [2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "clik"}, r"no column 'clik' \(data.label\); did you mean 'click'\? the file has "
                            "app, price, click, site, unused"),
        ({"categorical": ("zone",)}, r"no column 'zone' \(data.categorical\)"),
        ({"numeric": ("cost",)}, r"no column 'cost' \(data.numeric\)"),
        ({"categorical": (), "numeric": ()}, "no column is said to be a feature"),
        ({"categorical": ("site", "click")}, "'click' is named twice"),
        ({"delimiter": "."}, "cannot stand between columns"),
    ],
)  # fmt: skip
def test_unknown_columns_are_told_with_those_there_are(changes, message):
    options = SparseDataOptions(**vars(OPTIONS) | changes)
    with pytest.raises(DataError, match=message):
        csv_format(HEADER, options, "some.csv")


def test_a_column_that_is_there_twice_is_told():
    with pytest.raises(DataError, match="'site' is there more than once"):
        csv_format(b"site,click,site", OPTIONS, "some.csv")


def test_without_a_header_columns_are_numbered():
    options = SparseDataOptions(
        header=False, label="0", categorical=("2",), numeric=("1",), delimiter=";", rows=ROWS
    )
    form = csv_format(b"1;2.5;x", options, "some.csv")
    assert form.header is None
    batch = form.parse([b"1;2.5;x"]).batch
    assert (batch.labels[0], batch.dense[0, 0], batch.ids[0, 0]) == (
        1,
        2.5,
        hash_text(b"x", 0, ROWS),
    )
