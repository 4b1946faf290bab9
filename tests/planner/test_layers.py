"""Strategies for a chain of runs against brute force over every layer's choice."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.planner import knapsack, layers
from shardpar.planner.layers import Choice, Chosen, Run, bounds, choose, leanest_choice, least_bytes

TINY = 1e-9
FREE = ((0.0,),)
"""Changes of layout where there is only one."""

figures = st.integers(0, 4).map(float) | st.integers(0, 5000).map(lambda n: n / 1000)


@st.composite
def chains(draw, most_layers=6):
    """Runs whose changes of layout cost no more directly than through a third layout."""
    layouts = draw(st.integers(1, 3))
    runs, left = [], most_layers
    for _ in range(draw(st.integers(1, 3))):
        if not left:
            break
        count = draw(st.integers(1, min(left, 4)))
        left -= count
        scratch = st.just(0.0) | figures
        choice = st.builds(Choice, figures, figures, figures, scratch, st.integers(0, layouts - 1))
        choices = tuple(draw(st.lists(choice, min_size=1, max_size=3)))
        runs.append(Run(count, choices, draw(shortest_ways(layouts))))
    return runs


@st.composite
def shortest_ways(draw, size):
    cost = [[0.0 if a == b else draw(figures) for b in range(size)] for a in range(size)]
    for via, a, b in itertools.product(range(size), repeat=3):
        cost[a][b] = min(cost[a][b], cost[a][via] + cost[via][b])
    return tuple(map(tuple, cost))


def every_choice(runs, in_flight):
    """(seconds, bytes) of each way to choose for each layer, changes of layout included."""
    layer_runs = [run for run in runs for _ in range(run.count)]
    for picks in itertools.product(*(run.choices for run in layer_runs)):
        seconds = sum(c.seconds for c in picks) + sum(
            run.entry_s[before.border][after.border]
            for run, (before, after) in zip(
                layer_runs[1:], itertools.pairwise(picks), strict=True
            )
        )  # fmt: skip
        held = sum(c.state_bytes + in_flight * c.saved_bytes for c in picks)
        yield seconds, held + max(c.scratch_bytes for c in picks)


def best_of(every, limit):
    return min((s for s, b in every if b <= limit), default=math.inf)


def evaluated(chosen: Chosen, runs, in_flight):
    """Seconds and bytes of a choice, layer by layer."""
    assert [sum(n for _, n in order) for order in chosen.order] == [run.count for run in runs]
    picks = [
        (run, run.choices[i])
        for run, order in zip(runs, chosen.order, strict=True)
        for i, n in order
        for _ in range(n)
    ]
    seconds = sum(c.seconds for _, c in picks) + sum(
        run.entry_s[before.border][after.border]
        for (_, before), (run, after) in itertools.pairwise(picks)
    )
    held = sum(c.state_bytes + in_flight * c.saved_bytes for _, c in picks)
    return seconds, held + max(c.scratch_bytes for _, c in picks)


def between(every, share):
    low, high = min(b for _, b in every), max(b for _, b in every)
    return low + (high - low) * share


@settings(max_examples=150, deadline=None)
@given(chains(), st.floats(-0.1, 1.0), st.integers(1, 3))
def test_the_choice_is_the_best_of_all(runs, share, in_flight):
    every = list(every_choice(runs, in_flight))
    limit = between(every, share)
    chosen = choose(runs, limit, in_flight)
    if chosen is None:
        assert math.isinf(best_of(every, limit * (1 - TINY) - TINY))
        return
    seconds, num_bytes = evaluated(chosen, runs, in_flight)
    assert chosen.seconds == pytest.approx(seconds, rel=TINY, abs=TINY)
    # What is set aside for scratch is the largest of the layers chosen.
    assert chosen.num_bytes == pytest.approx(num_bytes, rel=TINY, abs=TINY)
    assert num_bytes <= limit * (1 + TINY) + TINY
    assert seconds <= best_of(every, limit) * (1 + TINY) + TINY
    assert chosen.lower_bound_s == pytest.approx(seconds, rel=TINY, abs=TINY)


@settings(max_examples=60, deadline=None)
@given(chains(), st.floats(0, 1), st.integers(1, 3), st.sampled_from([0.01, 0.2, 0.5]))
def test_with_an_epsilon_the_bound_is_still_true_and_the_choice_within_it(
    runs, share, in_flight, epsilon
):
    every = list(every_choice(runs, in_flight))
    limit = between(every, share) * (1 + TINY)
    chosen = choose(runs, limit, in_flight, epsilon)
    best = best_of(every, limit)
    assert evaluated(chosen, runs, in_flight)[1] <= limit * (1 + TINY) + TINY
    assert chosen.lower_bound_s <= best * (1 + TINY) + TINY
    assert chosen.lower_bound_s >= chosen.seconds * (1 - epsilon) * (1 - TINY) - TINY


@settings(max_examples=80, deadline=None)
@given(chains(5), st.floats(-0.1, 1.0), st.integers(1, 3), st.data())
def test_bounds_for_many_numbers_of_layers_hold_for_each(parts, share, in_flight, data):
    # Some parts have no layer at all: a stage need not reach every part.
    counts = np.array(
        data.draw(
            st.lists(
                st.tuples(*(st.integers(0, part.count) for part in parts)).filter(any),
                min_size=1, max_size=4,
            )
        )
    )  # fmt: skip
    limit = between(list(every_choice(parts, in_flight)), share)
    found = bounds(parts, counts, limit, in_flight)
    assert found.shape == (len(counts),)
    for row, least in zip(counts.tolist(), found, strict=True):
        runs = [replace(part, count=n) for part, n in zip(parts, row, strict=True) if n]
        best = best_of(every_choice(runs, in_flight), limit)
        assert least <= best * (1 + TINY) + TINY
        levels = {c.scratch_bytes for part in parts for c in part.choices}
        # More levels of scratch than this are merged, for a looser bound.
        if len(levels) <= 6 and math.isfinite(best):
            relaxed = min(relaxation(runs, level, limit, in_flight) for level in levels)
            assert least == pytest.approx(relaxed, rel=1e-7, abs=1e-7)


def relaxation(runs, level, limit, in_flight):
    """The knapsack's relaxation with so much scratch at most, changes of layout left out."""
    kinds = [
        knapsack.Kind(
            run.count,
            tuple(
                knapsack.Item(c.seconds, c.state_bytes + in_flight * c.saved_bytes)
                for c in run.choices
                if c.scratch_bytes <= level
            ),
        )
        for run in runs
    ]
    return knapsack.bound(kinds, limit - level)


@settings(max_examples=60, deadline=None)
@given(chains(5), st.integers(1, 3))
def test_the_least_bytes_are_those_of_the_leanest_choice(runs, in_flight):
    least = min(b for _, b in every_choice(runs, in_flight))
    assert least_bytes(runs, in_flight) == pytest.approx(least, rel=TINY, abs=TINY)
    assert choose(runs, least * (1 - 1e-6) - 1e-6, in_flight) is None
    chosen = choose(runs, least * (1 + TINY) + TINY, in_flight)
    assert chosen.num_bytes == pytest.approx(least, rel=1e-6, abs=1e-6)
    for run in runs:
        own = leanest_choice(run, in_flight)
        assert least_bytes([run], in_flight) == pytest.approx(
            least_bytes([replace(run, choices=(run.choices[own],))], in_flight)
        )


def test_a_change_of_layout_is_paid_once_and_equal_layouts_are_neighbours():
    slow, fast = Choice(3.0, 1.0, 0.0, 0.0, 0), Choice(1.0, 3.0, 0.0, 0.0, 1)
    there = ((0.0, 0.5), (0.5, 0.0))
    chosen = choose([Run(6, (slow, fast), there)], 12.0, 1)
    # Three fast ones fit: 3 x 3 + 3 x 1; they stand together.
    assert chosen in (
        Chosen((((0, 3), (1, 3)),), 12.5, 12.0, 12.5),
        Chosen((((1, 3), (0, 3)),), 12.5, 12.0, 12.5),
    )


def test_a_change_of_layout_dearer_than_what_it_saves_is_not_made():
    slow, fast = Choice(3.0, 1.0, 0.0, 0.0, 0), Choice(1.0, 3.0, 0.0, 0.0, 1)
    there = ((0.0, 6.5), (6.5, 0.0))
    chosen = choose([Run(6, (slow, fast), there)], 12.0, 1)
    assert chosen == Chosen((((0, 6),),), 18.0, 6.0, 18.0)


def test_a_run_ends_in_the_layout_that_the_next_one_starts_in():
    either = (Choice(1.0, 3.0, 0.0, 0.0, 1), Choice(3.0, 1.0, 0.0, 0.0, 0))
    there = ((0.0, 0.5), (0.5, 0.0))
    first, last = Run(1, (either[0],), there), Run(1, (either[1],), there)
    runs = [first, Run(4, either, there), last]
    # Two of the four fit fast; border 1 first, so that the last layer's 0 is met without a change.
    assert choose(runs, 3 + 8 + 1, 1).order == (((0, 1),), ((0, 2), (1, 2)), ((0, 1),))
    assert choose(runs[::-1], 3 + 8 + 1, 1).order == (((0, 1),), ((1, 2), (0, 2)), ((0, 1),))


def test_scratch_counts_once_and_activations_once_per_microbatch_in_flight():
    big = Choice(1.0, 2.0, 1.0, 5.0, 0)
    run = Run(3, (big,), FREE)
    for in_flight in (1, 2, 4):
        needed = 3 * (2.0 + in_flight * 1.0) + 5.0
        assert choose([run], needed, in_flight).num_bytes == needed
        assert choose([run], needed - 0.01, in_flight) is None


def test_less_scratch_may_be_bought_with_seconds():
    """All layers must give up the scratch to gain from it: no one of them alone does."""
    big, small = Choice(1.0, 1.0, 0.0, 6.0, 0), Choice(2.0, 1.0, 0.0, 0.0, 0)
    runs = [Run(2, (big, small), FREE), Run(2, (big, small), FREE)]
    assert choose(runs, 10.0, 1).seconds == 4.0
    assert choose(runs, 9.0, 1) == Chosen((((1, 2),), ((1, 2),)), 8.0, 4.0, 8.0)


def test_what_does_not_fit_is_none():
    runs = [Run(2, (Choice(1.0, 3.0, 0.0, 0.0, 0), Choice(2.0, 2.0, 0.0, 1.0, 0)), FREE)]
    assert choose(runs, 4.999, 1) is None
    assert choose(runs, 5.0, 1).seconds == 4.0


def test_a_search_cut_short_says_how_far_it_may_be_off(monkeypatch):
    monkeypatch.setattr(layers, "MAX_PATHS", 1)
    slow, fast = Choice(3.0, 1.0, 0.0, 0.0, 0), Choice(1.0, 3.0, 0.0, 0.0, 1)
    chosen = choose([Run(6, (slow, fast), ((0.0, 0.5), (0.5, 0.0)))], 12.0, 1)
    # The one order looked at has no change of layout; the best with one takes 12.5.
    assert chosen.seconds == 18.0
    assert chosen.lower_bound_s <= 12.5


def test_a_hundred_layers_of_three_layouts_have_no_gap():
    draw = np.random.default_rng(0)
    choices = tuple(
        Choice(*draw.uniform(1, 3, 2), *draw.uniform(0, 1, 2), int(border))
        for border in draw.integers(0, 3, 12)
    )
    place = draw.uniform(0, 0.2, 3)
    there = tuple(tuple(abs(a - b) for b in place) for a in place)
    runs = [Run(1, choices[:4], there), Run(96, choices, there), Run(1, choices[4:8], there)]
    low = least_bytes(runs, 2)
    chosen = choose(runs, low * 1.2, 2)
    assert chosen.num_bytes <= low * 1.2
    assert chosen.lower_bound_s == pytest.approx(chosen.seconds, rel=1e-12)
    assert evaluated(chosen, runs, 2) == pytest.approx((chosen.seconds, chosen.num_bytes))
    (least,) = bounds(runs, np.array([[1, 96, 1]]), low * 1.2, 2)
    assert chosen.seconds * 0.98 < least <= chosen.seconds
