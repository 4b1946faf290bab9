"""The price of optimizer state that pipelines share, and when the planner chooses it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardpar.errors import PlanError
from shardpar.planner.cost import plan_cost
from shardpar.planner.moving import moving
from shardpar.planner.options import SearchOptions
from shardpar.planner.rebalance import rebalanced
from shardpar.planner.search import search
from shardpar.planner.setting import Workload
from shardpar.spec.cluster import Link
from shardpar.spec.graph import DTYPE_BYTES
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from tests.planner.cases import cluster_of, gpt
from tests.planner.test_pipelines import unequal
from tests.planner.test_rebalance import HEAVY
from tests.spec.values import gpt_like

WORK = Workload(8, "float32", 2.0, loops=False)


def two(ratio=5.0, memory_bytes=7e7):
    """Two unequal devices with little memory, on a fast network."""
    cluster = unequal(ratio)
    kinds = tuple(replace(k, memory_bytes=memory_bytes) for k in cluster.kinds)
    return replace(cluster, kinds=kinds, inter_host=Link(1e10, 1e-6))


def beside(zero, count=2):
    """As many whole pipelines, a device each."""
    stage = LayerStrategy("embed..outside")
    pipelines = tuple(Pipeline(8, 2, (Stage((n,), Mesh(), (stage,)),)) for n in range(count))
    return Plan("c", 8 * count, pipelines, zero=zero)


@pytest.mark.parametrize("count", [2, 4])
def test_each_of_some_pipelines_keeps_its_share_of_the_optimizer_state_and_no_more(count):
    graph, cluster = gpt_like(), cluster_of(4)
    none, zero = (plan_cost(beside(z, count), graph, cluster, WORK) for z in ("none", "pipelines"))
    for before, after in zip(none.stages, zero.stages, strict=True):
        state = [sum(c.optimizer_bytes for _, c in s.layers) for s in (before, after)]
        # All dims of this model divide by two and by four.
        assert state[0] == 8 * graph.num_parameters
        assert state[1] == state[0] / count
        assert before.peak_bytes - after.peak_bytes == pytest.approx(state[0] - state[1])
        assert before.saved_bytes == after.saved_bytes
        assert after.cross_s > before.cross_s


def test_where_memory_is_short_pipelines_that_share_are_faster_and_fit():
    without, chosen = (
        search(gpt(), two(), WORK, SearchOptions(zero=zero)) for zero in ("none", None)
    )
    assert (without.plan.zero, chosen.plan.zero) == ("none", "pipelines")
    assert chosen.plan.objective.step_s < 0.9 * without.plan.objective.step_s
    cost = plan_cost(chosen.plan, gpt(), two(), WORK)
    peaks = [stage.peak_bytes for p in chosen.plan.pipelines for stage in p.stages]
    assert peaks == [stage.peak_bytes for stage in cost.stages]
    assert max(peaks) <= 0.9 * 7e7 < plan_cost(
        replace(chosen.plan, zero="none"), gpt(), two(), WORK
    ).peak_bytes  # fmt: skip
    assert "optimizer state once over pipelines" in chosen.description


def test_what_is_left_to_gain_is_in_the_gap_where_memory_is_ample():
    for zero, gap in (("none", 0.0), (None, 1e-3)):
        result = search(gpt(), two(memory_bytes=1e9), WORK, SearchOptions(zero=zero))
        assert result.plan.objective.gap <= gap + 1e-12


def test_an_optimizer_that_reads_whole_parameters_is_given_no_slices():
    work = replace(WORK, elementwise=False)
    assert search(gpt(), two(), work).plan.zero == "none"
    with pytest.raises(PlanError, match="the optimizer reads other elements"):
        search(gpt(), two(), work, SearchOptions(zero="pipelines"))


def test_a_pin_that_leaves_nothing_is_refused_in_words():
    pinned = SearchOptions(zero="pipelines")
    with pytest.raises(PlanError, match="planned over unequal devices only"):
        search(gpt(), cluster_of(2), WORK, pinned)
    with pytest.raises(PlanError, match="planned over unequal devices only"):
        search(gpt(), two(), WORK, replace(pinned, pipelines=1))
    with pytest.raises(PlanError, match="no plan fits in which several pipelines keep"):
        search(gpt(), two(memory_bytes=5e7), WORK, pinned)


def test_to_share_moves_nothing_and_to_stop_sharing_moves_the_other_slices():
    graph, cluster = gpt_like(), cluster_of(4)
    copies, slices = beside("none"), beside("pipelines")
    assert moving(copies, slices, graph, cluster, WORK).moved_bytes == 0
    # Each of two devices lacks half of two moments of each parameter.
    expected = sum(2 * p.size * DTYPE_BYTES[p.dtype] for _, _, p in graph.parameters)
    assert moving(slices, copies, graph, cluster, WORK).moved_bytes == expected
    lost = moving(slices, replace(copies, pipelines=(copies.pipelines[0],), global_batch=8),
                  graph, cluster, WORK, lost={1})  # fmt: skip
    assert (lost.moved_bytes, lost.restored_bytes) == (0, expected / 2)


def test_a_rebalanced_plan_shares_as_before_unless_one_pipeline_is_left():
    plan = replace(beside("pipelines"), global_batch=16)
    cluster, work = cluster_of(4), replace(WORK, global_batch=16)
    assert rebalanced(plan, HEAVY, cluster, work).zero == "pipelines"
    slow = cluster.slowed({1: 1e-4})
    left = rebalanced(plan, HEAVY, slow, work)
    assert (len(left.pipelines), left.zero) == (1, "none")
