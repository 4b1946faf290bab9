"""What is written is read back the same."""

from __future__ import annotations

import numpy as np
import pytest

from shardpar.errors import DataError
from shardpar.ps.data.batch import SparseBatch, concatenate
from shardpar.ps.data.batches import eval_batches
from shardpar.ps.data.clicks import ClickLog
from shardpar.ps.data.hashing import hash_text
from shardpar.ps.data.open import open_data
from shardpar.ps.data.options import SparseDataOptions
from shardpar.ps.data.write import write

LOG = ClickLog(samples=50)


def read(path, **more):
    options = SparseDataOptions(path=str(path), **more)
    return concatenate(list(eval_batches(open_data(options), options, 25)))


@pytest.mark.parametrize("form", ["libsvm", "libffm", "dummy"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_clicks_are_read_back_the_same(tmp_path, form, ending):
    path = tmp_path / f"clicks.{form}{ending}"
    assert write(LOG.batches(20), path, form) == 50
    batch, wanted = read(path), LOG.batch(0, 50)
    assert batch.ids.tolist() == wanted.ids.tolist()
    assert batch.labels.tolist() == wanted.labels.tolist()
    assert batch.values.tolist() == wanted.values.tolist()
    if form == "libffm":
        assert batch.fields.tolist() == wanted.fields.tolist()


def test_parquet_and_csv_have_ids_in_columns(tmp_path):
    wanted = LOG.batch(0, 50)
    fields = tuple(f"f{n}" for n in range(39))
    write(LOG.batches(20), tmp_path / "clicks.parquet", "parquet")
    batch = read(tmp_path / "clicks.parquet", categorical=fields)
    assert batch.ids.tolist() == wanted.ids.tolist()
    write(LOG.batches(20), tmp_path / "clicks.csv", "csv")
    batch = read(tmp_path / "clicks.csv", categorical=fields, rows=2**20)
    expected = [[hash_text(b"%d" % i, f, 2**20) for f, i in enumerate(row)] for row in wanted.ids]
    assert batch.ids.tolist() == expected


def test_criteo_has_integers_and_hexadecimal_texts(tmp_path):
    wanted = LOG.batch(0, 50)
    write(LOG.batches(20), tmp_path / "clicks.tsv", "criteo")
    batch = read(tmp_path / "clicks.tsv", rows=2**20, integers="raw")
    assert batch.dense.tolist() == wanted.ids[:, :13].tolist()
    expected = [
        [hash_text(b"%08x" % i, f, 2**20) for f, i in enumerate(row[13:])] for row in wanted.ids
    ]
    assert batch.ids.tolist() == expected


def test_values_labels_queries_and_short_rows_survive(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 4)).astype(np.float32) * np.float32(10) ** rng.integers(
        -30, 30, (20, 4)
    )
    values[rng.random((20, 4)) < 0.3] = 0
    order = np.argsort(values == 0, axis=1, kind="stable")
    values = np.take_along_axis(values, order, axis=1).astype(np.float32)
    batch = SparseBatch(
        np.where(values != 0, rng.integers(0, 2**40, (20, 4)), 0), values,
        rng.normal(size=20), np.arange(20) % 5 > 0, np.arange(20), queries=np.arange(20),
    )  # fmt: skip
    assert write([batch], tmp_path / "some.svm", "libsvm") == 16
    again, kept = read(tmp_path / "some.svm", slots=4), batch.take(batch.weights > 0)
    for name in ("ids", "values", "labels", "queries"):
        assert getattr(again, name)[:16].tolist() == getattr(kept, name).tolist()


def test_what_cannot_be_written_is_told(tmp_path):
    narrow = SparseBatch(*(np.ones((1, 2)),) * 2, *(np.ones(1),) * 3)
    for form, message in [("libffm", "needs fields"), ("criteo", "has 39 features"),
                          ("tfrecord", "not written as")]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            write([narrow], tmp_path / "out", form)
    with pytest.raises(DataError, match="cannot be written"):
        write([narrow], tmp_path / "no" / "folder", "libsvm")
