"""Interleaved pipelines in the search: taken where they play faster and fit, bounded truly."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from shardpar.errors import PlanError
from shardpar.planner.cost import plan_cost
from shardpar.planner.interleave import interleaved_bound_s
from shardpar.planner.options import SearchOptions
from shardpar.planner.pipeline import Problem
from shardpar.planner.search import search
from shardpar.planner.setting import Workload
from shardpar.spec.check import check
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.select import selector
from shardpar.spec.text import plan_from_text, plan_to_text
from tests.planner.cases import cluster_of, gpt

WORK = Workload(16)
HOSTS = cluster_of(4, hosts=2)
CHOICES = (
    {}, {"fsdp": ("a",)}, {"tensor": ("a",)}, {"zero1": ("a",)}, {"recompute": "full"},
)  # fmt: skip


def every_interleaved(graph, cluster, work, groups):
    """Plans of all divisions and micro-batches, one strategy for all layers."""
    size = cluster.num_devices // groups
    names = [layer.name for layer in graph.layers]
    for chosen in CHOICES if size > 1 else CHOICES[:1] + CHOICES[-1:]:
        for inner in itertools.combinations(range(1, len(names)), 2 * groups - 1):
            stages = tuple(
                Stage(
                    tuple(range(n % groups * size, (n % groups + 1) * size)),
                    Mesh.factored(size),
                    (LayerStrategy(selector(names[first:end]), **chosen),),
                )
                for n, (first, end) in enumerate(itertools.pairwise((0, *inner, len(names))))
            )
            for microbatch in (1, 2, 4, 8):
                if work.global_batch % (microbatch * groups) == 0:
                    yield Plan(cluster.name, work.global_batch, (
                        Pipeline(work.global_batch, microbatch, stages, "interleaved"),
                    ))  # fmt: skip


@pytest.mark.parametrize(
    ("cluster", "groups"), [(cluster_of(2), 2), (cluster_of(4), 2), (cluster_of(3), 3)]
)
def test_no_interleaved_plan_beats_the_bound(cluster, groups):
    graph, work, best_s = gpt(), Workload(8 * groups), float("inf")
    for plan in every_interleaved(graph, cluster, work, groups):
        try:
            check(plan, graph, cluster)
        except PlanError:
            continue
        best_s = min(best_s, plan_cost(plan, graph, cluster, work).step_s)
    problem = Problem(graph, cluster, work, SearchOptions())
    bound_s = interleaved_bound_s(problem, several=False)
    assert interleaved_bound_s(problem, several=True) <= bound_s <= best_s
    # And it says something: uneven layers are most of what it leaves out.
    assert bound_s > 0.6 * best_s


def test_the_search_interleaves_where_that_plays_faster():
    without = search(gpt(), HOSTS, WORK, SearchOptions(interleave=False))
    found = search(gpt(), HOSTS, WORK)
    (pipeline,) = found.plan.pipelines
    assert (pipeline.schedule, pipeline.chunks, pipeline.num_groups) == ("interleaved", 2, 2)
    assert found.simulated_s < without.simulated_s * 0.95
    assert found.description.endswith(", interleaved")
    check(found.plan, gpt(), HOSTS)
    assert found.cost == plan_cost(found.plan, gpt(), HOSTS, WORK)
    peaks = [stage.peak_bytes for stage in pipeline.stages]
    assert peaks == [price.peak_bytes for price in found.cost.stages]
    assert plan_from_text(plan_to_text(found.plan)) == found.plan
    objective = found.plan.objective
    assert objective.step_s == found.cost.step_s
    # The bound holds for both kinds of plans.
    bound_s = interleaved_bound_s(Problem(gpt(), HOSTS, WORK, SearchOptions()), several=False)
    assert objective.lower_bound_s <= min(bound_s, without.plan.objective.lower_bound_s)
    assert objective.gap > 0


def test_what_does_not_fit_interleaved_is_left_as_it_is():
    """Micro-batches in flight are more: below what they need, the plan is that without."""
    peak = max(stage.peak_bytes for stage in search(gpt(), HOSTS, WORK).plan.pipelines[0].stages)
    for share in (1.0, 0.98):
        kind = replace(HOSTS.kinds[0], memory_bytes=peak * share)
        small = replace(HOSTS, kinds=(kind,))
        found = search(gpt(), small, WORK, SearchOptions(memory_fraction=1.0))
        for pipeline in found.plan.pipelines:
            assert all(stage.peak_bytes <= peak * share for stage in pipeline.stages)


@pytest.mark.parametrize(
    "options",
    [
        SearchOptions(interleave=False),
        SearchOptions(rescore=1),
        SearchOptions(stages=2),
        SearchOptions(fix="head recompute=none"),
    ],
)
def test_what_is_pinned_is_not_interleaved(options):
    found = search(gpt(), HOSTS, WORK, options)
    assert [pipeline.schedule for pipeline in found.plan.pipelines] == ["1f1b"]
