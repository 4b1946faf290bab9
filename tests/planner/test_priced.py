"""A space priced once against the same space priced for each step anew."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from shardpar.planner.options import SearchOptions
from shardpar.planner.pipeline import Problem, Shape
from shardpar.planner.priced import _useful
from shardpar.planner.setting import Workload
from shardpar.planner.space import space_of
from tests.planner.cases import cluster_of, gpt

DEVICES = tuple(range(4))
WORK = Workload(16, "bfloat16")


def problem_of(memory_bytes=16e9):
    return Problem(gpt(), cluster_of(4, 2, memory_bytes), WORK, SearchOptions())


def shape_of(count, pipelines=1, microbatch=4):
    return Shape((DEVICES,), microbatch * count, microbatch, pipelines)


@pytest.mark.parametrize(("count", "pipelines"), [(1, 1), (1, 2), (2, 1), (4, 2), (64, 2)])
def test_a_space_of_a_step_is_what_pricing_that_step_gives(count, pipelines):
    problem = problem_of()
    problem.priced(DEVICES, shape_of(3 if count > 1 else 1, 2))
    priced = problem.priced(DEVICES, shape_of(count, pipelines))
    assert len(problem._priced) == 1
    setting = replace(priced.space.setting, num_microbatches=count, pipelines=pipelines, known={})
    anew = space_of(gpt(), setting, problem.parts, Counter(), Counter(), {}, {})
    every = priced.of_step(count, pipelines, every=True)
    assert every.runs == anew.runs
    assert every.strategies == anew.strategies
    assert every.setting == setting
    least = [run.count * min(c.seconds for c in run.choices) for run in anew.runs]
    assert priced.least_s(count, pipelines).tolist() == least


@pytest.mark.parametrize(
    ("count", "in_flight", "share"), list(itertools.product([1, 8], [1, 3], [2, 5]))
)
def test_what_is_not_useful_is_not_missed(count, in_flight, share):
    priced = problem_of().priced(DEVICES, shape_of(count))
    every, useful = priced.of_step(count, 1, every=True), priced.of_step(count, 1)
    assert sum(map(len, useful.strategies)) < 0.6 * sum(map(len, every.strategies))
    layers = len(gpt().layers)
    limit = every.least_bytes(in_flight)[0, layers] * share / 2
    assert useful.least_bytes(in_flight)[0, layers] == every.least_bytes(in_flight)[0, layers]
    for first, end in ((0, layers), (1, 3), (layers - 2, layers)):
        expected = every.choose(first, end, limit, in_flight)
        found = useful.choose(first, end, limit, in_flight)
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.seconds == pytest.approx(expected.seconds, rel=1e-12)
            assert found.lower_bound_s == pytest.approx(expected.lower_bound_s, rel=1e-12)


def test_a_choice_is_beaten_only_by_one_of_its_border_that_is_no_worse_in_anything():
    figures = np.array(
        [
            (1.0, 1.0, 1.0, 4.0, 1.0, 1.0), (1.0, 1.0, 1.0, 5.0, 1.0, 1.0),
            (1.0, 1.0, 1.0, 5.0, 1.0, 0.5), (2.0, 2.0, 1.0, 5.0, 1.0, 1.0),
            (1.0, 1.0, 1.0, 4.0, 1.0, 1.0), (0.9, 1.1, 1.0, 4.0, 1.0, 1.0),
        ]
    ).T  # fmt: skip
    # The second is worse than the first, the fifth its equal; the last is faster but once a step.
    assert _useful(figures, np.array([0, 0, 0, 1, 0, 0])).tolist() == [0, 2, 3, 5]
