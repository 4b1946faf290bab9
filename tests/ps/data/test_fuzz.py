"""Whatever is in a file: batches come out of it, or a DataError."""

from __future__ import annotations

import gzip
import io
import itertools
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardpar.errors import DataError
from shardpar.ps.data.batches import train_batches
from shardpar.ps.data.open import open_data
from shardpar.ps.data.options import SparseDataOptions

draw = random.Random(0)
TEXTS = {
    "libsvm": "\n".join(f"{n % 2} qid:1 {n + 1}:0.5 {n + 9}:1e-3 # x" for n in range(30)),
    "libffm": "\n".join(f"{n % 2} 0:{n}:1 3:{n * 7}:0.25" for n in range(30)),
    "dummy": "\n".join(f"{n % 2} {n} {n * 31}" for n in range(30)),
    "criteo": "\n".join(
        "\t".join([str(n % 2), *(str(draw.randrange(-2, 99)) for _ in range(13)),
                   *(f"{draw.randrange(2**32):08x}" for _ in range(26))])
        for n in range(30)
    ),
    "csv": "label,site,price\n" + "\n".join(f'{n % 2},"s,{n}",{n}.5' for n in range(30)),
}  # fmt: skip
TEXTS = {name: text.encode() for name, text in TEXTS.items()}


def parquet_bytes():
    import pyarrow as pa
    from pyarrow import parquet as pq

    content = io.BytesIO()
    site = [f"s{n}" for n in range(30)]
    table = pa.table({"label": [n % 2 for n in range(30)], "site": site, "price": [0.5] * 30})
    pq.write_table(table, content, row_group_size=20, write_page_checksum=True)
    return content.getvalue()


SEEDS = {**TEXTS, "parquet": parquet_bytes(), "gz": gzip.compress(TEXTS["libsvm"], mtime=0)}
FORMATS = ["auto", *TEXTS, "parquet"]


def reads(path, content, form, bad_share, **more):
    """Reads all of a file; returns how many samples it had, None if it was refused."""
    path.write_bytes(content)
    options = SparseDataOptions(
        path=str(path), format=form, categorical=("site",), numeric=("price",), rows=2**20,
        bad_share=bad_share, shuffle=8, **more,
    )  # fmt: skip
    count = 0
    try:
        for batch in train_batches(open_data(options), options, 7, epochs=1):
            assert len(batch) == 7
            for array in (batch.values, batch.labels, batch.dense):
                assert array is None or np.isfinite(array).all()
            assert batch.ids.min(initial=0) >= 0
            assert batch.ids.max(initial=0) < 2**20
            count += int(batch.weights.sum())
    except DataError:
        return None
    return count


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "some file"


@pytest.mark.parametrize("form", [*TEXTS, "parquet"])
def test_the_files_to_be_damaged_are_right(path, form):
    assert reads(path, SEEDS[form], form, 0.0) == 30
    assert reads(path, SEEDS[form], "auto", 0.0) == 30


SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SETTINGS
@given(st.binary(max_size=300), st.sampled_from(FORMATS), st.sampled_from([0.0, 1.0]))
def test_random_bytes(path, content, form, bad_share):
    reads(path, content, form, bad_share)


PIECES = st.sampled_from(
    [b" ", b":", b"\n", b"\t", b",", b'"', b"-", b"nan", b"inf", b"1e999", b"\r", b"\0", b"#",
     b"qid:", b"99999999999999999999", b".", b"\xff\xfe", b"1:1:1:1", b"\n\n", b"1_0", b"+", b""]
)  # fmt: skip


@SETTINGS
@given(st.lists(PIECES, max_size=40), st.sampled_from(FORMATS))
def test_random_pieces_of_the_formats(path, pieces, form):
    reads(path, b"1 " + b"".join(pieces), form, 1.0)


@settings(SETTINGS, max_examples=60)
@given(st.data())
def test_good_files_with_a_few_bytes_changed(path, data):
    name = data.draw(st.sampled_from(sorted(SEEDS)))
    content = bytearray(SEEDS[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        gone = data.draw(st.integers(0, 3))
        content[at : at + gone] = data.draw(st.one_of(PIECES, st.binary(max_size=3)))
    form = data.draw(st.sampled_from(["auto", "libsvm" if name == "gz" else name]))
    count = reads(path, bytes(content), form, data.draw(st.sampled_from([0.0, 1.0])))
    assert count is None or count <= 45


@settings(SETTINGS, max_examples=60)
@given(st.sampled_from(sorted(SEEDS)), st.floats(0, 1))
def test_good_files_that_end_too_early(path, name, share):
    content = SEEDS[name]
    count = reads(path, content[: int(len(content) * share)], "auto", 1.0)
    assert count is None or count <= 30
    if name in ("parquet", "gz") and share < 0.99:
        assert count is None


@pytest.mark.parametrize(("form", "other"), list(itertools.permutations(TEXTS, 2)))
def test_one_format_read_as_another_is_refused(path, form, other):
    path.write_bytes(SEEDS[other])
    options = SparseDataOptions(
        path=str(path), format=form, label="label" if form != "csv" else "x", categorical=("site",)
    )
    with pytest.raises(DataError) as refused:
        open_data(options)
    if form != "csv":
        assert f"the file looks like {other}: write data.format={other}" in str(refused.value)
