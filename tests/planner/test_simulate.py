"""The simulated step against closed formulas, a small example by hand, and another event loop."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.planner.cost import PlanCost, plan_cost
from shardpar.planner.prices import StageCost
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import Event, simulate
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.schedule import actions
from tests.planner.cases import cluster_of, gpt


def stage_of(forward_s, backward_s, sent_s=0.0, update_s=0.0, cross_s=0.0) -> StageCost:
    """A stage whose price is nothing but these seconds."""
    return StageCost(
        step_s=0.0, microbatch_s=0.0, forward_s=forward_s, backward_s=backward_s,
        update_s=update_s, cross_s=cross_s, peak_bytes=0.0, state_bytes=0.0, saved_bytes=0.0,
        scratch_bytes=0.0, moves_s=0.0, sent_s=sent_s, layers=(),
    )  # fmt: skip


def played(*pipelines, schedule="1f1b", sizes=None):
    """The timeline of pipelines, each (micro-batches, [its stages' prices])."""
    made, first = [], 0
    for p, (count, prices) in enumerate(pipelines):
        stages = []
        for s in range(len(prices)):
            size = 1 if sizes is None else sizes[p][s]
            devices = tuple(range(first, first + size))
            first += size
            stages.append(Stage(devices, Mesh.factored(size), (LayerStrategy(f"l{s}"),)))
        made.append(Pipeline(count, 1, tuple(stages), schedule))
    plan = Plan("hand", sum(p.sequences for p in made), tuple(made))
    prices = tuple(price for _, prices in pipelines for price in prices)
    return simulate(plan, PlanCost(0.0, 0.0, prices))


seconds = st.integers(0, 8).map(lambda n: n / 4) | st.floats(0.01, 3)
schedules = st.sampled_from(["1f1b", "gpipe"])
prices = st.builds(stage_of, seconds, seconds, seconds, seconds, seconds)
pipelines = st.tuples(st.integers(1, 6), st.lists(prices, min_size=1, max_size=4))


@given(schedules, st.integers(1, 9), seconds, seconds)
def test_one_stage_takes_its_microbatches_one_after_another(schedule, count, forward_s, backward_s):
    timeline = played((count, [stage_of(forward_s, backward_s, update_s=0.5)]), schedule=schedule)
    assert timeline.step_s == pytest.approx(count * (forward_s + backward_s) + 0.5)
    assert timeline.bubble == pytest.approx(0.0, abs=1e-12)


@given(schedules, st.integers(1, 9), st.integers(1, 5), st.floats(0.1, 3), st.floats(0.1, 3))
def test_equal_stages_take_m_plus_s_minus_1_turns(schedule, count, depth, forward_s, backward_s):
    timeline = played((count, [stage_of(forward_s, backward_s)] * depth), schedule=schedule)
    turns = count + depth - 1
    assert timeline.step_s == pytest.approx(turns * (forward_s + backward_s))
    # S - 1 of the turns each stage waits.
    assert timeline.bubble == pytest.approx((depth - 1) / turns, abs=1e-9)


@given(st.integers(1, 3), st.integers(2, 4), st.integers(2, 3), st.floats(0.1, 3))
def test_interleaved_stages_wait_for_one_stage_of_each_other_group(rounds, groups, chunks, seconds):
    count = rounds * groups
    stages = tuple(
        Stage((s % groups,), Mesh(), (LayerStrategy(f"l{s}"),)) for s in range(groups * chunks)
    )
    plan = Plan("hand", count, (Pipeline(count, 1, stages, "interleaved"),))
    timeline = simulate(plan, PlanCost(0.0, 0.0, (stage_of(seconds, 2 * seconds),) * len(stages)))
    turns = count * chunks + groups - 1
    assert timeline.step_s == pytest.approx(turns * 3 * seconds)
    assert timeline.bubble == pytest.approx((groups - 1) / turns, abs=1e-9)


def test_two_stages_with_a_transfer_are_those_drawn_by_hand():
    # A transfer takes 1 s each way (sent_s has both), forwards 2 and 3 s, backwards 4 and 6 s:
    #
    #   0   F0 0-2   F1 2-4          .          B0 13-17   B1 22-26
    #   1        F0 3-6   B0 6-12   F1 12-15   B1 15-21
    first, second = stage_of(2.0, 4.0), stage_of(3.0, 6.0, sent_s=2.0)
    timeline = played((2, [first, second]))
    assert timeline.events == (
        Event(0, 0, "forward", 0, 0.0, 2.0),
        Event(0, 0, "forward", 1, 2.0, 4.0),
        Event(0, 1, "forward", 0, 3.0, 6.0),
        Event(0, 1, "backward", 0, 6.0, 12.0),
        Event(0, 1, "forward", 1, 12.0, 15.0),
        Event(0, 0, "backward", 0, 13.0, 17.0),
        Event(0, 1, "backward", 1, 15.0, 21.0),
        Event(0, 0, "backward", 1, 22.0, 26.0),
    )
    assert timeline.step_s == 26.0
    assert timeline.bubble == pytest.approx(1 - (12 + 18) / (2 * 26))


def test_gpipe_runs_all_forwards_first_and_1f1b_does_not():
    stages = [stage_of(2.0, 4.0), stage_of(3.0, 6.0, sent_s=2.0)]
    #   0   F0 0-2   F1 2-4          .          B0 16-20   B1 22-26
    #   1        F0 3-6   F1 6-9   B0 9-15   B1 15-21
    timeline = played((2, stages), schedule="gpipe")
    assert [(e.stage, e.kind, e.microbatch, e.start_s) for e in timeline.events] == [
        (0, "forward", 0, 0.0), (0, "forward", 1, 2.0), (1, "forward", 0, 3.0),
        (1, "forward", 1, 6.0), (1, "backward", 0, 9.0), (1, "backward", 1, 15.0),
        (0, "backward", 0, 16.0), (0, "backward", 1, 22.0),
    ]  # fmt: skip
    assert timeline.step_s == 26.0


def test_gradients_are_summed_across_pipelines_when_all_are_done_and_updates_follow():
    slow = stage_of(2.0, 4.0, update_s=0.5, cross_s=1.0)
    fast = stage_of(1.0, 1.0, update_s=0.25, cross_s=2.0)
    timeline = played((1, [slow]), (2, [fast]))
    assert timeline.events == (
        Event(0, 0, "forward", 0, 0.0, 2.0),
        Event(1, 0, "forward", 0, 0.0, 1.0),
        Event(1, 0, "backward", 0, 1.0, 2.0),
        Event(0, 0, "backward", 0, 2.0, 6.0),
        Event(1, 0, "forward", 1, 2.0, 3.0),
        Event(1, 0, "backward", 1, 3.0, 4.0),
        Event(0, 0, "sync", -1, 6.0, 7.0),
        Event(1, 0, "sync", -1, 6.0, 8.0),
        Event(0, 0, "update", -1, 7.0, 7.5),
        Event(1, 0, "update", -1, 8.0, 8.25),
    )
    assert timeline.step_s == 8.25


def test_waiting_counts_by_the_devices_that_wait():
    # Stage 0 waits 2 of 6 s with one device, stage 1 waits 4 of 6 s with three.
    stages = [stage_of(2.0, 2.0), stage_of(1.0, 1.0)]
    timeline = played((1, stages), sizes=[[1, 3]])
    assert timeline.step_s == 6.0
    assert timeline.bubble == pytest.approx((2 * 1 + 4 * 3) / (6 * 4))


def another_event_loop(schedule, count, prices):
    """Ends of every action: a queue of arrivals, and stages that take what their list has next."""
    depth = len(prices)
    lists = [list(actions(schedule, depth, s, count)) for s in range(depth)]
    inbox = [{("forward", i) for i in range(count)} if s == 0 else set() for s in range(depth)]
    inbox[-1] |= {("backward", i) for i in range(count)}
    busy = [False] * depth
    ends: dict[tuple[int, str, int], float] = {}
    queue: list[tuple[float, int, tuple]] = []
    number = 0

    def push(at, event):
        nonlocal number
        number += 1
        heapq.heappush(queue, (at, number, event))

    def start(stage, now):
        if busy[stage] or not lists[stage]:
            return
        action = lists[stage][0]
        if (action.kind, action.microbatch) not in inbox[stage]:
            return
        if action.kind == "backward" and (stage, "forward", action.microbatch) not in ends:
            return
        busy[stage] = True
        lists[stage].pop(0)
        price = prices[stage]
        took = price.forward_s if action.kind == "forward" else price.backward_s
        push(now + took, ("done", stage, action.kind, action.microbatch))

    for stage in range(depth):
        start(stage, 0.0)
    while queue:
        now, _, (what, stage, kind, microbatch) = heapq.heappop(queue)
        if what == "done":
            ends[stage, kind, microbatch] = now
            busy[stage] = False
            to = stage + 1 if kind == "forward" else stage - 1
            if 0 <= to < depth:
                way_s = prices[max(stage, to)].sent_s / 2
                push(now + way_s, ("arrives", to, kind, microbatch))
        else:
            inbox[stage].add((kind, microbatch))
        start(stage, now)
    assert not any(lists)
    return ends


@settings(max_examples=150)
@given(schedules, st.lists(pipelines, min_size=1, max_size=3))
def test_every_event_is_when_another_event_loop_has_it(schedule, given_pipelines):
    timeline = played(*given_pipelines, schedule=schedule)
    ends = [another_event_loop(schedule, *pipeline) for pipeline in given_pipelines]
    compute = [e for e in timeline.events if e.microbatch >= 0]
    assert len(compute) == sum(map(len, ends))
    for event in compute:
        end_s = ends[event.pipeline][event.stage, event.kind, event.microbatch]
        assert event.end_s == pytest.approx(end_s)
        price = given_pipelines[event.pipeline][1][event.stage]
        took = price.forward_s if event.kind == "forward" else price.backward_s
        assert event.end_s - event.start_s == pytest.approx(took, abs=1e-9)
    # Once a step, after all micro-batches: the sum across pipelines, then the update.
    last = max(end for own in ends for end in own.values())
    finish = [
        (
            last + price.cross_s
            if price.cross_s
            else max(own[stage, "backward", i] for i in range(count))
        )
        + price.update_s
        for own, (count, prices) in zip(ends, given_pipelines, strict=True)
        for stage, price in enumerate(prices)
    ]
    assert timeline.step_s == pytest.approx(max(last, *finish))


@given(schedules, st.lists(pipelines, min_size=1, max_size=3))
def test_a_step_is_never_shorter_than_its_busiest_stage_or_its_longest_way(
    schedule, given_pipelines
):
    timeline = played(*given_pipelines, schedule=schedule)
    for count, prices in given_pipelines:
        for price in prices:
            busy = count * (price.forward_s + price.backward_s) + price.update_s + price.cross_s
            assert timeline.step_s >= busy * (1 - 1e-9)
        way = sum(p.forward_s + p.backward_s for p in prices) + sum(p.sent_s for p in prices[1:])
        assert timeline.step_s >= way * (1 - 1e-9)
    assert -1e-9 <= timeline.bubble < 1


@given(st.integers(1, 6), st.lists(prices, min_size=1, max_size=4))
def test_no_stage_does_two_things_at_once(count, given_prices):
    timeline = played((count, given_prices))
    for stage in range(len(given_prices)):
        own = sorted((e.start_s, e.end_s) for e in timeline.events if e.stage == stage)
        assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(own))


def test_a_priced_plan_of_one_stage_is_played_for_as_long_as_its_price_says():
    graph, cluster, work = gpt(), cluster_of(8), Workload(16)
    entry = LayerStrategy("embed..outside", ("c",), ("b",), recompute="full")
    stage = Stage(tuple(range(8)), Mesh.factored(8), (entry,))
    plan = Plan("hand", 16, (Pipeline(16, 4, (stage,)),))
    cost = plan_cost(plan, graph, cluster, work)
    assert simulate(plan, cost).step_s == pytest.approx(cost.step_s, rel=1e-12)


def test_a_priced_pipeline_spreads_its_formula_over_the_events():
    """Without once-a-step work and transfers, balanced stages are played as the formula says."""
    graph, cluster, work = gpt(), cluster_of(2), Workload(16)
    stages = (
        Stage((0,), Mesh(), (LayerStrategy("embed..blocks[1]"),)),
        Stage((1,), Mesh(), (LayerStrategy("blocks[2]..outside"),)),
    )
    plan = Plan("hand", 16, (Pipeline(16, 2, stages),))
    cost = plan_cost(plan, graph, cluster, work)
    first, second = (
        replace(s, update_s=0.0, sent_s=0.0, forward_s=cost.stages[0].forward_s,
                backward_s=cost.stages[0].backward_s)
        for s in cost.stages
    )  # fmt: skip
    even = replace(cost, stages=(first, second))
    each = cost.stages[0].forward_s + cost.stages[0].backward_s
    assert simulate(plan, even).step_s == pytest.approx(9 * each)
    whole = simulate(plan, cost)
    kinds = {(e.stage, e.kind) for e in whole.events}
    assert kinds == {(s, k) for s in (0, 1) for k in ("forward", "backward", "update")}
