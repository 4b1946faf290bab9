"""A log gives back what was acknowledged, or says that it cannot; never something else."""

from __future__ import annotations

import pytest

from shardpar.errors import CheckpointError
from shardpar.ps.log import RecordLog, read_records, read_snapshot, write_snapshot

PAYLOADS = [b"first", b"", b"\x00" * 9, b"last one"]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log"
    with RecordLog(path) as file:
        for payload in PAYLOADS:
            file.add(payload)
    return path


def test_records_come_back_in_order(log):
    assert list(read_records(log)) == PAYLOADS


def test_a_log_that_is_not_there_has_no_records(tmp_path):
    assert list(read_records(tmp_path / "none")) == []


def test_wherever_a_kill_cuts_the_file_whole_records_stay_and_more_can_follow(log, tmp_path):
    whole = log.read_bytes()
    for size in range(len(whole)):
        cut = tmp_path / f"cut{size}"
        cut.write_bytes(whole[:size])
        kept = list(read_records(cut))
        assert kept == PAYLOADS[: len(kept)]
        with RecordLog(cut, number=len(kept)) as file:
            file.add(b"more")
        assert list(read_records(cut)) == [*kept, b"more"]


def test_zeros_that_a_power_cut_left_are_cut_off(log):
    with open(log, "ab") as file:
        file.write(bytes(100))
    assert list(read_records(log)) == PAYLOADS
    assert list(read_records(log, closed=True)) == PAYLOADS


def test_every_flipped_byte_is_found(log):
    whole = bytearray(log.read_bytes())
    for at in range(len(whole)):
        whole[at] ^= 0x10
        log.write_bytes(whole)
        with pytest.raises(CheckpointError, match="damaged"):
            list(read_records(log))
        whole[at] ^= 0x10


def test_a_record_that_is_gone_from_the_middle_is_missed(tmp_path):
    path = tmp_path / "log"
    ends = []
    with RecordLog(path) as file:
        for payload in PAYLOADS:
            file.add(payload)
            ends.append(path.stat().st_size)
    whole = path.read_bytes()
    path.write_bytes(whole[: ends[0]] + whole[ends[1] :])
    with pytest.raises(CheckpointError, match="record 2 where 1 should be"):
        list(read_records(path))


def test_a_closed_log_does_not_end_in_the_middle(log):
    log.write_bytes(log.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends in the middle of a record"):
        list(read_records(log, closed=True))


@pytest.mark.parametrize("fsync", ["each", "second", "never"])
def test_records_are_in_the_file_when_add_returns(tmp_path, fsync):
    log = RecordLog(tmp_path / "log", fsync=fsync)
    log.add(b"here")
    # Not closed: what a process that is killed now leaves.
    assert list(read_records(tmp_path / "log")) == [b"here"]
    log.close()


def test_a_snapshot_is_whole_or_refused(tmp_path):
    path = tmp_path / "snapshot"
    write_snapshot(path, [b"a", b"bb"])
    assert read_snapshot(path) == [b"a", b"bb"]
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged"):
            read_snapshot(path)
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="damaged"):
            read_snapshot(path)
