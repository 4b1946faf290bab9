"""Layers and micro-batches dealt anew, against all divisions and all shares one by one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import InfeasibleError, PlanError
from shardpar.planner.cost import plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.rebalance import _least_of_slowest, rebalanced
from shardpar.planner.setting import Workload
from shardpar.planner.traffic import border_axes
from shardpar.spec.check import check
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.select import selector, strategies
from tests.planner.cases import cluster_of
from tests.spec.values import gpt_like

GRAPH = gpt_like(blocks=4)
TINY = 1e-9


def heavy(graph: LayerGraph) -> LayerGraph:
    """The same, with enough arithmetic that compute decides."""
    return replace(
        graph,
        classes=tuple(
            replace(c, forward_flops=1e3 * c.forward_flops, backward_flops=1e3 * c.backward_flops)
            if c.name == "Block"
            else c
            for c in graph.classes
        ),
    )


HEAVY = heavy(GRAPH)


def pipeline_of(first, sizes, cuts, sequences, microbatch, ways, schedule="1f1b", rest=None):
    """Stages of some sizes with a strategy each, on devices from `first` on.

    With `rest`, that is the strategy of each stage's layers but the first.
    """
    names = [layer.name for layer in GRAPH.layers]
    stages = []
    for size, (start, end), way in zip(sizes, itertools.pairwise(cuts), ways, strict=True):
        mesh = Mesh.factored(size)
        middle = start + 1 if rest and end - start > 1 else end
        entries = [LayerStrategy(selector(names[start:middle]), **way(mesh.names))]
        if middle < end:
            entries.append(LayerStrategy(selector(names[middle:end]), **rest(mesh.names)))
        stages.append(Stage(tuple(range(first, first + size)), mesh, tuple(entries)))
        first += size
    return Pipeline(sequences, microbatch, tuple(stages), schedule)


WAYS = [
    lambda names: {},
    lambda names: {"recompute": "full"},
    lambda names: {"tensor": names[-1:]} if names else {},
    lambda names: {"fsdp": names},
]


@st.composite
def plans(draw, most_pipelines=2):
    """Plans over eight devices, some of them slow, and how much memory a device has."""
    pipelines, first, total = [], 0, 0
    for _ in range(draw(st.integers(1, most_pipelines))):
        sizes = draw(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3))
        sizes = sizes[: max(1, 4 - len(pipelines))]
        inner = draw(
            st.lists(st.integers(1, len(GRAPH.layers) - 1), min_size=len(sizes) - 1,
                     max_size=len(sizes) - 1, unique=True)
        )  # fmt: skip
        microbatch = 2 * draw(st.integers(1, 2))
        count = draw(st.integers(1, 3))
        ways = [draw(st.sampled_from(WAYS)) for _ in sizes]
        cuts = (0, *sorted(inner), len(GRAPH.layers))
        rest = draw(st.none() | st.sampled_from(WAYS))
        pipelines.append(
            pipeline_of(first, sizes, cuts, microbatch * count, microbatch, ways, rest=rest)
        )
        first, total = first + sum(sizes), total + microbatch * count
    speeds = draw(st.dictionaries(st.integers(0, 11), st.sampled_from([0.25, 0.5, 0.8])))
    memory = draw(st.sampled_from([16e9, 3e6, 2e6, 1.5e6]))
    cluster = cluster_of(6, 2, memory).slowed(speeds)
    return Plan("hand", total, tuple(pipelines)), cluster


def entries_of(stage, first, end):
    """The strategies of layers first to end as the rule says, found by looking at each layer."""
    own = strategies(stage, GRAPH)
    out = []
    for i in range(first, end):
        layer = GRAPH.layers[i]
        same = [
            (abs(j - i), j)
            for j, x in enumerate(GRAPH.layers)
            if x.name in own and x.class_name == layer.class_name
        ]
        every = [(abs(j - i), j) for j, x in enumerate(GRAPH.layers) if x.name in own]
        nearest = GRAPH.layers[min(same or every)[1]]
        out.append(replace(own[nearest.name], layers=layer.name))
    return tuple(out)


def brute_force(plan, graph, cluster, work, fraction):
    """The least step of all plans with the same groups, by the price of whole plans."""
    best = math.inf
    layers = len(graph.layers)
    for shares in itertools.product(*(range(0, plan.global_batch + 1, p.microbatch)
                                      for p in plan.pipelines)):  # fmt: skip
        if sum(shares) != plan.global_batch:
            continue
        active = [(p, share) for p, share in zip(plan.pipelines, shares, strict=True) if share]
        few = any(
            share // p.microbatch < min(len(p.stages), p.num_microbatches) for p, share in active
        )
        if few and len(active) > 1:
            continue
        slowest = 0.0
        for p, share in active:
            fastest = math.inf
            for inner in itertools.combinations(range(1, layers), len(p.stages) - 1):
                stages = tuple(
                    replace(stage, layers=entries_of(stage, a, b))
                    for stage, (a, b) in zip(
                        p.stages, itertools.pairwise((0, *inner, layers)), strict=True
                    )
                )
                if not outside_follows(stages):
                    continue
                one = Pipeline(share, p.microbatch, stages)
                try:
                    check(Plan("x", share, (one,)), graph)
                except PlanError:
                    continue
                priced = (
                    plan_cost(Plan("x", share, (one,)), graph, cluster, work)
                    if len(active) == 1
                    else pair_cost(one, share, graph, cluster, work)
                )
                if fits(priced, stages, cluster, fraction):
                    fastest = min(fastest, priced.step_s)
            slowest = max(slowest, fastest)
        best = min(best, slowest)
    return best


def outside_follows(stages):
    """What lies outside all layers has the layout of the layer before it in its stage."""
    *_, outside = stages[-1].layers
    before = stages[-1].layers[-2:-1]
    mesh = stages[-1].mesh
    return not before or border_axes(before[0], mesh) == border_axes(outside, mesh)


def pair_cost(one, share, graph, cluster, work):
    """The price of a pipeline beside another one that takes no time worth mention."""
    used = {d for stage in one.stages for d in stage.devices}
    spare = next(d for d in range(cluster.num_devices) if d not in used)
    stage = Stage((spare,), Mesh(), (LayerStrategy("embed..outside"),))
    both = Plan("x", share + 1, (one, Pipeline(1, 1, (stage,))))
    priced = plan_cost(both, graph, cluster, work)
    mine = priced.stages[:-1]
    times = [s.microbatch_s for s in mine]
    step_s = math.fsum(times) + (one.num_microbatches - 1) * max(times)
    return replace(priced, step_s=step_s, peak_bytes=max(s.peak_bytes for s in mine), stages=mine)


def fits(priced, stages, cluster, fraction):
    return all(
        cost.peak_bytes <= fraction * min(cluster.kind_of(d).memory_bytes for d in stage.devices)
        for cost, stage in zip(priced.stages, stages, strict=True)
    )


@settings(max_examples=150, deadline=None)
@given(plans(), st.sampled_from([GRAPH, HEAVY]))
def test_no_division_and_no_shares_are_faster(case, graph):
    plan, cluster = case
    work = Workload(plan.global_batch, loops=False)
    best = brute_force(plan, graph, cluster, work, 0.9)
    try:
        found = rebalanced(plan, graph, cluster, work)
    except PlanError:
        assert math.isinf(best)
        return
    check(found, graph, cluster)
    cost = plan_cost(found, graph, cluster, work)
    assert cost.step_s == pytest.approx(best, rel=TINY)
    for stage in (s for p in found.pipelines for s in p.stages):
        limit = 0.9 * min(cluster.kind_of(d).memory_bytes for d in stage.devices)
        assert stage.peak_bytes <= limit
    now = {s.devices: s.mesh for p in plan.pipelines for s in p.stages}
    assert {s.devices: s.mesh for p in found.pipelines for s in p.stages}.items() <= now.items()


@pytest.mark.parametrize("cut", range(1, len(GRAPH.layers)))
@pytest.mark.parametrize("graph", [GRAPH, HEAVY])
def test_changes_of_layout_count_where_they_are_and_not_at_a_cut(cut, graph):
    work, cluster = Workload(8, loops=False), cluster_of(4).slowed({0: 0.5})
    for first, second, rest in itertools.product((WAYS[0], WAYS[2]), repeat=3):
        pipeline = pipeline_of(
            0, [2, 2], (0, cut, len(GRAPH.layers)), 8, 2, [first, second], rest=rest
        )
        plan = Plan("hand", 8, (pipeline,))
        best = brute_force(plan, graph, cluster, work, 0.9)
        if math.isinf(best):
            continue
        found = rebalanced(plan, graph, cluster, work)
        assert plan_cost(found, graph, cluster, work).step_s == pytest.approx(best, rel=TINY)


@st.composite
def tables(draw):
    batch = draw(st.integers(1, 12))
    entry = st.tuples(st.integers(0, 8), st.sampled_from([0.5, 1.0, 2.0, 3.5, 7.0]))
    return batch, draw(st.lists(st.lists(entry, min_size=1, max_size=5), min_size=1, max_size=4))


@settings(max_examples=200, deadline=None)
@given(tables())
def test_shares_are_the_best_of_all(case):
    batch, given_tables = case
    best = min(
        (
            max(seconds for _, seconds in picks)
            for picks in itertools.product(*given_tables)
            if sum(n for n, _ in picks) == batch
        ),
        default=math.inf,
    )
    found, shares = _least_of_slowest(given_tables, batch)
    assert found == best
    if shares:
        assert sum(shares) == batch
        assert (
            max(
                min(s for n, s in table if n == share)
                for table, share in zip(given_tables, shares, strict=True)
            )
            == best
        )


def two_stages(cuts=(0, 4, 7), sequences=8):
    return pipeline_of(0, [1, 1], cuts, sequences, 1, [WAYS[0]] * 2)


def test_a_slow_stage_gives_layers_away():
    plan = Plan("hand", 8, (two_stages(),))
    cluster = cluster_of(2).slowed({0: 0.4})
    found = rebalanced(plan, HEAVY, cluster, Workload(8, loops=False))
    names = [s.layers[0].layers for s in found.pipelines[0].stages]
    assert names == ["embed..blocks[0]", "blocks[1]..outside"]


def test_a_slow_pipeline_gives_sequences_away():
    pair = pipeline_of(0, [1], (0, 7), 4, 1, WAYS[:1]), pipeline_of(1, [1], (0, 7), 4, 1, WAYS[:1])
    cluster = cluster_of(2).slowed({1: 0.34})
    found = rebalanced(Plan("hand", 8, pair), HEAVY, cluster, Workload(8, loops=False))
    assert [p.sequences for p in found.pipelines] == [6, 2]


def test_a_pipeline_that_is_far_too_slow_stands_by():
    pair = pipeline_of(0, [1], (0, 7), 4, 1, WAYS[:1]), pipeline_of(1, [1], (0, 7), 4, 1, WAYS[:1])
    cluster = cluster_of(2).slowed({0: 0.01})
    found = rebalanced(Plan("hand", 8, pair), HEAVY, cluster, Workload(8, loops=False))
    assert [(p.sequences, p.stages[0].devices) for p in found.pipelines] == [(8, (1,))]


def test_nothing_changes_where_all_is_even():
    plan = Plan("hand", 8, (two_stages((0, 3, 7)),))
    found = rebalanced(plan, HEAVY, cluster_of(2), Workload(8, loops=False))
    assert [s.layers for s in found.pipelines[0].stages] == [
        s.layers for s in plan.pipelines[0].stages
    ]


def test_of_an_interleaved_pipeline_the_layers_stay():
    ring = pipeline_of(0, [1, 1], (0, 2, 7), 4, 1, WAYS[:1] * 2)
    groups = [s.devices for s in ring.stages]
    names = ["embed..blocks[0]", "blocks[1]", "blocks[2]", "blocks[3]..outside"]
    stages = tuple(
        Stage(groups[i % 2], Mesh(), (LayerStrategy(name),)) for i, name in enumerate(names)
    )
    pair = (
        Pipeline(4, 1, stages, "interleaved"),
        pipeline_of(2, [1], (0, 7), 4, 1, WAYS[:1]),
    )
    cluster = cluster_of(3).slowed({2: 0.5})
    work = Workload(8, loops=False)
    found = rebalanced(Plan("hand", 8, pair), HEAVY, cluster, work)
    assert [p.sequences for p in found.pipelines] == [6, 2]
    assert [s.layers for s in found.pipelines[0].stages] == [s.layers for s in stages]
    check(found, HEAVY, cluster)


def test_what_does_not_fit_says_by_how_much():
    plan = Plan("hand", 8, (two_stages(),))
    cluster = cluster_of(2, memory_bytes=1e6)
    with pytest.raises(InfeasibleError) as error:
        rebalanced(plan, GRAPH, cluster, Workload(8, loops=False))
    missing = error.value.missing_bytes
    assert str(error.value) == (
        f"no division of the layers over the plan's groups fits: with the most even one, pipeline "
        f"0 is {missing / 2**30:.2f} GiB ({missing} bytes) per device above its limit; plan "
        "again, so that layers may take other strategies and devices other groups"
    )
    enough = cluster_of(2, memory_bytes=1e6 + missing / 0.9 + 8)
    rebalanced(plan, GRAPH, enough, Workload(8, loops=False), SearchOptions())
    short = cluster_of(2, memory_bytes=1e6 + missing / 0.9 - 8)
    with pytest.raises(InfeasibleError):
        rebalanced(plan, GRAPH, short, Workload(8, loops=False))


def test_micro_batches_that_cannot_add_up_are_refused():
    pair = pipeline_of(0, [1], (0, 7), 4, 4, WAYS[:1]), pipeline_of(1, [1], (0, 7), 4, 4, WAYS[:1])
    with pytest.raises(PlanError) as error:
        rebalanced(Plan("hand", 8, pair), GRAPH, cluster_of(2), Workload(6, loops=False))
    assert str(error.value) == (
        "no micro-batches of 4, 4 sequences, at least one for each stage of a pipeline, add up to "
        "6 in a way that fits; plan again with other micro-batches"
    )
