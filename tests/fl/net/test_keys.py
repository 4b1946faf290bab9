"""Certificates name one party, are private on disk, and are refused when they cannot work."""

from __future__ import annotations

import shutil
import stat

import pytest

from shardpar.errors import UserError
from shardpar.fl.net.keys import make_test_keys, party_of, read_keys


def test_a_party_reads_its_own_keys_and_nobody_else_may(tmp_path):
    make_test_keys(tmp_path / "pki", ["a", "b"])
    keys = read_keys(tmp_path / "pki", "a")
    assert party_of(keys.certificate) == "a"
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "pki").iterdir()} == {0o600}


def test_keys_are_replaced_only_when_asked(tmp_path):
    make_test_keys(tmp_path, ["a"])
    before = (tmp_path / "a.key").read_bytes()
    with pytest.raises(UserError, match="--force"):
        make_test_keys(tmp_path, ["a"])
    assert (tmp_path / "a.key").read_bytes() == before
    make_test_keys(tmp_path, ["a"], force=True)
    assert (tmp_path / "a.key").read_bytes() != before


@pytest.mark.parametrize("name", ["", "A", "a/b", "a b", "-a", "a.b", "x" * 64])
def test_a_name_that_is_no_label_is_refused(tmp_path, name):
    with pytest.raises(UserError):
        make_test_keys(tmp_path, [name])


def test_keys_that_cannot_work_are_refused_and_named(tmp_path):
    make_test_keys(tmp_path / "old", ["a"], valid_days=-1)
    with pytest.raises(UserError, match="expired"):
        read_keys(tmp_path / "old", "a")
    make_test_keys(tmp_path / "one", ["a", "b"])
    make_test_keys(tmp_path / "two", ["a", "b"])
    shutil.copy(tmp_path / "one" / "b.pem", tmp_path / "one" / "a.pem")
    with pytest.raises(UserError, match="the key of a is not the one of its certificate"):
        read_keys(tmp_path / "one", "a")
    shutil.copy(tmp_path / "one" / "b.key", tmp_path / "one" / "a.key")
    with pytest.raises(UserError, match="not the certificate of a"):
        read_keys(tmp_path / "one", "a")
    shutil.copy(tmp_path / "one" / "ca.pem", tmp_path / "two" / "ca.pem")
    with pytest.raises(UserError, match="not issued by"):
        read_keys(tmp_path / "two", "a")
    (tmp_path / "two" / "b.key").write_text("no key")
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "two", "b")
    with pytest.raises(UserError, match="shardpar fl keys"):
        read_keys(tmp_path / "none", "a")
