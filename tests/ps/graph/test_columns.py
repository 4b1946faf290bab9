"""Tables that are written: formats, whole or not at all, and wrong destinations."""

from __future__ import annotations

import csv
import os

import numpy as np
import pytest
from pyarrow import parquet

from shardpar.errors import UserError
from shardpar.ps.graph import columns
from shardpar.ps.graph.columns import write_columns

NAMES = np.array(["ann", 'b"ob', "cy,d"], object)
TABLE = {"node": NAMES, "pagerank": np.array([0.1, 1 / 3, 1e-300]), "core": np.arange(3)}


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_text_is_read_back_as_it_was(suffix, delimiter, tmp_path):
    path = tmp_path / f"out{suffix}"
    write_columns(path, TABLE)
    with open(path, newline="") as file:
        head, *rows = list(csv.reader(file, delimiter=delimiter))
    assert head == list(TABLE)
    assert [row[0] for row in rows] == NAMES.tolist()
    assert [float(row[1]) for row in rows] == TABLE["pagerank"].tolist()
    assert [int(row[2]) for row in rows] == [0, 1, 2]


def test_parquet_is_read_back_as_it_was_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "out.parquet"
    path.write_bytes(b"old")
    write_columns(path, TABLE)
    found = parquet.read_table(path)
    assert found.to_pydict() == {name: values.tolist() for name, values in TABLE.items()}
    assert [str(field.type) for field in found.schema] == ["string", "double", "int64"]
    assert os.listdir(tmp_path) == ["out.parquet"]


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    path = tmp_path / "out.csv"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(columns.csv, "write_csv", full)
    with pytest.raises(UserError, match=r"--out .*out.csv: No space left on device"):
        write_columns(path, TABLE)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.csv"]


def test_a_wrong_destination_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "dir.csv").mkdir()
    for name, message in (
        ("out", "has to end in .parquet, .csv or .tsv"),
        ("out.CSV", "has to end in .parquet, .csv or .tsv"),
        ("none/out.csv", "there is no directory"),
        ("dir.csv", "this is a directory"),
    ):
        with pytest.raises(UserError, match=message):
            columns.check_destination(tmp_path / name)
