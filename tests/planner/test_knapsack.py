"""The multiset choice against brute force over all layers, and against HiGHS where that is slow."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from shardpar.planner import knapsack
from shardpar.planner.knapsack import Item, Kind, Picked, bound, pick

TINY = 1e-9

# Whole numbers make ties and equal items common; figures too small to be real are left out.
figures = st.integers(0, 6).map(float) | st.integers(0, 10_000).map(lambda n: n / 1000)
items = st.builds(Item, figures, figures)
kinds = st.builds(
    Kind, st.integers(0, 4), st.lists(items, min_size=1, max_size=4).map(tuple)
)  # fmt: skip
problems = st.lists(kinds, min_size=0, max_size=3)


def brute_force(kinds, limit):
    """Seconds of the best choice, an item for each layer of each kind."""
    sums = [(0.0, 0.0)]
    for kind in kinds:
        own = [
            (sum(i.seconds for i in taken), sum(i.num_bytes for i in taken))
            for taken in itertools.combinations_with_replacement(kind.items, kind.count)
        ]
        sums = [(s + t, b + c) for (s, b), (t, c) in itertools.product(sums, own)]
    return min((s for s, b in sums if b <= limit), default=math.inf)


def limits_of(kinds):
    """Bytes of the leanest and of the fattest choice."""
    return tuple(
        sum(kind.count * of(i.num_bytes for i in kind.items) for kind in kinds)
        for of in (min, max)
    )  # fmt: skip


def assert_is_a_choice(picked: Picked, kinds, limit):
    """Its counts are whole, of the right number, add up to its sums, and fit."""
    assert len(picked.counts) == len(kinds)
    pairs = []
    for kind, row in zip(kinds, picked.counts, strict=True):
        assert len(row) == len(kind.items)
        assert all(n >= 0 and n == int(n) for n in row)
        assert sum(row) == kind.count
        pairs += zip(row, kind.items, strict=True)
    assert picked.seconds == pytest.approx(sum(n * i.seconds for n, i in pairs), rel=TINY)
    assert picked.num_bytes == pytest.approx(sum(n * i.num_bytes for n, i in pairs), rel=TINY)
    assert picked.num_bytes <= limit * (1 + TINY)


@settings(max_examples=150, deadline=None)
@given(problems, st.floats(-0.1, 1.1))
def test_the_choice_is_the_best_of_all(kinds, share):
    low, high = limits_of(kinds)
    limit = low + (high - low) * share
    best, picked = brute_force(kinds, limit), pick(kinds, limit)
    if picked is None:
        # What misses the limit by a rounding error may count as fitting, but not the other way.
        assert math.isinf(best)
        return
    assert_is_a_choice(picked, kinds, limit)
    assert picked.seconds <= best * (1 + TINY) + TINY
    loose = brute_force(kinds, limit + TINY * (abs(limit) + 1))
    assert picked.seconds >= loose * (1 - TINY) - TINY
    assert picked.lower_bound_s == pytest.approx(picked.seconds, rel=TINY, abs=TINY)


@settings(max_examples=100, deadline=None)
@given(problems, st.floats(0, 1.1))
def test_the_relaxation_is_what_a_linear_programme_says(kinds, share):
    low, high = limits_of(kinds)
    limit = low + (high - low) * share
    flat = [(g, item) for g, kind in enumerate(kinds) for item in kind.items]
    # Room for rounding, or a limit that is met exactly would be infeasible to the solver.
    room = limit + 1e-12 * (1 + abs(limit))
    if not flat:
        assert bound(kinds, limit) == 0.0
        return
    found = linprog(
        [item.seconds for _, item in flat],
        A_ub=[[item.num_bytes for _, item in flat]], b_ub=[room],
        A_eq=[[float(g == k) for g, _ in flat] for k in range(len(kinds))],
        b_eq=[kind.count for kind in kinds],
    )  # fmt: skip
    assert found.status == 0
    assert bound(kinds, limit) == pytest.approx(found.fun, rel=1e-6, abs=1e-6)
    assert bound(kinds, limit) <= pick(kinds, limit).seconds * (1 + TINY) + TINY


def by_highs(kinds, limit):
    """The optimum of the integer programme."""
    flat = [(g, item) for g, kind in enumerate(kinds) for item in kind.items]
    found = milp(
        [item.seconds for _, item in flat],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, np.inf),
        constraints=[
            LinearConstraint([[item.num_bytes for _, item in flat]], -np.inf, limit),
            LinearConstraint(
                [[float(g == k) for g, _ in flat] for k in range(len(kinds))],
                [kind.count for kind in kinds], [kind.count for kind in kinds],
            ),
        ],
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    return found.fun if found.success else math.inf


def mid_sized(seed, digits=None):
    """Some ten to forty layers of up to three kinds, and a limit that binds."""
    draw = random.Random(seed)
    kinds = []
    for _ in range(draw.randint(1, 3)):
        trade = sorted(draw.uniform(1, 20) for _ in range(draw.randint(2, 12)))
        kinds.append(
            Kind(
                draw.randint(5, 15),
                tuple(Item(30 / b * draw.uniform(0.8, 1.2), b) for b in trade),
            )
        )
    if digits is not None:
        kinds = [
            Kind(
                k.count, tuple(Item(round(i.seconds, digits), round(i.num_bytes)) for i in k.items)
            )
            for k in kinds
        ]
    low, high = limits_of(kinds)
    return kinds, low + (high - low) * draw.uniform(0.05, 0.8)


@pytest.mark.parametrize("digits", [None, 2, 0])
@pytest.mark.parametrize("seed", range(12))
def test_mid_sized_choices_are_those_of_an_integer_programme(seed, digits):
    kinds, limit = mid_sized(seed, digits)
    picked, best = pick(kinds, limit), by_highs(kinds, limit)
    assert_is_a_choice(picked, kinds, limit)
    assert picked.seconds == pytest.approx(best, rel=1e-7)
    assert picked.lower_bound_s == picked.seconds


@pytest.mark.parametrize("seed", range(20))
def test_near_ties_are_told_apart(seed):
    draw = random.Random(seed)
    items = tuple(Item(1 + draw.uniform(-1, 1) * 1e-6, 1 + draw.uniform(-1, 1) * 1e-6)
                  for _ in range(5))  # fmt: skip
    kinds = [Kind(6, items), Kind(3, items[:3])]
    low, high = limits_of(kinds)
    limit = (low + high) / 2
    picked = pick(kinds, limit)
    assert_is_a_choice(picked, kinds, limit)
    assert picked.seconds == pytest.approx(brute_force(kinds, limit), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(problems, st.floats(0, 1), st.sampled_from([0.01, 0.1, 0.5]))
def test_with_an_epsilon_the_bound_is_still_true_and_the_choice_within_it(kinds, share, epsilon):
    low, high = limits_of(kinds)
    limit = low + (high - low) * share
    picked, best = pick(kinds, limit, epsilon), brute_force(kinds, limit)
    assert_is_a_choice(picked, kinds, limit)
    assert picked.lower_bound_s <= best * (1 + TINY) + TINY
    assert picked.lower_bound_s >= picked.seconds * (1 - epsilon) * (1 - TINY) - TINY


def test_a_search_that_is_cut_short_says_how_far_it_may_be_off(monkeypatch):
    monkeypatch.setattr(knapsack, "MAX_TRIED", 1)
    gaps = []
    for seed in range(12):
        kinds, limit = mid_sized(seed)
        picked = pick(kinds, limit)
        assert_is_a_choice(picked, kinds, limit)
        best = by_highs(kinds, limit)
        assert picked.lower_bound_s <= best * (1 + 1e-7) <= picked.seconds * (1 + 2e-7)
        gaps.append(picked.seconds - picked.lower_bound_s)
    assert max(gaps) > 0


def test_equal_items_in_several_kinds_keep_their_own_counts():
    fast, lean = Item(1.0, 10.0), Item(2.0, 4.0)
    kinds = [Kind(2, (fast, lean)), Kind(3, (lean, fast)), Kind(2, (fast, lean))]
    picked = pick(kinds, 40.0)
    assert_is_a_choice(picked, kinds, 40.0)
    assert picked == Picked(picked.counts, 12.0, 40.0, 12.0)  # two fast ones of seven


def test_of_no_layers_nothing_is_chosen():
    assert pick([], 0.0) == Picked((), 0.0, 0.0, 0.0)
    assert pick([Kind(0, (Item(1.0, 2.0),)), Kind(0, ())], 0.0) == Picked(((0,), ()), 0, 0, 0)
    assert bound([], 0.0) == 0.0


def test_what_does_not_fit_is_none_and_its_bound_endless():
    kinds = [Kind(3, (Item(1.0, 10.0), Item(2.0, 4.0)))]
    assert pick(kinds, 11.999) is None
    assert bound(kinds, 11.999) == math.inf
    assert pick(kinds, 12.0) == Picked(((0, 3),), 6.0, 12.0, 6.0)
    assert pick([Kind(1, ())], 100.0) is None
    assert bound([Kind(1, ())], 100.0) == math.inf


def test_with_room_for_all_each_layer_is_as_fast_as_it_can_be():
    kinds = [Kind(5, (Item(3.0, 1.0), Item(1.0, 7.0), Item(1.0, 6.0), Item(2.0, 2.0)))]
    assert pick(kinds, 30.0) == Picked(((0, 0, 5, 0),), 5.0, 30.0, 5.0)


def test_thousands_of_equal_layers_are_no_harder_than_a_few():
    kinds = [Kind(5000, (Item(10.0, 1.0), Item(6.0, 4.0), Item(3.0, 7.5), Item(1.0, 13.0)))]
    picked = pick(kinds, 31_234.7)
    assert_is_a_choice(picked, kinds, 31_234.7)
    assert picked.seconds == pytest.approx(by_highs(kinds, 31_234.7), rel=1e-9)
