"""Whether to change the plan, and to which: the decision, its reasons and its errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import InfeasibleError, PlanError, SpecError
from shardpar.planner.cost import plan_cost
from shardpar.planner.moving import moving
from shardpar.planner.options import ReplanOptions, SearchOptions
from shardpar.planner.rebalance import rebalanced
from shardpar.planner.replan import replan
from shardpar.planner.search import search
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import simulate
from shardpar.spec.check import check
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from tests.planner.cases import GOLDEN, cluster_of
from tests.planner.test_rebalance import HEAVY, WAYS, pipeline_of

WORK = Workload(8, loops=False)
CLUSTER = cluster_of(2, 2)
OPTIONS = SearchOptions()
TWO_PIPELINES = Plan(
    CLUSTER.name, 8, tuple(pipeline_of(f, [1, 1], (0, 3, 7), 4, 1, WAYS[:1] * 2) for f in (0, 2))
)
GO_ON = ReplanOptions(horizon_steps=1000, compile_s=1.0)


def played(plan, cluster):
    return simulate(plan, plan_cost(plan, HEAVY, cluster, WORK)).step_s


def named(decision):
    return {a.name: a for a in decision.alternatives}


def test_the_decision_and_its_table_as_people_read_them():
    decision = replan(HEAVY, CLUSTER, WORK, OPTIONS, TWO_PIPELINES, speeds={1: 0.4}, costs=GO_ON)
    assert str(decision) == (GOLDEN / "straggler_decision.txt").read_text()


def test_every_alternative_is_a_plan_with_the_price_it_says():
    decision = replan(HEAVY, CLUSTER, WORK, OPTIONS, TWO_PIPELINES, speeds={1: 0.4}, costs=GO_ON)
    slow = CLUSTER.slowed({1: 0.4})
    assert list(named(decision)) == [
        "keep", "rebalanced", "same groups", "searched", "without device 1", "without host 0",
    ]  # fmt: skip
    for name, a in named(decision).items():
        check(a.plan, HEAVY, slow)
        assert a.step_s == played(a.plan, slow)
        assert a.move == moving(TWO_PIPELINES, a.plan, HEAVY, slow, WORK)
        once_s = 0.0 if name == "keep" else a.move.move_s + 1.0
        assert a.total_s == pytest.approx(1000 * a.step_s + once_s)
    assert named(decision)["keep"].plan == TWO_PIPELINES
    fixed = rebalanced(TWO_PIPELINES, HEAVY, slow, WORK)
    assert named(decision)["rebalanced"].plan == fixed
    groups = [[s.devices for s in p.stages] for p in TWO_PIPELINES.pipelines]
    same = named(decision)["same groups"].plan
    assert [[s.devices for s in p.stages] for p in same.pipelines] == groups
    assert 1 not in named(decision)["without device 1"].plan.devices
    assert set(named(decision)["without host 0"].plan.devices) == {2, 3}
    assert decision.plan == named(decision)[decision.name].plan


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 10**5),
    st.sampled_from([0.0, 1.0, 100.0]),
    st.dictionaries(st.integers(0, 3), st.sampled_from([0.3, 0.6, 0.95]), max_size=2),
)
def test_a_change_is_made_if_and_only_if_it_pays_off(horizon, compile_s, speeds):
    costs = ReplanOptions(horizon_steps=horizon, compile_s=compile_s)
    decision = replan(HEAVY, CLUSTER, WORK, OPTIONS, TWO_PIPELINES, speeds=speeds, costs=costs)
    keep, *others = decision.alternatives
    worth = [
        a
        for a in others
        if a.plan and (keep.step_s - a.step_s) * horizon > (a.move.move_s + compile_s) * (1 + 1e-12)
    ]
    assert (decision.name != "keep") == bool(worth)
    if worth:
        best = max(worth, key=lambda a: (keep.step_s - a.step_s) * horizon - a.move.move_s)
        assert decision.name == best.name or math.isclose(
            named(decision)[decision.name].total_s, best.total_s
        )


def test_with_few_steps_to_come_nothing_changes_and_it_says_why():
    costs = ReplanOptions(horizon_steps=2, compile_s=60.0)
    decision = replan(HEAVY, CLUSTER, WORK, OPTIONS, TWO_PIPELINES, speeds={1: 0.4}, costs=costs)
    assert decision.plan == TWO_PIPELINES
    assert decision.name == "keep"
    assert "2 steps do not make up for the 60 s that the change takes" in decision.why


def test_machines_that_are_well_keep_the_best_plan():
    found = search(HEAVY, CLUSTER, WORK)
    decision = replan(HEAVY, CLUSTER, WORK, OPTIONS, found.plan)
    assert decision.plan == found.plan
    assert decision.why == (f"a step takes {found.simulated_s:.4g} s, and no other plan is faster")


def test_a_pipeline_that_lost_a_device_cannot_go_on_but_the_other_can():
    decision = replan(HEAVY, CLUSTER, WORK, OPTIONS, TWO_PIPELINES, devices=(0, 2, 3), costs=GO_ON)
    table = named(decision)
    assert table["keep"].plan is None
    assert table["keep"].note == "it needs device 1"
    assert [p.sequences for p in table["rebalanced"].plan.pipelines] == [8]
    assert set(table["rebalanced"].plan.devices) == {2, 3}
    assert set(decision.plan.devices) <= {0, 2, 3}
    assert decision.why.startswith("the running plan cannot go on; a step takes ")
    # The other pipeline has a copy of all.
    assert table["searched"].move.restored_bytes == 0


def test_what_had_one_copy_is_restored():
    one = Plan(CLUSTER.name, 8, (pipeline_of(0, [1, 1], (0, 3, 7), 8, 1, WAYS[:1] * 2),))
    decision = replan(HEAVY, CLUSTER, WORK, OPTIONS, one, devices=(0, 2, 3), costs=GO_ON)
    table = named(decision)
    assert table["rebalanced"].note == "no pipeline has all its devices"
    assert table["rebalanced"].plan is None
    assert table["searched"].move.restored_bytes > 0


def test_numbers_are_those_of_the_cluster_and_not_of_what_is_left():
    decision = replan(HEAVY, CLUSTER, WORK, OPTIONS, TWO_PIPELINES, devices=(1, 3), costs=GO_ON)
    assert set(decision.plan.devices) <= {1, 3}


def test_a_lost_devices_speed_does_not_matter():
    lost = replan(HEAVY, CLUSTER, WORK, OPTIONS, TWO_PIPELINES, devices=(0, 2, 3), costs=GO_ON)
    also = replan(
        HEAVY, CLUSTER, WORK, OPTIONS, TWO_PIPELINES, devices=(0, 2, 3), speeds={1: 0.1},
        costs=GO_ON,
    )  # fmt: skip
    assert lost.plan == also.plan
    assert list(named(lost)) == list(named(also))


def test_a_slow_device_costs_no_more_than_a_lost_one():
    """It may do next to nothing, the embedding say, or stand by."""
    speeds = {1: 1e-3}
    slow = replan(HEAVY, CLUSTER, WORK, OPTIONS, TWO_PIPELINES, speeds=speeds, costs=GO_ON)
    lost = replan(HEAVY, CLUSTER, WORK, OPTIONS, TWO_PIPELINES, devices=(0, 2, 3), costs=GO_ON)
    assert played(slow.plan, CLUSTER.slowed(speeds)) <= played(lost.plan, CLUSTER) * (1 + 1e-6)


def test_where_nothing_fits_the_search_says_what_is_missing():
    small = cluster_of(2, 2, memory_bytes=2.0e6)
    plan = Plan(small.name, 8, TWO_PIPELINES.pipelines)
    with pytest.raises(InfeasibleError) as error:
        replan(HEAVY, small, WORK, OPTIONS, plan, devices=(0,))
    assert str(error.value).startswith("nothing fits: the smallest plan (")
    assert error.value.missing_bytes > 0


@pytest.mark.parametrize(
    ("changed", "error_type", "message"),
    [
        (
            {"workload": Workload(16, loops=False)}, PlanError,
            "the running plan is for 8 sequences a step, but the workload has 16; give the "
            "workload that it was made for",
        ),
        (
            {"devices": ()}, SpecError,
            'cluster "unit-2x2": no device is left; name at least one to keep',
        ),
        ({"devices": (9,)}, SpecError, 'cluster "unit-2x2" has devices 0 to 3; got 9'),
        ({"speeds": {4: 0.5}}, SpecError, 'cluster "unit-2x2" has devices 0 to 3; got 4'),
        (
            {"speeds": {2: 0.0}}, SpecError,
            'cluster "unit-2x2": speeds: device 2 has speed 0.0; it is a share of its kind\'s '
            "rates, write more than 0 and at most 1",
        ),
        (
            {"plan": Plan("c", 8, (Pipeline(8, 8, (Stage((0,), Mesh(), (
                LayerStrategy("embed"),)),)),))}, PlanError,
            "blocks[0:4], head, outside have no strategy; add an entry under layers",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(changed, error_type, message):
    given_ = {
        "graph": HEAVY, "cluster": CLUSTER, "workload": WORK, "options": OPTIONS,
        "plan": TWO_PIPELINES,
    }  # fmt: skip
    with pytest.raises(error_type) as error:
        replan(**{**given_, **changed})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"horizon_steps": 0}, "replan: horizon_steps is 0; write 1 or more"),
        ({"compile_s": math.nan}, "replan: compile_s is nan; write seconds, 0 or more"),
        (
            {"restore_bandwidth": 0.0},
            "replan: restore_bandwidth is 0.0; write bytes per second, more than 0",
        ),
    ],
)
def test_costs_that_cannot_be_are_refused(changed, message):
    with pytest.raises(SpecError) as error:
        replace(ReplanOptions(), **changed)
    assert str(error.value) == message
