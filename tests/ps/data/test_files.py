"""Files are found, refused in words, and every line comes out of them once."""

from __future__ import annotations

import gzip
import os

import numpy as np
import pytest

from shardpar.errors import DataError
from shardpar.ps.data import files, source
from shardpar.ps.data.batches import eval_batches
from shardpar.ps.data.files import find_files, line_blocks, line_number, units_of
from shardpar.ps.data.open import open_data
from shardpar.ps.data.options import SparseDataOptions

LINES = [b"1 1:%d %s" % (n, b"x" * (n % 50)) for n in range(500)]


def lines_of(path):
    found = find_files(str(path))
    units = units_of(found)
    blocks = [block for unit in units for block in line_blocks(found[unit.file], unit, 0)]
    return units, blocks


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 1000, 10**6])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_units_of_any_size_have_every_line_once(tmp_path, monkeypatch, unit_bytes, end):
    monkeypatch.setattr(files, "UNIT_BYTES", unit_bytes)
    content = b"\n".join(LINES[:60]) + end
    path = tmp_path / "plain"
    path.write_bytes(content)
    _, blocks = lines_of(path)
    assert b"".join(block for _, block in blocks) == content
    for start, block in blocks:
        assert content[start : start + len(block)] == block
        assert start == 0 or content[start - 1] == ord("\n")


@pytest.mark.parametrize("unit_bytes", [7, 1000, 10**6])
def test_compressed_files_have_every_line_once(tmp_path, monkeypatch, unit_bytes):
    monkeypatch.setattr(files, "UNIT_BYTES", unit_bytes)
    content = b"\n".join(LINES)
    path = tmp_path / "named_otherwise"
    path.write_bytes(gzip.compress(content))
    (unit,), blocks = lines_of(path)
    assert b"".join(block for _, block in blocks) == content
    (file,) = find_files(str(path))
    start = blocks[len(blocks) // 2][0]
    again = list(line_blocks(file, unit, start))
    assert again == blocks[len(blocks) // 2 :]
    assert line_number(file, start) == content[:start].count(b"\n") + 1


def refuses(path, message):
    with pytest.raises(DataError, match=message):
        find_files(str(path))


def test_what_cannot_be_read_is_told(tmp_path):
    refuses(tmp_path / "none", "there is no file .*none")
    refuses(tmp_path / "*.svm", "there is no file")
    refuses(tmp_path, r"is a directory; name a file, or the files in it: data.path=.*\*")
    for name, content, message in [
        ("empty", b"", "is empty"),
        ("blank", b" \n\n", "is empty"),
        ("empty.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.zip", b"PK\x03\x04abc", "zip archive"),
        ("a.zst", b"\x28\xb5\x2f\xfdabc", "zstd-compressed"),
        ("utf16", "1 3:1\n".encode("utf-16"), "looks like UTF-16"),
        ("head.gz", b"\x1f\x8b", "truncated"),
        ("bad.gz", b"\x1f\x8b" + b"x" * 50, "cannot be read|damaged"),
    ]:
        (tmp_path / name).write_bytes(content)
        refuses(tmp_path / name, message)
    if os.geteuid():
        (tmp_path / "secret").write_text("1 3:1")
        (tmp_path / "secret").chmod(0)
        refuses(tmp_path / "secret", "cannot be read: Permission denied")


def test_a_glob_reads_its_files_in_order(tmp_path):
    for name in ("b.svm", "a.svm", "c.txt"):
        (tmp_path / name).write_text("1 3:1\n")
    (tmp_path / "d.svm").mkdir()
    assert [os.path.basename(f.path) for f in find_files(str(tmp_path / "*.svm"))] == [
        "a.svm", "b.svm",
    ]  # fmt: skip


def test_a_truncated_gzip_file_is_told_with_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "UNIT_BYTES", 4096)
    rng = np.random.default_rng(0)
    lines = b"".join(b"1 %d:1\n" % n for n in rng.integers(1, 10**9, 20_000))
    whole = gzip.compress(lines)
    path = tmp_path / "cut.svm.gz"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    data = open_data(SparseDataOptions(path=str(path), slots=1))
    with pytest.raises(DataError, match=r"cut.svm.gz: after line 1\d{4}, .*truncated"):
        list(eval_batches(data, SparseDataOptions(), 64))


def test_a_damaged_gzip_file_is_told(tmp_path):
    whole = bytearray(gzip.compress(b"".join(b"1 %d:1\n" % (n * 7919) for n in range(1, 50_000))))
    whole[len(whole) // 2] ^= 0xFF
    path = tmp_path / "flipped.svm.gz"
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"flipped.svm.gz: .*(damaged|data.bad_share)"):
        list(eval_batches(open_data(SparseDataOptions(path=str(path), slots=1)),
                          SparseDataOptions(), 64))  # fmt: skip


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE_BYTES", 1000)
    monkeypatch.setattr(files, "UNIT_BYTES", 100)
    for name, content in (("long", b"1 " * 5000), ("long.gz", gzip.compress(b"1 " * 5000))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="is longer than"):
            lines_of(tmp_path / name)


def test_a_sample_is_located_by_file_and_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "UNIT_BYTES", 64)
    (tmp_path / "a.svm").write_text("1 3:1\n" * 30)
    (tmp_path / "b.svm").write_text("\n1 3:1\n\n" + "1 4:1\n" * 30)
    data = open_data(SparseDataOptions(path=str(tmp_path / "*.svm")))
    assert isinstance(data, source.TextSource)
    samples = np.concatenate(
        [piece.samples for unit in range(len(data.units)) for piece in data.pieces(unit, 0)]
    )
    assert np.unique(samples).size == samples.size == 61
    assert data.locate(int(samples[29])).endswith("a.svm:30")
    assert data.locate(int(samples[30])).endswith("b.svm:2")
    assert data.locate(int(samples[31])).endswith("b.svm:4")
