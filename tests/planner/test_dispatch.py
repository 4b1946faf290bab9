"""The dispatcher against brute force, its certificate, and what it refuses."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import DataError, PlanError
from shardpar.planner import dispatch as module
from shardpar.planner.dispatch import PipelineSpeed, dispatch

SPEEDS = st.builds(
    PipelineSpeed,
    token_cap=st.sampled_from([4, 8, 16]),
    token_s=st.sampled_from([0.5, 1.0, 1.7]),
    pair_s=st.sampled_from([0.0, 0.1, 0.9]),
    fixed_s=st.sampled_from([0.0, 3.0, 11.0]),
)
LENGTHS = st.lists(st.integers(1, 16), max_size=6)
WIDEST = PipelineSpeed(16, 1.0, 0.05)


def pipeline_seconds(home, lengths, pipelines):
    return [
        p.fixed_s + sum(p.seconds(1, n) for n, h in zip(lengths, home, strict=True) if h == i)
        for i, p in enumerate(pipelines)
    ]


def brute_force(lengths, pipelines):
    homes = itertools.product(range(len(pipelines)), repeat=len(lengths))
    return min(
        max(pipeline_seconds(home, lengths, pipelines))
        for home in homes
        if all(n <= pipelines[h].token_cap for n, h in zip(lengths, home, strict=True))
    )


def require_sound(found, lengths, pipelines):
    assert sorted(itertools.chain(*found.sequences)) == list(range(len(lengths)))
    home = {i: p for p, numbers in enumerate(found.sequences) for i in numbers}
    seconds = pipeline_seconds([home[i] for i in range(len(lengths))], lengths, pipelines)
    np.testing.assert_allclose(found.pipeline_s, seconds)
    for pipeline, numbers, batches in zip(
        pipelines, found.sequences, found.microbatches, strict=True
    ):
        assert sorted(itertools.chain(*batches)) == list(numbers)
        assert all(sum(lengths[i] for i in batch) <= pipeline.token_cap for batch in batches)
    assert found.lower_bound_s <= found.step_s


@settings(deadline=None, max_examples=150)
@given(LENGTHS, st.lists(SPEEDS, max_size=2), st.sampled_from([0.0, 0.1]))
def test_it_is_as_good_as_it_says_and_as_brute_force(lengths, others, gap):
    pipelines = [WIDEST, *others]
    found = dispatch(lengths, pipelines, gap)
    require_sound(found, lengths, pipelines)
    best = brute_force(lengths, pipelines)
    assert best <= found.step_s * (1 + 1e-9)
    assert found.step_s <= best * (1 + gap + 1e-6)
    assert found.lower_bound_s <= best * (1 + 1e-9)
    assert found.gap <= gap + 1e-6
    assert dispatch(lengths, pipelines, gap) == found


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 16), min_size=5, max_size=7), st.lists(SPEEDS, max_size=2))
def test_classes_of_like_lengths_keep_caps_and_bounds(lengths, others):
    pipelines = [WIDEST, *others]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST_CLASSES", 3)
        found = dispatch(lengths, pipelines, gap=0.0)
    require_sound(found, lengths, pipelines)
    assert found.lower_bound_s <= brute_force(lengths, pipelines) * (1 + 1e-9)


def long_tailed(count):
    return np.clip(np.random.default_rng(0).lognormal(6.9, 1.2, count), 2, 32768).astype(int)


def test_thousands_of_sequences_take_less_than_a_steps_time_and_are_within_the_gap():
    pipelines = [
        PipelineSpeed(32768, 1e-5, 4e-10, 0.05),
        PipelineSpeed(16384, 1.5e-5, 5e-10, 0.04),
        *[PipelineSpeed(4096, 3e-5, 1e-9, 0.02)] * 3,
    ]
    lengths = long_tailed(4000)
    start = time.process_time()
    found = dispatch(lengths.tolist(), pipelines, gap=0.01)
    assert time.process_time() - start < 5.0
    require_sound(found, lengths.tolist(), pipelines)
    assert found.gap <= 0.01


def test_an_integer_programme_is_solved_where_nothing_else_is_good_enough():
    # Longest first, and single moves from there, end at 10 or 11; 5+4, 5+4 and 3+3+3 at 9.
    found = dispatch([5, 5, 4, 4, 3, 3, 3], [PipelineSpeed(8, 1.0)] * 3, gap=0.0)
    assert found.step_s == pytest.approx(9.0)
    assert found.gap == pytest.approx(0.0, abs=1e-8)


def test_nothing_to_do_takes_what_is_fixed():
    found = dispatch([], [PipelineSpeed(8, 1.0, fixed_s=2.0), PipelineSpeed(8, 1.0)])
    assert (found.step_s, found.lower_bound_s, found.sequences) == (2.0, 2.0, ((), ()))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: dispatch([1], []),
            PlanError,
            "sequences were to be dispatched to no pipeline; give one or more",
        ),
        (
            lambda: dispatch([4, 0], [WIDEST]),
            DataError,
            "sequence 1 has 0 tokens; leave out what has none",
        ),
        (
            lambda: dispatch([4, 17], [WIDEST]),
            PlanError,
            "sequence 1 has 17 tokens and no pipeline takes more than 16; cut it, or plan a "
            "pipeline whose token_cap is 17",
        ),
        (
            lambda: PipelineSpeed(8, 0.0),
            PlanError,
            "a pipeline has token_cap=8, token_s=0.0, pair_s=0.0, fixed_s=0.0; the first two must "
            "be more than 0, the others 0 or more",
        ),
    ],
)
def test_what_cannot_be_dispatched_is_refused(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message
