"""Results of coming steps: in order, no further ahead than asked, errors where they belong."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from shardpar.planner.dispatch import PipelineSpeed, dispatch
from shardpar.train.ahead import ahead


def test_results_are_those_of_map():
    assert list(ahead(lambda x: x * x, range(50), steps=3)) == [x * x for x in range(50)]
    assert list(ahead(abs, [])) == []


def test_it_is_ahead_by_so_many_steps_and_no_more():
    seen = []
    results = ahead(lambda x: seen.append(x) or x, itertools.count(), steps=3)
    assert seen == []
    assert next(results) == 0
    for _ in range(100):
        if len(seen) >= 4:
            break
        time.sleep(0.01)
    time.sleep(0.02)
    assert seen == [0, 1, 2, 3]
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]


@pytest.mark.parametrize("where", ["function", "items"])
def test_an_error_comes_where_its_result_would_have(where):
    def items():
        for i in range(5):
            if i == 2 and where == "items":
                raise RuntimeError("broken")
            yield i

    def function(i):
        if i == 2 and where == "function":
            raise RuntimeError("broken")
        return i

    results = ahead(function, items(), steps=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(RuntimeError, match="broken"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]


def test_coming_steps_are_dispatched_as_they_would_be_one_by_one():
    pipelines = [PipelineSpeed(64, 1.0, 0.01), PipelineSpeed(16, 2.0)]
    steps = [[n % 60 + 1 for n in range(k, 4 * k)] for k in range(1, 8)]
    found = list(ahead(lambda lengths: dispatch(lengths, pipelines), steps))
    assert found == [dispatch(lengths, pipelines) for lengths in steps]


def test_no_steps_ahead_is_refused():
    with pytest.raises(ValueError, match=r"^steps \(0\) must be 1 or more$"):
        ahead(abs, [], steps=0)
