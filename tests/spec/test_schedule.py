"""Schedules: every micro-batch once each way, nothing that waits for itself, and what is held."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.errors import PlanError
from shardpar.spec.schedule import Action, actions, held

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
