"""Pipelines over unequal devices against every combination, tried one by one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from shardpar.planner.cost import plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.pipeline import Problem, Shape, best_pipeline
from shardpar.planner.pipelines import best_combination
from shardpar.planner.setting import Workload
from shardpar.spec.check import check
from shardpar.spec.cluster import Hosts
from shardpar.spec.plan import Plan
from tests.planner.cases import cluster_of, gpt

BATCH = 8


def unequal(ratio: float):
    """Two hosts of one device each, the second so many times slower."""
    cluster = cluster_of(1, memory_bytes=1e9)
    fast = cluster.kinds[0]
    rates = tuple((dtype, rate / ratio) for dtype, rate in fast.matmul_flops)
    slow = replace(fast, name="slow", matmul_flops=rates, memory_bytes=8e8)
    hosts = (Hosts("unit", 1), Hosts("slow", 1))
    return replace(cluster, name="two", kinds=(fast, slow), hosts=hosts)


def best_of(problem: Problem, groups, sequences: int, pipelines: int) -> float:
    """The fastest pipeline on these groups, over every power-of-two micro-batch."""
    found = [
        best_pipeline(problem, Shape(groups, sequences, m, pipelines))
        for m in (1, 2, 4, 8)
        if sequences % m == 0
    ]
    return min((f.step_s for f in found if f is not None), default=math.inf)


def brute_force(problem: Problem) -> float:
    chains = [((0,),), ((1,),), ((0,), (1,)), ((1,), (0,))]
    alone = min(best_of(problem, groups, BATCH, 1) for groups in chains)
    shared = min(
        max(
            best_of(problem, ((0,),), share, 2),
            best_of(problem, ((1,),), BATCH - share, 2),
        )
        for share in range(1, BATCH)
    )
    return min(alone, shared)


@pytest.mark.parametrize("ratio", [1.0, 1.7, 3.0, 20.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_combination_is_the_best_of_all(ratio, dtype):
    cluster, work = unequal(ratio), Workload(BATCH, dtype)
    expected = brute_force(Problem(gpt(), cluster, work, SearchOptions()))
    found = best_combination(Problem(gpt(), cluster, work, SearchOptions()))
    assert found is not None
    assert found.step_s == pytest.approx(expected, rel=1e-9)
    assert found.lower_bound_s == pytest.approx(expected, rel=1e-9)
    plan = Plan("two", BATCH, found.pipelines)
    check(plan, gpt(), cluster)
    assert plan_cost(plan, gpt(), cluster, work).step_s == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("ratio", "epsilon"), list(itertools.product([1.7, 20.0], [0.02, 0.2])))
def test_a_bound_within_epsilon_is_a_true_bound(ratio, epsilon):
    cluster, work = unequal(ratio), Workload(BATCH)
    expected = brute_force(Problem(gpt(), cluster, work, SearchOptions()))
    found = best_combination(Problem(gpt(), cluster, work, SearchOptions(epsilon=epsilon)))
    assert found is not None
    assert found.lower_bound_s <= expected * (1 + 1e-9)
    assert expected * (1 - 1e-9) <= found.step_s <= expected / (1 - epsilon) * (1 + 1e-9)


def test_what_takes_too_long_is_not_returned():
    problem = Problem(gpt(), unequal(2.0), Workload(BATCH), SearchOptions())
    assert best_combination(problem, cutoff=1e-9) is None
