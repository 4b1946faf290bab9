"""The event clock beside a simulation from moment to moment, and what it must never do."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.fl.event_clock import server_steps, training_times


def by_moments(times_s, buffer, steps):
    """All clients train all the time: what arrives when, found by looking at every client's clock.

    Returns for each step its (client, version, staleness, at_s).
    """
    ends = list(times_s)
    versions = [0] * len(times_s)
    found, waiting, version = [], [], 0
    while len(found) < steps:
        client = min(range(len(ends)), key=lambda c: ends[c])
        waiting.append((client, versions[client], ends[client]))
        if len(waiting) == buffer:
            found.append([(c, v, version - v, at) for c, v, at in waiting])
            waiting, version = [], version + 1
        versions[client] = version
        ends[client] += times_s[client]
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=8, unique=True),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_arrivals_are_those_of_a_simulation_moment_by_moment(milliseconds, buffer, seed):
    # Odd denominators, so that two clients hardly ever end at one moment.
    times_s = np.array([t / 997 + i * 1e-7 for i, t in enumerate(milliseconds)])
    steps = islice(server_steps(times_s, concurrency=99, buffer=buffer, seed=seed), 12)
    found = [[(a.client, a.version, a.staleness, a.at_s) for a in s.arrivals] for s in steps]
    wanted = by_moments(times_s, buffer, 12)
    for step, other in zip(found, wanted, strict=True):
        assert [x[:3] for x in step] == [x[:3] for x in other]
        np.testing.assert_allclose([x[3] for x in step], [x[3] for x in other], rtol=1e-9)


def test_as_many_train_as_may_each_client_once_at_a_time():
    times_s = training_times(40, median_s=10.0, spread=1.0, seed=2)
    steps = list(islice(server_steps(times_s, concurrency=7, buffer=3, seed=5), 200))
    arrivals = [a for s in steps for a in s.arrivals]
    begun = {a.launch: a.at_s - times_s[a.client] for a in arrivals}
    for at_s in np.linspace(5.0, steps[-1].arrivals[-1].at_s / 2, 50):
        training = [a.client for a in arrivals if begun[a.launch] <= at_s < a.at_s]
        assert len(training) == len(set(training)) == 7
    for number, step in enumerate(steps):
        assert step.number == number
        assert all(a.version + a.staleness == number for a in step.arrivals)
        later = [a for s in steps[number + 1 :] for a in s.arrivals if a.version <= number + 1]
        assert {a.version for a in later} <= step.training
        assert len(step.training) <= 7
    # Whoever is idle is as likely as any other to begin; slow ones are idle less often.
    counts = np.bincount([a.client for a in arrivals], minlength=40)
    assert counts.min() > 0


def test_the_seed_decides_all():
    def run(seed):
        times_s = training_times(9, median_s=1.0, spread=0.5, seed=seed)
        return list(islice(server_steps(times_s, concurrency=4, buffer=2, seed=seed), 20))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_training_times_are_lognormal():
    logs = np.log(training_times(20_000, median_s=60.0, spread=0.5, seed=0))
    assert logs.mean() == pytest.approx(np.log(60.0), abs=0.02)
    assert logs.std() == pytest.approx(0.5, abs=0.02)
    assert set(training_times(5, median_s=60.0, spread=0.0, seed=0)) == {60.0}
