"""Each worker's batches are its share of the global ones, whoever asks for them and when."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from shardpar.errors import DataError
from shardpar.ps.data.batches import train_batches
from shardpar.ps.data.open import open_parts
from shardpar.ps.data.options import SparseDataOptions
from shardpar.ps.loop import arrays_of
from shardpar.ps.worker_data import WorkerData, steps_in


@pytest.fixture(params=["file", "clicks"])
def options(request, tmp_path):
    if request.param == "clicks":
        return SparseDataOptions(format="clicks", samples=50, eval_samples=0)
    path = tmp_path / "some.ffm"
    path.write_text("".join(f"{i % 2} 0:{i}:1 1:{i + 1}:0.5\n" for i in range(50)))
    return SparseDataOptions(path=str(path), format="libffm", shuffle=20)


def global_batches(options, size, epochs):
    batches = train_batches(open_parts(options)[0], options, size, epochs=epochs)
    return [arrays_of(batch) for batch in batches]


def require_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x)


def test_the_shares_of_all_workers_are_the_global_batch(options):
    data = [WorkerData(options, 8, workers=2, per_epoch=7) for _ in range(2)]
    for step, expected in enumerate(global_batches(options, 8, epochs=2)):
        parts = [data[worker](worker, step) for worker in range(2)]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in expected}
        require_equal(joined, expected)


@pytest.mark.parametrize("step", [0, 3, 6, 7, 9])
def test_a_worker_that_starts_anew_finds_the_batch_it_had(options, step):
    data = WorkerData(options, 8, workers=2, per_epoch=7)
    seen = [data(1, at) for at in range(10)]
    require_equal(data(1, step), seen[step])
    require_equal(pickle.loads(pickle.dumps(data))(1, step), seen[step])


@pytest.mark.parametrize("size", [1, 7, 50, 64])
def test_steps_are_counted_without_parsing(options, size):
    assert steps_in(options, size) == len(global_batches(options, size, epochs=1))


def test_a_skipped_line_is_not_parsed_and_the_next_is_named(tmp_path):
    path = tmp_path / "bad.ffm"
    path.write_text("1 0:1:1\n1 nonsense\n0 0:2:1\n1 0:x:1\n")
    options = SparseDataOptions(path=str(path), format="libffm", shuffle=0)
    batches = train_batches(open_parts(options)[0], options, 1, epochs=1)
    assert batches.skip(2) == 2
    assert next(batches).ids.tolist() == [[2]]
    with pytest.raises(DataError, match=r"bad\.ffm:4"):
        next(batches)
    assert batches.skip() == 0


@pytest.mark.parametrize("first", [0, 47])
@pytest.mark.parametrize(("bad", "fails"), [(1, False), (4, True)])
def test_the_share_of_bad_lines_is_taken_of_epochs_that_were_seen_whole(
    tmp_path, first, bad, fails
):
    path = tmp_path / "some.ffm"
    lines = [f"1 0:{i}:1\n" for i in range(50 - bad)] + ["1 nonsense\n"] * bad
    path.write_text("".join(lines))
    options = SparseDataOptions(path=str(path), format="libffm", shuffle=0, bad_share=0.05)
    data = WorkerData(options, 1, workers=1, per_epoch=50)
    for step in range(first, 49):
        data(0, step)
    if fails and first == 0:
        with pytest.raises(DataError, match="4 of 50 lines cannot be read"):
            data(0, 49)
    else:
        data(0, 49)
