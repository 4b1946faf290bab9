"""Parquet columns become the rows that a plain loop over them gives."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from shardpar.errors import DataError
from shardpar.ps.data import parquet
from shardpar.ps.data.batches import eval_batches, train_batches
from shardpar.ps.data.hashing import hash_integers, hash_text
from shardpar.ps.data.open import open_data
from shardpar.ps.data.options import SparseDataOptions

ROWS = 5000


def table(count=50):
    rng = np.random.default_rng(0)
    texts = [None if n % 7 == 0 else f"text {n % 11} of some length" for n in range(count)]
    return pa.table(
        {
            "user": rng.integers(0, ROWS, count),
            "site": pa.array(texts),
            "kind": pa.array(texts).dictionary_encode(),
            "price": rng.normal(size=count).astype(np.float32),
            "click": rng.integers(0, 2, count),
            "extra": pa.array([[1]] * count),
        }
    )


def options(path, **changes):
    base = {"path": str(path), "label": "click", "categorical": ("user", "site", "kind"),
            "numeric": ("price",), "rows": ROWS, "shuffle": 0}  # fmt: skip
    return SparseDataOptions(**base | changes)


def saved(path, content, **more):
    pq.write_table(content, path, **more)
    return path


def everything(made, batch=8):
    batches = eval_batches(open_data(made), made, batch)
    found = [each.take(each.weights > 0) for each in batches]
    return {
        name: np.concatenate([getattr(each, name) for each in found])
        for name in ("ids", "values", "labels", "dense")
    }


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("group", [7, 1000])
def test_columns_are_read_as_a_plain_loop_reads_them(tmp_path, hashed, group):
    content = table()
    made = options(saved(tmp_path / "some.parquet", content, row_group_size=group), hashed=hashed)
    found = everything(made)
    rows = content.to_pylist()
    for place, row in enumerate(rows):
        user = row["user"]
        if hashed:
            user = hash_integers(np.array([user]), np.array([0]), ROWS)[0]
        site, kind = (
            hash_text((row[name] or "").encode(), field, ROWS)
            for field, name in ((1, "site"), (2, "kind"))
        )
        assert found["ids"][place].tolist() == [user, site, kind]
        assert found["dense"][place, 0] == np.float32(row["price"])
        assert found["labels"][place] == row["click"]


def test_missing_integers_are_no_feature_or_an_id_of_their_own(tmp_path):
    content = pa.table({"click": [1, 0], "user": pa.array([None, 3], pa.int64())})
    path = saved(tmp_path / "some.parquet", content)
    made = SparseDataOptions(path=str(path), label="click", categorical=("user",), rows=10)
    data = open_data(made)
    batch = next(iter(eval_batches(data, made, 2)))
    assert batch.values.tolist() == [[0], [1]]
    hashed = SparseDataOptions(**vars(made) | {"hashed": True})
    batch = next(iter(eval_batches(open_data(hashed), hashed, 2)))
    assert batch.values.tolist() == [[1], [1]]
    assert batch.ids[0, 0] == hash_text(b"", 0, 10)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("user", -1, "id in column user is negative"),
        ("user", ROWS, "column user: id 5000 is out of range"),
        ("price", float("nan"), "column price is not a finite 32-bit float"),
        ("price", float("inf"), "column price is not a finite"),
        ("price", None, "column price is missing; write data.missing=0"),
        ("click", None, "the label is missing"),
    ],
)
def test_a_bad_row_is_told_and_harms_no_other(tmp_path, column, value, reason):
    content = table()
    cells = content.column(column).to_pylist()
    cells[33] = value
    place = content.schema.get_field_index(column)
    content = content.set_column(place, column, pa.array(cells))
    path = saved(tmp_path / "some.parquet", content, row_group_size=20)
    with pytest.raises(DataError, match=f"some.parquet: row 34: .*{reason}"):
        everything(options(path))
    found = everything(options(path, bad_share=0.03))
    assert len(found["labels"]) == 49


def test_wrong_files_and_columns_are_told(tmp_path):
    path = saved(tmp_path / "some.parquet", table())
    for changes, message in [
        ({"label": "clik"}, "no column 'clik'.*the file has user, site, kind, price, click, extra"),
        ({"categorical": ("extra",)}, "column 'extra' is list<.*a category of integers, text"),
        (
            {"categorical": (), "numeric": ("site",)},
            "column 'site' is string; a label or number must be",
        ),
        ({"format": "libsvm"}, "is a Parquet file; write data.format=parquet"),
    ]:
        with pytest.raises(DataError, match=message):
            open_data(options(path, **changes))
    (tmp_path / "text.parquet").write_text("1 3:1\n")
    with pytest.raises(DataError, match="is no Parquet file, or is damaged"):
        open_data(options(tmp_path / "text.parquet", format="parquet"))
    half = path.read_bytes()
    (tmp_path / "half.parquet").write_bytes(half[: len(half) // 2])
    with pytest.raises(DataError, match=r"half.parquet is no Parquet file, or is damaged"):
        open_data(options(tmp_path / "half.parquet"))


def test_a_flipped_byte_is_found_by_its_checksum(tmp_path):
    path = saved(tmp_path / "some.parquet", table(3000), write_page_checksum=True,
                 compression="none", use_dictionary=False)  # fmt: skip
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        everything(options(path))


def test_a_run_goes_on_within_a_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_PIECE_ROWS", 16)
    path = saved(tmp_path / "some.parquet", table(100), row_group_size=60)
    made = options(path, shuffle=20)
    whole = train_batches(open_data(made), made, 6, epochs=1)
    for _ in range(9):
        next(whole)
    position = whole.position
    rest = [batch.samples.tolist() for batch in whole]
    again = train_batches(open_data(made), made, 6, epochs=1)
    again.restore(position)
    assert [batch.samples.tolist() for batch in again] == rest


def test_several_files_must_have_the_same_columns(tmp_path):
    saved(tmp_path / "a.parquet", table(10))
    saved(tmp_path / "b.parquet", table(10).select(["click", "user", "site", "kind", "price"]))
    with pytest.raises(DataError, match=r"b.parquet: the columns are not those of .*a.parquet"):
        open_data(options(tmp_path / "*.parquet"))
