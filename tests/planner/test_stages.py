"""The division of layers over stages against brute force over all cuts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.planner.stages import Division, StageSeconds, divide, most_even, relaxed

TINY = 1e-9


@st.composite
def tables(draw, most_layers=7, most_stages=4):
    """(exact seconds, lower bounds of them), per stage [layers + 1, layers + 1]."""
    layers = draw(st.integers(1, most_layers))
    stages = draw(st.integers(1, most_stages))
    seed = draw(st.integers(0, 2**32 - 1))
    whole, loose = draw(st.booleans()), draw(st.sampled_from([1.0, 0.9, 0.5, 0.0]))
    missing = draw(st.sampled_from([0.0, 0.2, 0.6]))
    random = np.random.default_rng(seed)
    exact, lower = [], []
    for _ in range(stages):
        first, end = np.indices((layers + 1, layers + 1))
        seconds = (end - first) * random.uniform(0.5, 1.5, first.shape)
        seconds = np.round(seconds) if whole else seconds
        nothing = (end <= first) | (random.random(first.shape) < missing)
        exact.append(np.where(nothing, np.inf, seconds))
        # A bound may be finite where nothing fits, but not the other way round.
        unknown = nothing & (end > first) & (random.random(first.shape) < 0.5)
        below = seconds * random.uniform(loose, 1.0, first.shape)
        lower.append(np.where(nothing & ~unknown, np.inf, below))
    return exact, lower


def step_s(exact, cuts, microbatches):
    times = [exact[s][a, b] for s, (a, b) in enumerate(itertools.pairwise(cuts))]
    slowest = max(times)
    return math.inf if math.isinf(slowest) else sum(times) + (microbatches - 1) * slowest


def all_cuts(exact):
    layers = exact[0].shape[0] - 1
    for inner in itertools.combinations(range(1, layers), len(exact) - 1):
        yield (0, *inner, layers)


def brute_force(exact, microbatches):
    every = (step_s(exact, cuts, microbatches) for cuts in all_cuts(exact))
    return min(every, default=math.inf)


def table_of(exact, lower, asked=None):
    def solve(stage, first, end):
        if asked is not None:
            asked.append((stage, first, end))
        return float(exact[stage][first, end])

    return StageSeconds([t.copy() for t in lower], solve)


@settings(max_examples=150, deadline=None)
@given(tables(), st.integers(1, 8))
def test_the_division_is_the_best_of_all(both, microbatches):
    exact, lower = both
    asked: list[tuple[int, int, int]] = []
    best = brute_force(exact, microbatches)
    found = divide(table_of(exact, lower, asked), microbatches)
    assert len(set(asked)) == len(asked), "a stage is solved once at most"
    if found is None:
        assert math.isinf(best)
        return
    assert found.cuts in set(all_cuts(exact))
    assert found.step_s == pytest.approx(best, rel=TINY)
    assert found.step_s == pytest.approx(step_s(exact, found.cuts, microbatches), rel=TINY)
    assert found.lower_bound_s == pytest.approx(found.step_s, rel=TINY)


@settings(max_examples=80, deadline=None)
@given(tables(), st.integers(1, 8), st.sampled_from([0.01, 0.2, 0.6]))
def test_with_an_epsilon_the_bound_is_still_true_and_the_division_within_it(
    both, microbatches, epsilon
):
    exact, lower = both
    best, found = brute_force(exact, microbatches), divide(
        table_of(exact, lower), microbatches, epsilon
    )  # fmt: skip
    if found is None:
        assert math.isinf(best)
        return
    assert found.step_s == pytest.approx(step_s(exact, found.cuts, microbatches), rel=TINY)
    assert found.lower_bound_s <= best * (1 + TINY)
    assert found.lower_bound_s >= found.step_s * (1 - epsilon) * (1 - TINY)


@settings(max_examples=80, deadline=None)
@given(tables(), st.integers(1, 8), st.floats(0.5, 1.5))
def test_only_a_division_below_the_cutoff_is_of_interest(both, microbatches, share):
    exact, lower = both
    best = brute_force(exact, microbatches)
    cutoff = best * share if math.isfinite(best) else 1.0
    found = divide(table_of(exact, lower), microbatches, cutoff=cutoff)
    if best < cutoff * (1 - TINY):
        assert found.step_s == pytest.approx(best, rel=TINY)
    elif found is not None:
        # The best of these is not below the cutoff, and its bound says so.
        assert found.lower_bound_s >= cutoff * (1 - TINY)


@settings(max_examples=100, deadline=None)
@given(tables(), st.integers(1, 8))
def test_relaxed_is_the_best_for_the_seconds_as_they_stand(both, microbatches):
    _, lower = both
    best = brute_force(lower, microbatches)
    found, cuts = relaxed(lower, microbatches)
    assert found == pytest.approx(best, rel=TINY)
    assert (cuts == ()) == math.isinf(best)
    if cuts:
        assert step_s(lower, cuts, microbatches) == pytest.approx(best, rel=TINY)


@settings(max_examples=100, deadline=None)
@given(tables(), st.integers(1, 8), st.floats(0.5, 1.5), st.sampled_from([0.0, 0.05, 0.3]))
def test_relaxed_bounds_every_division_that_is_of_interest(both, microbatches, share, slack):
    _, lower = both
    best = brute_force(lower, microbatches)
    cutoff = best * share if math.isfinite(best) else 1.0
    found, cuts = relaxed(lower, microbatches, cutoff, slack)
    if best >= cutoff:
        assert cuts == ()
        # Nothing takes less than the cutoff; the bound says so, or nearly.
        assert found >= cutoff * (1 - slack) * (1 - TINY)
        return
    assert best * (1 - slack) * (1 - TINY) <= found <= best * (1 + TINY)
    if cuts:
        assert step_s(lower, cuts, microbatches) * (1 - slack) <= found * (1 + TINY)
    else:
        assert slack > 0
        assert found >= cutoff * (1 - slack) * (1 - TINY)


@settings(max_examples=100, deadline=None)
@given(tables())
def test_the_most_even_division_has_the_least_of_the_costliest_stages(both):
    costs, _ = both
    worst = {
        cuts: max(costs[s][a, b] for s, (a, b) in enumerate(itertools.pairwise(cuts)))
        for cuts in all_cuts(costs)
    }
    best = min(worst.values(), default=math.inf)
    found, cuts = most_even(costs)
    assert found == best
    assert (cuts == ()) == math.isinf(best)
    if cuts:
        assert worst[cuts] == best


def test_costs_below_zero_are_divided_evenly_too():
    """Bytes over the limit are negative where there is room."""
    over = np.full((4, 4), np.inf)
    for first, end in itertools.combinations(range(4), 2):
        over[first, end] = (end - first) - 5.0
    assert most_even([over, over]) == (-3.0, (0, 1, 3))


def equal_layers(layers):
    first, end = np.indices((layers + 1, layers + 1))
    return np.where(end > first, (end - first).astype(float), np.inf)


def test_equal_layers_are_divided_evenly_by_many_microbatches():
    seconds = equal_layers(12)
    found = divide(table_of([seconds] * 4, [seconds] * 4), 8)
    assert found == Division((0, 3, 6, 9, 12), 12.0 + 7 * 3.0, 12.0 + 7 * 3.0)


def test_with_more_stages_than_layers_there_is_no_division():
    seconds = equal_layers(2)
    assert divide(table_of([seconds] * 3, [seconds] * 3), 4) is None
    assert relaxed([seconds] * 3, 4) == (math.inf, ())
    assert most_even([seconds] * 3) == (math.inf, ())


def test_few_of_many_stages_are_solved_where_bounds_are_close():
    layers = 24
    random = np.random.default_rng(0)
    true = [equal_layers(layers) * random.uniform(1, 1.3, (layers + 1, 1)) for _ in range(6)]
    lower = [t * random.uniform(0.995, 1.0, t.shape) for t in true]
    asked: list[tuple[int, int, int]] = []
    found = divide(table_of(true, lower, asked), 16)
    exact = divide(table_of(true, true), 16)
    assert found == exact
    assert len(asked) < 6 * layers * (layers + 1) / 2 / 10
