import contextlib
import json
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from shardpar.errors import DataError
from shardpar.train.corpus import Corpus, read_corpus
from shardpar.train.options import DataOptions


def documents(source, path, field="text"):
    corpus = read_corpus(DataOptions(source=source, path=str(path), field=field))
    return list(corpus.documents())


def refusal(source, path, field="text"):
    with pytest.raises(DataError) as caught:
        documents(source, path, field)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(path, data):
    path.write_bytes(data)
    return path


def table(path, values, kind=None, column="text"):
    parquet.write_table(pa.table({column: pa.array(values, kind)}), path)
    return path


texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=8)


def test_pydoc_is_all_topics_in_sorted_order():
    from pydoc_data.topics import topics

    corpus = read_corpus(DataOptions())
    assert list(corpus.documents()) == [topics[name] for name in sorted(topics)]
    assert (corpus.name, corpus.files) == ("pydoc", ())
    assert corpus.utf8.size > 400_000
    assert not corpus.utf8.flags.writeable


def test_text_files_of_a_pattern_are_sorted_and_kept_as_they_are(tmp_path):
    written(tmp_path / "b.txt", b"zwei\r\n")
    written(tmp_path / "a.txt", "\ufeffeins \U0001f600".encode())
    (tmp_path / "c.txt").mkdir()
    corpus = read_corpus(DataOptions(source="text", path=str(tmp_path / "*.txt")))
    assert list(corpus.documents()) == ["eins \U0001f600", "zwei\r\n"]
    assert corpus.files == (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))


def test_a_file_whose_name_looks_like_a_pattern_is_found(tmp_path):
    assert documents("text", written(tmp_path / "a[1].txt", b"one")) == ["one"]


def test_jsonl_rows_are_documents(tmp_path):
    rows = [{"text": "a\nb", "n": 1}, {"text": ""}, {"n": 2, "text": "é\ud83d\ude00"}]
    body = "\ufeff" + "\r\n".join(json.dumps(row) for row in rows) + "\n\n"
    path = written(tmp_path / "rows.jsonl", body.encode())
    assert documents("jsonl", path) == ["a\nb", "é\U0001f600"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_parquet_rows_are_documents(tmp_path, kind):
    assert documents("parquet", table(tmp_path / "t.parquet", ["a", "", "é"], kind)) == ["a", "é"]


def test_parquet_dictionary_columns_are_text_too(tmp_path):
    values = pa.array(["a", "b", "a"]).dictionary_encode()
    parquet.write_table(pa.table({"body": values}), tmp_path / "t.parquet")
    assert documents("parquet", tmp_path / "t.parquet", field="body") == ["a", "b", "a"]


@settings(deadline=None)
@given(texts, st.floats(0, 1, exclude_max=True))
def test_split_shares_nothing_and_loses_nothing(documents, fraction):
    corpus = Corpus.of(documents)
    whole = "".join(documents)
    train, evaluation = corpus.split(fraction)
    assert "".join(train.documents()) + "".join(evaluation.documents()) == whole
    assert train.text + evaluation.text == whole
    assert abs(evaluation.utf8.size - fraction * corpus.utf8.size) <= 4
    for part in (train, evaluation):
        assert all(np.diff([0, *part.ends]) > 0)


@settings(deadline=None)
@given(texts, st.integers(4, 30))
def test_pieces_are_the_documents_cut(documents, limit):
    rebuilt, current = [], ""
    for piece, last in Corpus.of(documents).pieces(limit):
        assert 0 < len(piece.encode()) <= limit
        current += piece
        if last:
            rebuilt.append(current)
            current = ""
    assert rebuilt == [document for document in documents if document]
    assert current == ""


def test_long_files_are_checked_across_reading_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("shardpar.train.corpus._READ_BYTES", 5)
    good = "aé€\U0001f600\n" * 20
    assert documents("text", written(tmp_path / "a", good.encode())) == [good]
    bad = written(tmp_path / "b", good.encode() + b"x\xffy")
    assert "line 21: it is not UTF-8 text (byte 0xff)" in refusal("text", bad)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no text"),
        (b"\xef\xbb\xbf", "holds no text"),
        (b"ok\nna\xefve", "line 2: it is not UTF-8 text (byte 0xef); convert the file"),
        ("hi".encode("utf-16"), "looks like UTF-16"),
        (b"\x1f\x8b\x08\x00", "gzip-compressed; unpack it"),
        ("é".encode()[:1], "line 1: it is not UTF-8 text"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path, data, said):
    message = refusal("text", written(tmp_path / "x.txt", data))
    assert "x.txt" in message
    assert said in message


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no text"),
        (b'{"text":""}\n', "holds no text"),
        (b'{"text": "a"}\n{oops}', "line 2: it is not JSON (column 2"),
        (b'\n\n["a"]', 'line 3: an object such as {"text": ...} was expected, got a list'),
        (b'{"Text": "a"}', "there is no field 'text'; did you mean data.field=Text?"),
        (b'{"b": 1, "c": 2}', "there is no field 'text'; it has b, c; write data.field=NAME"),
        (b'{"text": null}', "line 1: field 'text' holds null, text was expected"),
        (b'{"text": true}', "holds a truth value"),
        (b'{"text": 1.5}', "holds a number"),
        (b'{"text": {}}', "holds an object"),
        (b'{"text": "\\ud800"}', "holds half a surrogate pair (\\ud800)"),
        (b'{"text": "a"}\n{"text": "\xff"}', "line 2: it is not UTF-8 text (byte 0xff)"),
        (b"[" * 100_000, "line 1: its JSON cannot be parsed"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 1: its JSON cannot be parsed"),
    ],
)
def test_bad_jsonl_rows_are_named(tmp_path, data, said):
    message = refusal("jsonl", written(tmp_path / "x.jsonl", data))
    assert "x.jsonl" in message
    assert said in message


@pytest.mark.parametrize(
    ("values", "kind", "column", "said"),
    [
        (["a", None], None, "text", "row 2: field 'text' holds null"),
        ([1], None, "text", "column 'text' holds int64, text was expected"),
        ([b"a"], None, "text", "column 'text' holds binary"),
        (["a"], None, "texts", "there is no column 'text'; did you mean data.field=texts?"),
        ([], pa.string(), "text", "holds no text"),
    ],
)
def test_bad_parquet_columns_are_named(tmp_path, values, kind, column, said):
    message = refusal("parquet", table(tmp_path / "x.parquet", values, kind, column))
    assert "x.parquet" in message
    assert said in message


def test_bad_utf8_in_parquet_names_the_row(tmp_path):
    ends = np.array([0, 1, 2], np.int32)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"a\xff")]
    values = pa.Array.from_buffers(pa.string(), 2, buffers)
    assert "row 2" in refusal("parquet", table(tmp_path / "x.parquet", values))


def test_a_damaged_parquet_file_never_gives_a_traceback(tmp_path):
    path = table(tmp_path / "x.parquet", ["some text", "more"])
    good = path.read_bytes()
    for at in range(4, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        with contextlib.suppress(DataError):
            documents("parquet", path)
    assert "not a readable Parquet file" in refusal("parquet", written(path, good[:40]))


def test_duplicate_columns_are_refused(tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    parquet.write_table(twice, tmp_path / "x.parquet")
    assert "2 columns are called 'text'" in refusal("parquet", tmp_path / "x.parquet")


def test_paths_that_name_no_file_are_refused(tmp_path):
    assert "matches no regular file" in refusal("text", tmp_path / "none.txt")
    assert "is a directory; write data.path=" in refusal("jsonl", tmp_path)
    assert "matches no regular file" in refusal("text", "/dev/null")
    for strange in ("a\0b", "x" * 5000):
        refusal("text", strange)
    with pytest.raises(DataError, match=r"data\.path is not set"):
        read_corpus(DataOptions(source="text"))
    with pytest.raises(DataError, match=r"source=pydoc reads no file"):
        read_corpus(DataOptions(path="x.txt"))


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def denied(self, *_):
        raise PermissionError(13, "Permission denied")

    path = written(tmp_path / "x", b"text")
    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    monkeypatch.setattr("pathlib.Path.open", denied)
    for source in ("text", "jsonl"):
        assert "x: it cannot be read (Permission denied)" in refusal(source, path)


def test_missing_modules_say_what_to_do(tmp_path, monkeypatch):
    path = table(tmp_path / "x.parquet", ["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'shardpar[parquet]'" in refusal("parquet", path)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"write data\.source=text data\.path=FILE"):
        read_corpus(DataOptions())
