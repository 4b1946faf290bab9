"""Prices of equal stages in one program: against hand-made sums, the event loop, and a search."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from shardpar.errors import PlanError
from shardpar.planner.cost import PlanCost, fill_s, plan_cost
from shardpar.planner.equal_plans import DISPATCH_S, with_dispatch_s
from shardpar.planner.options import SearchOptions
from shardpar.planner.rebalance import rebalanced
from shardpar.planner.search import search
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import simulate
from shardpar.spec.check import check
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from tests.planner.cases import cluster_of, gpt, priced
from tests.planner.test_simulate import stage_of

WORK = Workload(16, "float32", 2.0, loops=False)
CLUSTER = cluster_of(devices=8)


def equal(stages, microbatch=1, batch=16, schedule="single_jit", size=1, **choices):
    """The demo GPT's four blocks over equal stages."""
    each = 4 // stages
    cuts = [f"blocks[{i}]" for i in range(0, 4, each)]
    ends = [f"blocks[{i}]" for i in range(each - 1, 4, each)]
    cuts[0], ends[-1] = "embed", "outside"
    made = [
        Stage(
            tuple(range(s * size, (s + 1) * size)),
            Mesh.factored(size),
            (LayerStrategy(f"{first}..{last}" if first != last else first, **choices),),
        )
        for s, (first, last) in enumerate(zip(cuts, ends, strict=True))
    ]
    return Plan("unit", batch, (Pipeline(batch, microbatch, tuple(made), schedule),))


def test_a_step_is_its_ticks_the_shares_of_the_ends_and_the_update():
    """Against one device that does all: half the blocks a tick, half the ends a micro-batch."""
    graph = gpt()
    plan = equal(2, microbatch=2)
    alone = dict(priced(graph, 1, WORK, microbatch=2).stages[0].layers)
    one_s = {name: c.microbatch_s(0.5) for name, c in alone.items()}
    ends = [name for name in alone if not name.startswith("blocks")]
    tick_s = one_s["blocks[0]"] + one_s["blocks[1]"]
    stream = max(a.num_bytes for a in graph.class_of(graph.layers[1]).inputs) * 2 / graph.batch
    hop_s = 2 * (stream / 1e10 + 1e-5)
    gradients = 4 * sum(
        math.prod(p.shape) for name in ends
        for p in next(graph.class_of(x) for x in graph.layers if x.name == name).parameters
    )  # fmt: skip
    layers_with_parameters = ("embed", "head")
    once_s = sum(alone[n].update_s for n in (*ends, "blocks[0]", "blocks[1]"))
    once_s += 2 * gradients / 2 / 1e10 + 2 * 1e-5 * len(layers_with_parameters)
    shares_s = sum(one_s[name] for name in ends) / 2 + 2 * hop_s / 2
    expected = (8 + 1) * (tick_s + hop_s) + 8 * shares_s + once_s
    cost = plan_cost(plan, graph, CLUSTER, WORK)
    assert cost.step_s == pytest.approx(expected, rel=1e-9)
    assert fill_s(plan.pipelines[0], cost.stages) == pytest.approx(tick_s + hop_s)


@pytest.mark.parametrize(("stages", "microbatch"), [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_the_simulated_step_is_the_formulas(stages, microbatch):
    plan = equal(stages, microbatch)
    cost = plan_cost(plan, gpt(), CLUSTER, WORK)
    assert simulate(plan, cost).step_s == pytest.approx(cost.step_s, rel=1e-9)


def test_ticks_drawn_by_hand():
    # Forwards of 2 and 3 s, backwards of 4 and 6 s, 1 s for each hop, ends of 5 s:
    #   0   F0 0-2   F1 4-6    .    ends 12-22    .    B0 29-33   B1 36-40
    #   1     .      F0 4-7   F1 8-11   "   B0 22-28   B1 29-35      .
    first, second = stage_of(2.0, 4.0), stage_of(3.0, 6.0, sent_s=2.0)
    prices = tuple(replace(price, ends_s=5.0) for price in (first, second))
    stages = tuple(Stage((d,), Mesh(), (LayerStrategy(f"l{d}"),)) for d in range(2))
    plan = Plan("hand", 2, (Pipeline(2, 1, stages, "single_jit"),))
    timeline = simulate(plan, PlanCost(0.0, 0.0, prices))
    assert [(e.stage, e.kind, e.microbatch, e.start_s, e.end_s) for e in timeline.events] == [
        (0, "forward", 0, 0.0, 2.0),
        (0, "forward", 1, 4.0, 6.0), (1, "forward", 0, 4.0, 7.0),
        (1, "forward", 1, 8.0, 11.0),
        (0, "ends", -1, 12.0, 22.0), (1, "ends", -1, 12.0, 22.0),
        (1, "backward", 0, 22.0, 28.0),
        (0, "backward", 0, 29.0, 33.0), (1, "backward", 1, 29.0, 35.0),
        (0, "backward", 1, 36.0, 40.0),
    ]  # fmt: skip


def test_activations_of_all_micro_batches_are_held_and_the_ends_on_every_stage():
    graph = gpt()
    one, apart = (
        plan_cost(equal(2, schedule=schedule), graph, CLUSTER, WORK).stages
        for schedule in ("single_jit", "1f1b")
    )
    assert one[0].saved_bytes > 17 / 2 * apart[0].saved_bytes * 0.8
    assert one[0].state_bytes == one[1].state_bytes > max(s.state_bytes for s in apart)


def test_equal_pipelines_sum_their_gradients_like_data_shards():
    graph = gpt()
    (pipeline,) = equal(2, batch=8).pipelines
    other = replace(
        pipeline,
        stages=tuple(replace(s, devices=tuple(d + 2 for d in s.devices)) for s in pipeline.stages),
    )
    plan = Plan("unit", 16, (pipeline, other))
    wide = equal(2, microbatch=2, size=2)
    got, wanted = (plan_cost(p, graph, CLUSTER, WORK) for p in (plan, wide))
    assert len(got.stages) == 4
    assert got.step_s == pytest.approx(wanted.step_s, rel=1e-9)


OPTIONS = SearchOptions(stages=2, recompute="none", microbatch=1)


def test_the_search_takes_equal_stages_where_it_predicts_them_faster():
    graph, cluster = gpt(), cluster_of(devices=2)
    work = replace(WORK, global_batch=64)
    found = {
        schedule: search(graph, cluster, work, replace(OPTIONS, schedule=schedule))
        for schedule in ("1f1b", "single_jit", "fastest")
    }
    assert {k: f.plan.pipelines[0].schedule for k, f in found.items() if k != "fastest"} == {
        "1f1b": "1f1b", "single_jit": "single_jit",
    }  # fmt: skip
    apart_s = with_dispatch_s(found["1f1b"].plan, found["1f1b"].simulated_s)
    better = min((apart_s, "1f1b"), (found["single_jit"].simulated_s, "single_jit"))
    assert found["fastest"].plan.pipelines[0].schedule == better[1]
    plan = found["single_jit"].plan
    check(plan, graph, cluster)
    assert plan.objective.step_s == plan_cost(plan, graph, cluster, work).step_s


def test_a_search_for_equal_stages_takes_the_fastest_strategy_of_all_that_fit():
    """Against every strategy that is the same for all layers of the run."""
    graph, cluster = gpt(), cluster_of(devices=4)
    options = replace(OPTIONS, schedule="single_jit", microbatch=None)
    found = search(graph, cluster, WORK, options)
    for choices, microbatch in itertools.product(
        ({}, {"tensor": ("a",)}, {"fsdp": ("a",)}, {"zero1": ("a",)}), (2, 4, 8)
    ):
        plan = equal(2, microbatch=microbatch, size=2, **choices)
        assert found.plan.objective.step_s <= plan_cost(plan, graph, cluster, WORK).step_s * 1.0001


def test_equal_stages_that_do_not_fit_are_refused_in_words():
    with pytest.raises(PlanError, match="no plan of equal stages in one program fits"):
        search(
            gpt(), cluster_of(devices=3), replace(WORK, global_batch=6),
            SearchOptions(stages=3, schedule="single_jit"),
        )  # fmt: skip


def test_programs_of_stages_take_at_least_what_dispatching_them_does():
    plan = equal(2, schedule="1f1b")
    assert with_dispatch_s(plan, 1e-6) == pytest.approx(2 * 2 * 16 * DISPATCH_S)
    assert with_dispatch_s(plan, 10.0) == 10.0
    assert with_dispatch_s(equal(2), 1e-6) == 1e-6


def test_a_slow_device_makes_programs_of_stages_of_equal_ones():
    slow = replace(cluster_of(devices=2), speeds=((1, 0.5),))
    plan = rebalanced(equal(2), gpt(), slow, WORK)
    (pipeline,) = plan.pipelines
    assert pipeline.schedule == "1f1b"
    assert simulate(plan, plan_cost(plan, gpt(), slow, WORK)).step_s
