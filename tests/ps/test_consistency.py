"""No worker is ever further ahead than its bound allows, whichever order workers run in."""

from __future__ import annotations

import random

import pytest

from shardpar.errors import ConfigError, RunError
from shardpar.ps.consistency import (
    ASP,
    BSP,
    SSP,
    Clocks,
    consistency_from_text,
    slow_workers,
)


def furthest(bound, seed, *, workers=4, turns=400):
    """The largest lead seen when, at each turn, a random worker of those allowed runs a step.

    Worker 0 is picked a tenth as often as the others.
    """
    choose = random.Random(seed)
    clocks, most = Clocks.zero(workers), 0
    for _ in range(turns):
        may = [worker for worker in range(workers) if clocks.may_start(worker, bound)]
        assert may, "nobody may go on"
        weights = [0.1 if worker == 0 else 1.0 for worker in may]
        worker = choose.choices(may, weights)[0]
        # While it runs its step, it is this far ahead of the slowest.
        most = max(most, clocks.steps[worker] - clocks.slowest)
        clocks = clocks.finished(worker, clocks.steps[worker] + 1)
    return most


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_worker_gets_exactly_as_far_ahead_as_its_bound(staleness):
    assert max(furthest(SSP(staleness), seed) for seed in range(5)) == staleness


def test_without_a_bound_nobody_waits():
    clocks = Clocks.zero(3)
    for step in range(1, 50):
        assert clocks.may_start(2, ASP)
        clocks = clocks.finished(2, step)
    assert clocks.spread() == 49


def test_lockstep_waits_for_the_last_worker():
    clocks = Clocks.zero(2).finished(0, 1)
    assert not clocks.may_start(0, BSP)
    assert clocks.finished(1, 1).may_start(0, BSP)


def test_a_clock_never_goes_back():
    assert Clocks((3, 5)).finished(1, 2).steps == (3, 5)


def test_a_worker_that_is_not_there_is_refused():
    with pytest.raises(RunError, match="workers 0 to 1, but no 2"):
        Clocks.zero(2).finished(2, 1)


@pytest.mark.parametrize("bound", [BSP, SSP(7), ASP])
def test_text_and_back(bound):
    assert consistency_from_text(bound.text()) == bound


@pytest.mark.parametrize("text", ["ssp", "ssp(-1)", "ssp()", "fast", "ssp(1.5)"])
def test_other_words_are_refused(text):
    with pytest.raises(ConfigError, match=r"'bsp', 'ssp\(N\)' or 'asp'"):
        consistency_from_text(text)


def test_a_negative_bound_is_refused():
    with pytest.raises(ConfigError, match="cannot be -1 steps ahead"):
        SSP(-1)


def test_slow_is_more_than_the_mean_through_seven_tenths():
    # Mean 1.3; 1.3 / 0.7 is 1.857.
    times = {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}
    assert slow_workers({**times, 4: 2.5}) == (4,)
    assert slow_workers({**times, 4: 1.5}) == ()
    assert slow_workers({}) == ()
