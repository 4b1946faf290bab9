"""Which devices a watch calls slow, when, and when no longer."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import SpecError
from shardpar.planner.options import StragglerOptions
from shardpar.planner.stragglers import StragglerWatch, by_device
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage

ALONE = StragglerOptions(factor=1.3, recovered=1.1, for_s=30.0, relative=False)


def watched(ratios, options=ALONE, every_s=10.0):
    """Speeds of device 0 after each reading, ten seconds apart."""
    watch, out = StragglerWatch(options), []
    for i, ratio in enumerate(ratios):
        watch = watch.seen(i * every_s, {0: 2.0 * ratio}, {0: 2.0})
        out.append(watch.speeds.get(0, 1.0))
    return out


def test_a_device_is_slow_after_the_time_and_not_before():
    assert watched([2.0] * 5) == [1.0, 1.0, 1.0, 0.5, 0.5]


def test_one_good_reading_starts_the_time_anew():
    assert watched([2.0, 2.0, 2.0, 1.0, 2.0, 2.0, 2.0, 2.0]) == [1.0] * 7 + [0.5]


def test_just_below_the_factor_nothing_is_reported():
    assert watched([1.29] * 10) == [1.0] * 10
    assert watched([1.3] * 4)[-1] == 0.77


def test_the_speed_is_that_of_the_mean_reading():
    assert watched([2.0, 3.0, 2.0, 3.0])[-1] == 0.4


def test_between_the_two_factors_a_slow_device_stays_slow():
    assert watched([1.4] * 4 + [1.2] * 10)[-1] == 0.71


def test_a_slow_device_is_well_again_after_the_time():
    assert watched([2.0] * 4 + [1.05] * 4) == [1.0] * 3 + [0.5] * 4 + [1.0]


def test_a_device_that_was_hardly_slow_is_well_again_too():
    assert watched([1.3] * 4 + [1.08] * 4) == [1.0] * 3 + [0.77] * 4 + [1.0]


def test_it_does_not_flap_where_readings_jump_around_both_factors():
    speeds = watched([1.05, 1.4] * 30)
    assert set(speeds) == {1.0}
    speeds = watched([1.4] * 4 + [1.05, 1.4] * 30)
    assert set(speeds[4:]) == {0.71}


def test_a_device_that_gets_slower_still_is_reported_anew():
    speeds = watched([2.0] * 4 + [2.2] * 5 + [4.0] * 4)
    assert speeds[3:9] == [0.5] * 6
    assert speeds[-1] == 0.25


def test_a_device_that_is_better_but_not_well_is_reported_anew():
    assert watched([4.0] * 4 + [2.0] * 4)[-1] == 0.5


def test_without_a_time_one_reading_is_enough():
    assert watched([2.0], StragglerOptions(for_s=0.0, relative=False)) == [0.5]


def test_a_prediction_wrong_for_all_makes_none_slow():
    watch = StragglerWatch(StragglerOptions(for_s=0.0))
    assert watch.seen(0.0, dict.fromkeys(range(4), 3.0), dict.fromkeys(range(4), 1.0)).speeds == {}
    two = watch.seen(0.0, {0: 6.0, 1: 3.0, 2: 3.0, 3: 3.0}, dict.fromkeys(range(4), 1.0))
    assert two.speeds == {0: 0.5}
    pair = watch.seen(0.0, {0: 3.0, 1: 6.0}, {0: 1.0, 1: 1.0})
    assert pair.speeds == {1: 0.5}


def test_a_device_that_stands_by_stays_what_it_is_called():
    watch = StragglerWatch(StragglerOptions(for_s=0.0, relative=False))
    watch = watch.seen(0.0, {0: 2.0, 1: 1.0}, {0: 1.0, 1: 1.0})
    watch = watch.seen(9.0, {1: 1.0}, {1: 1.0})
    assert watch.speeds == {0: 0.5}


def test_a_watch_is_a_value():
    watch = StragglerWatch(ALONE)
    watch.seen(0.0, {0: 5.0}, {0: 1.0})
    assert watch == StragglerWatch(ALONE)


def test_a_device_whose_speed_has_just_changed_is_well_again_no_later():
    speeds = watched([1.35, 1.35, 1.35, 4.0, 1.35, 1.05, 1.05, 1.05, 0.9])
    assert speeds[3:] == [0.5, 0.5, 0.5, 0.5, 0.89, 1.0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0.9, 1.05, 1.2, 1.35, 1.5, 2.0, 4.0]), min_size=1, max_size=30))
def test_a_change_needs_the_time_of_readings_that_agree(ratios):
    speeds = watched(ratios)
    before = 1.0
    for i, speed in enumerate(speeds):
        last = ratios[max(0, i - 3) : i + 1]
        if speed != before:
            assert len(last) == 4
            slower = all(r * before >= 1.3 for r in last)
            faster = all(r * before <= 1 / 1.3 or r <= 1.1 for r in last)
            assert slower or (faster and before < 1)
        # Whatever is plainly slow for the time is reported, and whatever is well is not.
        if len(last) == 4 and min(last) >= 1.35:
            assert speed < 1
        if len(last) == 4 and max(last) <= 1.1:
            assert speed == 1
        before = speed


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: StragglerOptions(factor=1.0, recovered=1.1),
            "stragglers: factor is 1.0 and recovered 1.1; write numbers above 1",
        ),
        (
            lambda: StragglerOptions(factor=float("nan")),
            "stragglers: factor is nan and recovered 1.1; write numbers above 1",
        ),
        (
            lambda: StragglerOptions(for_s=-1.0),
            "stragglers: for_s is -1.0; write seconds, 0 or more",
        ),
        (
            lambda: StragglerWatch().seen(0.0, {3: 0.0}, {3: 1.0}),
            "stragglers: device 3 has measured seconds 0.0; write a positive number",
        ),
        (
            lambda: StragglerWatch().seen(0.0, {3: 1.0}, {3: math.nan}),
            "stragglers: device 3 has predicted seconds nan; write a positive number",
        ),
        (
            lambda: StragglerWatch().seen(0.0, {3: 1.0}, {}),
            "stragglers: device 3 has a measured time but no predicted one; give both",
        ),
        (
            lambda: StragglerWatch().seen(5.0, {}, {}).seen(4.0, {}, {}),
            "stragglers: a reading at 4.0 s after one at 5.0 s; give the time of a clock that does "
            "not go back",
        ),
        (
            lambda: by_device(PLAN, [1.0]),
            "stragglers: the plan has 2 stages, but there are seconds of 1; give one number for "
            "each stage",
        ),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(SpecError) as error:
        build()
    assert str(error.value) == message


PLAN = Plan(
    "c", 2,
    (Pipeline(2, 1, (
        Stage((4, 5), Mesh.factored(2), (LayerStrategy("a"),)),
        Stage((1,), Mesh(), (LayerStrategy("b"),)),
    )),),
)  # fmt: skip


def test_devices_of_a_stage_have_its_seconds():
    assert by_device(PLAN, [3.0, 7.0]) == {4: 3.0, 5: 3.0, 1: 7.0}


def test_devices_of_several_stages_have_the_seconds_of_all():
    stages = tuple(Stage((i % 2,), Mesh(), (LayerStrategy(name),)) for i, name in enumerate("abcd"))
    plan = Plan("c", 2, (Pipeline(2, 1, stages, "interleaved"),))
    assert by_device(plan, [1.0, 2.0, 4.0, 8.0]) == {0: 5.0, 1: 10.0}
