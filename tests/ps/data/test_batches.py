"""Every sample is read once, in an order that only data and seed decide."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from shardpar.errors import DataError
from shardpar.ps.data import files
from shardpar.ps.data.batches import Process, eval_batches, train_batches
from shardpar.ps.data.open import open_data, open_parts
from shardpar.ps.data.options import SparseDataOptions


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(files, "UNIT_BYTES", 256)


def options_of(made, **changes):
    return SparseDataOptions(**vars(made) | changes)


def ids(batches):
    found = [batch.ids[batch.weights > 0, 0] for batch in batches]
    return np.concatenate(found).tolist() if found else []


def run(options, batch, **more):
    return list(train_batches(open_data(options), options, batch, epochs=1, **more))


@pytest.mark.parametrize("shuffle", [0, 1, 50, 10_000])
@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_each_epoch_has_every_sample_once(libffm_file, shuffle, batch):
    options = options_of(libffm_file(203), shuffle=shuffle)
    batches = run(options, batch)
    found = ids(batches)
    assert sorted(found) == list(range(203))
    assert (found == list(range(203))) == (shuffle == 0)
    assert all(len(each) == batch for each in batches)
    assert sum(int(each.weights.sum()) for each in batches) == 203


def test_the_order_depends_on_seed_and_epoch_but_not_on_the_batch(libffm_file):
    options = options_of(libffm_file(100), shuffle=30)
    first = ids(run(options, 7))
    assert ids(run(options, 32)) == first
    assert ids(run(options_of(options, seed=1), 7)) != first
    batches = train_batches(open_data(options), options, 10, epochs=2)
    both = ids(batches)
    assert both[:100] == first
    assert both[100:] != first
    assert sorted(both[100:]) == sorted(first)


def test_shuffling_moves_samples_far(libffm_file):
    order = np.array(ids(run(options_of(libffm_file(2000), shuffle=500), 50)))
    assert np.abs(order - np.arange(2000)).mean() > 400


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 5, 13, 14, 20])
def test_a_run_goes_on_exactly_where_it_stopped(libffm_file, tmp_path, compressed, stop):
    options = options_of(libffm_file(100), shuffle=30)
    if compressed:
        path = tmp_path / "some.ffm.gz"
        path.write_bytes(gzip.compress((tmp_path / "some.ffm").read_bytes()))
        options = options_of(options, path=str(path))
    whole = train_batches(open_data(options), options, 7, epochs=2)
    before = [next(whole) for _ in range(stop)]
    position = json.loads(json.dumps(whole.position))
    rest = ids(whole)
    again = train_batches(open_data(options), options, 7, epochs=2)
    again.restore(position)
    assert ids(again) == rest
    other = train_batches(open_data(options), options, 12, epochs=2)
    other.restore(position)
    assert ids(other) == rest
    assert sorted(ids(before) + rest) == sorted(list(range(100)) * 2)


@pytest.mark.parametrize("shuffle", [0, 10, 30])
@pytest.mark.parametrize("batch", [5, 10, 16])
def test_after_whichever_batch_it_stopped(libffm_file, shuffle, batch):
    """At the end of a window, too, where windows and batches meet."""
    options = options_of(libffm_file(100), shuffle=shuffle)
    whole = train_batches(open_data(options), options, batch, epochs=2)
    positions = [whole.position]
    found = []
    for each in whole:
        found.append(each)
        positions.append(whole.position)
    for stop, position in enumerate(positions):
        again = train_batches(open_data(options), options, batch, epochs=2)
        again.restore(position)
        assert ids(again) == ids(found[stop:]), (stop, position)


def test_processes_share_each_batch(libffm_file):
    options = options_of(libffm_file(101), shuffle=30)
    alone = run(options, 12)
    parts = [run(options, 12, process=Process(index, 3)) for index in range(3)]
    assert {len(part) for part in parts} == {len(alone)}
    for step, batch in enumerate(alone):
        joined = np.concatenate([part[step].ids for part in parts])
        assert joined.tolist() == batch.ids.tolist()
        weights = np.concatenate([part[step].weights for part in parts])
        assert weights.tolist() == batch.weights.tolist()


def test_a_run_goes_on_with_other_processes(libffm_file):
    options = options_of(libffm_file(101), shuffle=30)
    alone = train_batches(open_data(options), options, 12, epochs=1)
    next(alone)
    position = alone.position
    rest = ids(alone)
    parts = []
    for index in range(2):
        part = train_batches(open_data(options), options, 4, process=Process(index, 2), epochs=1)
        part.restore(position)
        parts.append(list(part))
    joined = [row for pair in zip(*parts, strict=True) for row in ids(pair)]
    assert joined == rest


def test_batches_cannot_be_dealt_unevenly(libffm_file):
    options = libffm_file(10)
    with pytest.raises(DataError, match="cannot be dealt evenly to 3 processes"):
        train_batches(open_data(options), options, 4, process=Process(0, 3))


def test_a_position_of_other_data_is_refused_and_changes_nothing(libffm_file):
    options = options_of(libffm_file(50), shuffle=10)
    batches = train_batches(open_data(options), options, 4)
    next(batches)
    position = batches.position
    for changed, message in [
        ({"format": "x"}, "was expected"),
        ({"seed": 9}, "data.seed=9"),
        ({"taken": -1}, "damaged"),
        ({"place": "0"}, "damaged"),
        ({"data": {}}, "not what the run began with"),
        ({"place": 10**6}, "beyond the data"),
    ]:
        with pytest.raises(DataError, match=message):
            batches.restore({**position, **changed})
    for other in (libffm_file(51), options_of(libffm_file(50), shuffle=11)):
        batches_of_other = train_batches(open_data(other), other, 4)
        with pytest.raises(DataError, match="not what the run began with"):
            batches_of_other.restore(position)
    assert batches.position == position


def damage(options, *numbers):
    path = Path(options.path)
    lines = path.read_text().split("\n")
    for number in numbers:
        lines[number - 1] = lines[number - 1].replace("7:0.5", "7:x")
    path.write_text("\n".join(lines))


def test_the_first_bad_line_stops_by_default(libffm_file):
    options = libffm_file(100)
    damage(options, 41)
    with pytest.raises(
        DataError, match=r"some.ffm:41: the value of id 7 must be a number, got 'x'"
    ):
        run(options, 10)


def test_bad_lines_below_the_share_are_left_out_and_counted(libffm_file):
    options = options_of(libffm_file(100), shuffle=0, bad_share=0.03)
    damage(options, 5, 41)
    batches = eval_batches(open_data(options), options, 10)
    found, reports = [], []
    for batch in batches:
        found.append(batch)
        reports.append(batches.bad.report())
    assert ids(found) == [n for n in range(100) if n not in (4, 40)]
    assert found[0].weights.tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    assert found[0].samples[4] == -1
    assert "2 of 100 lines were left out" in reports[-1]
    assert "some.ffm:5: " in reports[-1]
    assert "some.ffm:41: " in reports[-1]


def test_more_bad_lines_than_the_share_are_an_error(libffm_file):
    options = options_of(libffm_file(100), bad_share=0.03)
    damage(options, 5, 41, 60, 99)
    with pytest.raises(DataError, match=r"4 of 100 lines cannot be read, and data.bad_share=0.03"):
        run(options, 10)


def test_parts_have_the_same_slots(tmp_path):
    (tmp_path / "train.svm").write_text("1 1:1\n0 2:1 3:1\n")
    (tmp_path / "test.svm").write_text("1 1:1 2:1 3:1\n")
    options = SparseDataOptions(
        path=str(tmp_path / "train.svm"), eval_path=str(tmp_path / "test.svm")
    )
    train, test = open_parts(options)
    assert train.shape.slots == test.shape.slots == 3


def test_blank_lines_are_no_samples_and_the_last_needs_no_end(tmp_path):
    path = tmp_path / "some.dummy"
    path.write_bytes(b"\n1 3\r\n \n0 4\n\n\n1 5")
    options = SparseDataOptions(path=str(path), format="dummy", shuffle=0)
    assert ids(run(options, 2)) == [3, 4, 5]
