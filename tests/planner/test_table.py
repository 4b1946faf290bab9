"""The bounds of a pipeline, cheap ones against dear ones and those against the pipeline itself."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from shardpar.planner.options import SearchOptions
from shardpar.planner.pipeline import Problem, Shape, best_pipeline, lower_bound
from shardpar.planner.pipelines import best_combination
from shardpar.planner.prices import floor_s, layer_cost
from shardpar.planner.setting import Workload
from shardpar.planner.stock import Stock
from shardpar.planner.table import Table
from tests.planner.cases import gpt
from tests.planner.test_pipelines import BATCH, unequal

TINY = 1e-9


def table_of(ratio, dtype="float32", **options):
    problem = Problem(gpt(), unequal(ratio), Workload(BATCH, dtype), SearchOptions(**options))
    return problem, Table(problem, Stock.of(problem.cluster))


@pytest.mark.parametrize(("ratio", "dtype"), [(1.0, "float32"), (3.0, "bfloat16")])
def test_every_level_bounds_the_next_and_the_last_the_pipeline(ratio, dtype):
    problem, table = table_of(ratio, dtype)
    for units, chains in table.chains.items():
        for sequences in (3, BATCH):
            floors = table._floors((units, sequences))
            many = 1 if sequences == BATCH else 2
            for (at, chain), (k, size) in itertools.product(
                enumerate(chains), enumerate(table.sizes.tolist())
            ):
                if sequences % size:
                    assert math.isinf(floors[at, k])
                    continue
                shape = Shape(chain, sequences, size, many)
                fastest, divided = table._fastest_s(shape), lower_bound(problem, shape)
                found = best_pipeline(problem, shape)
                assert floors[at, k] <= fastest * (1 + TINY)
                if found is not None:
                    assert fastest <= found.step_s * (1 + TINY)
                    assert divided <= found.step_s * (1 + TINY)
                    assert found.lower_bound_s <= found.step_s


@pytest.mark.parametrize("microbatch", [2, 4, 8])
def test_no_strategy_beats_the_floor(microbatch):
    problem, _ = table_of(2.0, "bfloat16")
    priced = problem.priced((0, 1), Shape(((0, 1),), 8, microbatch))
    for part, strategies in zip(priced.space.parts, priced.space.strategies, strict=True):
        floor = floor_s(part.cls, priced.space.setting)
        for strategy in strategies:
            cost = layer_cost(part.cls, strategy, priced.space.setting)
            assert cost.microbatch_s(0.5) >= floor * (1 - TINY)
            assert cost.microbatch_s(1.0) >= floor * (1 - TINY)


def test_bounds_only_rise_and_the_best_combination_by_them_is_found_from_the_last_one():
    _, table = table_of(1.7)
    before = dict(table.seconds)
    last = 0.0
    while True:
        step_s, items = table.fastest()
        # What was found from where the last one was is what is found from nothing.
        table.reached, reached = 0.0, table.reached
        assert table.fastest() == (step_s, items)
        assert step_s >= last * (1 - TINY)
        table.reached, last = reached, step_s
        risen = [table.tighten(item, math.inf) for item in items]
        if not any(risen):
            break
        assert all(table.seconds[item] >= before[item] for item in before)
        before = dict(table.seconds)
    found = [table.solve(item, math.inf) for item in items]
    assert max(f.step_s for f in found) >= last * (1 - TINY)


def test_others_near_a_solved_one_are_other_shapes_below_the_cutoff():
    problem, table = table_of(1.7)
    item = ((1, 1), BATCH)
    best = table.solve(item, math.inf)
    near = table.near(item, 4, best.step_s * 1.5)
    assert near
    assert [f.step_s for f in near] == sorted(f.step_s for f in near)
    assert all(best.step_s <= f.step_s < best.step_s * 1.5 for f in near)
    shapes = {
        (tuple(stage.devices for stage in f.pipeline.stages), f.pipeline.microbatch)
        for f in [best, *near]
    }
    assert len(shapes) == 1 + len(near)
    every = [
        found.step_s
        for chain, size in itertools.product(table.chains[1, 1], table.sizes.tolist())
        if (found := best_pipeline(problem, Shape(chain, BATCH, size))) is not None
    ]
    assert best.step_s == pytest.approx(min(every), rel=TINY)


@pytest.mark.parametrize("pipelines", [1, 2])
def test_the_number_of_pipelines_can_be_pinned(pipelines):
    problem, _ = table_of(1.7, pipelines=pipelines)
    found = best_combination(problem)
    assert len(found.pipelines) == pipelines


def test_what_fits_nowhere_is_never_the_best():
    problem, _ = table_of(2.0, memory_fraction=1e-6)
    assert best_combination(problem) is None


def test_bounds_are_numbers_where_a_kind_is_free():
    _, table = table_of(1.0)
    assert np.isfinite(list(table.seconds.values())).all()
