"""CSV tables of a party, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from shardpar.errors import DataError
from shardpar.fl.vertical.tables import read_table

GOOD = "id,age,y,income\nb,30,1,2.5\n\na,NA,0,\n"


def read(tmp_path, text, **how):
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(path, id_column="id", **how)


def test_columns_labels_and_missing_numbers(tmp_path):
    table = read(tmp_path, "\ufeff" + GOOD, label_column="y")
    assert table.ids == ("b", "a")
    assert table.names == ("age", "income")
    np.testing.assert_array_equal(table.columns, [[30, 2.5], [np.nan, np.nan]])
    assert table.labels.tolist() == [1, 0]
    by_id = table.sorted_by_id()
    assert by_id.ids == ("a", "b")
    assert by_id.labels.tolist() == [0, 1]
    assert by_id.of_columns(("income",)).columns[1].tolist() == [2.5]
    assert read(tmp_path, GOOD).names == ("age", "y", "income")
    assert read(tmp_path, "id,x\n").columns.shape == (0, 1)


@pytest.mark.parametrize(
    ("text", "how", "words"),
    [
        ("id,x\na,1\nb,one\n", {}, "line 3 has 'one' in column x"),
        ("id,x\na,1,2\n", {}, "line 2 has 3 fields"),
        ("name,x\na,1\n", {}, "no column 'id'; it has name, x"),
        ("id,x\na,1\n", {"label_column": "y"}, "no column 'y'"),
        ("id,y\na,\n", {"label_column": "y"}, "line 2 has no label"),
        ("id,x,x\n", {}, "names a column twice"),
        (b"id,x\n\xff,1\n", {}, "not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_line(tmp_path, text, how, words):
    with pytest.raises(DataError, match=words):
        read(tmp_path, text, **how)


def test_files_and_columns_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "none.csv", id_column="id")
    with pytest.raises(DataError, match="has no column shoe_size"):
        read(tmp_path, GOOD).of_columns(("age", "shoe_size"))
