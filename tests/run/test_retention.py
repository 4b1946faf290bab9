"""When to save and what to delete, as properties of two pure functions."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shardpar.run.options import CheckpointOptions
from shardpar.run.retention import due, expired

steps = st.lists(st.integers(0, 500), unique=True)
options = st.builds(
    CheckpointOptions,
    every_steps=st.integers(0, 20),
    every_s=st.sampled_from([0.0, 5.0]),
    keep=st.integers(1, 6),
    keep_every_steps=st.integers(0, 30),
)


@given(steps, options)
def test_the_newest_and_the_milestones_always_stay(
    steps: list[int], chosen: CheckpointOptions
) -> None:
    gone = set(expired(steps, chosen))
    stay = set(steps) - gone
    assert gone <= set(steps)
    assert set(sorted(steps)[-chosen.keep :]) <= stay
    if chosen.keep_every_steps:
        assert all(step % chosen.keep_every_steps for step in gone)
        others = [step for step in stay if step % chosen.keep_every_steps]
        assert len(others) <= chosen.keep
    else:
        assert len(stay) == min(len(steps), chosen.keep)


@given(steps, options)
def test_what_is_left_after_a_deletion_needs_none(
    steps: list[int], chosen: CheckpointOptions
) -> None:
    left = set(steps) - set(expired(steps, chosen))
    assert expired(left, chosen) == ()


@given(options, st.integers(1, 300))
def test_a_run_is_saved_at_each_multiple_and_never_twice(
    chosen: CheckpointOptions, total: int
) -> None:
    saved: list[int] = []
    last_s = 0.0
    for step in range(1, total + 1):
        last = saved[-1] if saved else 0
        for _ in range(2):
            if due(chosen, step=step, now_s=float(step), last_step=last, last_s=last_s):
                saved.append(step)
                last, last_s = step, float(step)
    assert len(saved) == len(set(saved))
    if chosen.every_steps:
        assert set(range(chosen.every_steps, total + 1, chosen.every_steps)) <= set(saved)
    if chosen.every_s:
        ends = [0, *saved]
        assert all(b - a <= chosen.every_s for a, b in pairwise(ends))
    if not chosen.every_steps and not chosen.every_s:
        assert saved == []
