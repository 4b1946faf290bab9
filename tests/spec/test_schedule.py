"""Schedules: every micro-batch once each way, nothing that waits for itself, and what is held."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.errors import PlanError
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Stage
from shardpar.spec.schedule import Action, actions, digest, held, play, tasks

schedules = st.sampled_from(["1f1b", "gpipe"])
depths, counts = st.integers(1, 9), st.integers(1, 12)


def most_in_flight(listed) -> int:
    """Micro-batches that went forward and not yet back, at their most."""
    now = most = 0
    for action in listed:
        now += 1 if action.kind == "forward" else -1
        most = max(most, now)
    return most


@given(schedules, depths, counts)
def test_each_microbatch_goes_forward_once_and_then_back_once(schedule, stages, microbatches):
    for stage in range(stages):
        listed = actions(schedule, stages, stage, microbatches)
        assert sorted(map(str, listed)) == sorted(
            f"{way}{i}" for way in "FB" for i in range(microbatches)
        )
        for i in range(microbatches):
            assert listed.index(Action("forward", i)) < listed.index(Action("backward", i))
        for kind in ("forward", "backward"):
            order = [action.microbatch for action in listed if action.kind == kind]
            assert order == sorted(order)


@given(schedules, depths, counts)
def test_what_is_held_is_the_most_in_flight(schedule, stages, microbatches):
    for stage in range(stages):
        listed = actions(schedule, stages, stage, microbatches)
        assert held(schedule, stages, stage, microbatches) == most_in_flight(listed)


@given(schedules, depths, counts)
def test_no_stage_waits_for_ever(schedule, stages, microbatches):
    """Each turn, every stage does its next action if what it reads is there."""
    queues = [list(actions(schedule, stages, s, microbatches)) for s in range(stages)]
    done: set[tuple[int, str]] = set()

    def ready(stage: int, action: Action) -> bool:
        if action.kind == "forward":
            return stage == 0 or (stage - 1, f"F{action.microbatch}") in done
        return stage == stages - 1 or (stage + 1, f"B{action.microbatch}") in done

    while any(queues):
        able = [s for s in range(stages) if queues[s] and ready(s, queues[s][0])]
        assert able
        done.update([(s, str(queues[s].pop(0))) for s in able])


@given(depths, counts)
def test_stages_of_1f1b_hold_no_more_than_the_stages_that_follow_need(stages, microbatches):
    each = [held("1f1b", stages, s, microbatches) for s in range(stages)]
    assert each == [min(microbatches, stages - s) for s in range(stages)]
    assert {held("gpipe", stages, s, microbatches) for s in range(stages)} == {microbatches}


@pytest.mark.parametrize(
    ("schedule", "stages", "stage", "microbatches", "text"),
    [
        ("1f1b", 1, 0, 3, "F0 B0 F1 B1 F2 B2"),
        ("gpipe", 1, 0, 3, "F0 F1 F2 B0 B1 B2"),
        ("1f1b", 4, 0, 6, "F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5"),
        ("1f1b", 4, 1, 6, "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 B4 B5"),
        ("1f1b", 4, 2, 6, "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 B5"),
        ("1f1b", 4, 3, 6, "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5"),
        ("gpipe", 4, 3, 2, "F0 F1 B0 B1"),
        # Fewer micro-batches than stages: the first stages run them all before the first is back.
        ("1f1b", 4, 0, 2, "F0 F1 B0 B1"),
        ("1f1b", 4, 2, 2, "F0 F1 B0 B1"),
        ("1f1b", 4, 3, 2, "F0 B0 F1 B1"),
    ],
)
def test_the_order_is_that_of_the_papers(schedule, stages, stage, microbatches, text):
    assert " ".join(map(str, actions(schedule, stages, stage, microbatches))) == text


@pytest.mark.parametrize(
    ("stages", "stage", "microbatches", "message"),
    [
        (
            2, 2, 4,
            "no schedule for stage 2 of 2 with 4 micro-batches; stages count from 0 to 1, and "
            "there is at least one micro-batch",
        ),
        (
            3, -1, 4,
            "no schedule for stage -1 of 3 with 4 micro-batches; stages count from 0 to 2, and "
            "there is at least one micro-batch",
        ),
        (
            1, 0, 0,
            "no schedule for stage 0 of 1 with 0 micro-batches; stages count from 0 to 0, and "
            "there is at least one micro-batch",
        ),
    ],
)  # fmt: skip
def test_a_stage_that_is_not_there_or_no_microbatch_is_refused(
    stages, stage, microbatches, message
):
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        actions("1f1b", stages, stage, microbatches)


shapes = st.tuples(st.integers(1, 4), st.integers(2, 4), st.integers(1, 3))
"""Groups, chunks, and rounds of as many micro-batches as groups."""


def pipeline_of(schedule, groups, chunks, microbatches):
    stages = [
        Stage((s % groups,), Mesh(), (LayerStrategy(f"blocks[{s}]"),))
        for s in range(groups * chunks)
    ]
    return Pipeline(microbatches, 1, tuple(stages), schedule)


pipelines = st.one_of(
    st.builds(pipeline_of, schedules, depths, st.just(1), counts),
    shapes.map(lambda s: pipeline_of("interleaved", s[0], s[1], s[0] * s[2])),
)


@given(shapes)
def test_each_chunk_sends_each_microbatch_forward_once_and_then_back_once(shape):
    groups, chunks, rounds = shape
    for group in range(groups):
        listed = actions("interleaved", groups, group, groups * rounds, chunks)
        assert len(listed) == len(set(listed)) == 2 * chunks * groups * rounds
        for c in range(chunks):
            for i in range(groups * rounds):
                assert listed.index(Action("forward", i, c)) < listed.index(
                    Action("backward", i, c)
                )
                if c:
                    assert listed.index(Action("forward", i, c - 1)) < listed.index(
                        Action("forward", i, c)
                    )
                    assert listed.index(Action("backward", i, c)) < listed.index(
                        Action("backward", i, c - 1)
                    )


@given(shapes)
def test_what_is_held_of_each_chunk_is_the_most_in_flight(shape):
    groups, chunks, rounds = shape
    for group in range(groups):
        listed = actions("interleaved", groups, group, groups * rounds, chunks)
        for c in range(chunks):
            assert held("interleaved", groups, group, groups * rounds, chunks, c) == most_in_flight(
                [a for a in listed if a.chunk == c]
            )


@given(pipelines)
def test_a_step_plays_every_action_after_what_it_waits_for(pipeline):
    depth, groups = len(pipeline.stages), pipeline.num_groups
    times = [(1.0 + s, 2.0 + s) for s in range(depth)]
    arrive = [0.25] * depth
    ends = {}
    played = play(pipeline, times, arrive)
    assert len(played) == 2 * depth * pipeline.num_microbatches
    for one in played:
        ends[one.action.kind, one.stage, one.action.microbatch] = one.end
        forward, backward = times[one.stage]
        length = forward if one.action.kind == "forward" else backward
        assert one.end == one.start + length
        assert one.stage == one.action.chunk * groups + one.stage % groups
    for one in played:
        m, s = one.action.microbatch, one.stage
        if one.action.kind == "forward":
            assert s == 0 or one.start >= ends["forward", s - 1, m] + 0.25
        else:
            assert one.start >= ends["forward", s, m]
            assert s == depth - 1 or one.start >= ends["backward", s + 1, m] + 0.25
    for group in range(groups):
        mine = sorted((p.start, p.end) for p in played if p.stage % groups == group)
        assert all(before[1] <= after[0] for before, after in pairwise(mine))


def test_chunks_shorten_the_time_that_groups_wait():
    """Megatron-LM: the bubble of p groups and m micro-batches is (p - 1) / m, or that by chunks."""

    def length(schedule, chunks):
        pipeline = pipeline_of(schedule, 4, chunks, 8)
        depth = len(pipeline.stages)
        return max(p.end for p in play(pipeline, [(1 / chunks, 2 / chunks)] * depth, [0.0] * depth))

    work = 8 * 3.0
    assert length("1f1b", 1) == pytest.approx(work + 3 * 3.0)
    assert length("interleaved", 2) == pytest.approx(work + 3 * 3.0 / 2)
    assert length("interleaved", 4) == pytest.approx(work + 3 * 3.0 / 4)


@given(st.lists(pipelines, min_size=1, max_size=3))
def test_tasks_of_a_plan_stand_behind_what_they_wait_for_and_in_each_group_s_order(several):
    order = tasks(several)
    place = {task: n for n, task in enumerate(order)}
    assert len(place) == len(order) == sum(2 * len(p.stages) * p.num_microbatches for p in several)
    for task, n in place.items():
        depth = len(several[task.pipeline].stages)
        forward = [t for t in place if t.kind == "forward" and t.microbatch == task.microbatch
                   and t.pipeline == task.pipeline]  # fmt: skip
        if task.kind == "forward":
            assert all(place[t] < n for t in forward if t.stage < task.stage)
        else:
            assert len([t for t in forward if place[t] < n]) == depth
    for number, pipeline in enumerate(several):
        for group in range(pipeline.num_groups):
            mine = [
                Action(t.kind, t.microbatch, t.stage // pipeline.num_groups)
                for t in order
                if t.pipeline == number and t.stage % pipeline.num_groups == group
            ]
            assert tuple(mine) == actions(
                pipeline.schedule, pipeline.num_groups, group, pipeline.num_microbatches,
                pipeline.chunks,
            )  # fmt: skip


def test_interleaved_orders_are_those_of_the_paper():
    listed = [" ".join(map(str, actions("interleaved", 2, g, 4, 2))) for g in range(2)]
    assert listed == [
        "F0 F1 F0.1 F1.1 F2 B0.1 F3 B1.1 F2.1 B0 F3.1 B1 B2.1 B3.1 B2 B3",
        "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 F3 B1 F2.1 B2.1 F3.1 B3.1 B2 B3",
    ]


def test_a_schedule_of_one_stage_per_group_refuses_chunks():
    for schedule in ("1f1b", "gpipe"):
        with pytest.raises(PlanError, match="has one stage per group; write interleaved"):
            actions(schedule, 2, 0, 4, 2)


def test_the_digest_tells_orders_apart_and_is_the_same_every_time():
    plans = [
        pipeline_of(schedule, 2, chunks, count)
        for schedule, chunks in (("1f1b", 1), ("gpipe", 1), ("interleaved", 2))
        for count in (2, 4)
    ]
    names = [digest(tasks([plan])) for plan in plans]
    assert len(set(names)) == len(plans)
    assert names == [digest(tasks([plan])) for plan in plans]
    assert digest(tasks(plans[:2])) != digest(tasks(plans[1::-1]))
