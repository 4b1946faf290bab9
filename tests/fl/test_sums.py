"""Secure sums one after the other: exact, the same everywhere, and refused where parties differ."""

import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import PartyError, RunError, SpecError
from shardpar.fl.messages import decode, encode
from shardpar.fl.sums import Alone, error_of, total_counts, total_magnitudes, total_values
from shardpar.fl.sums_messages import Finished, FromSums, Refused, ToSums, Total, Wanted
from tests.fl.analysis import each, together
from tests.fl.test_secagg_wire import mutated

MUTANTS = 200_000 if "SHARDPAR_LONG" in os.environ else 20_000


@settings(max_examples=10, deadline=None)
@given(
    st.integers(2, 4).flatmap(
        lambda parties: st.lists(
            st.tuples(*[st.integers(0, (1 << 31) // parties - 1)] * parties), min_size=1, max_size=9
        )
    )
)
def test_counts_are_exact_up_to_the_largest(columns):
    parts = np.array(columns).T
    found = together(list(parts), lambda sums, part: total_counts(sums, "counts", part))
    assert found.tolist() == [sum(column) for column in columns]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_values_are_within_the_stated_error(data):
    size, parties = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 4))
    bounds = np.array(data.draw(st.lists(st.floats(1e-9, 1e9), min_size=size, max_size=size)))
    shares = st.floats(-1 / parties, 1 / parties)
    parts = [
        bounds * data.draw(st.lists(shares, min_size=size, max_size=size)) for _ in range(parties)
    ]
    exact = np.sum(parts, axis=0)
    found = together(parts, lambda sums, part: total_values(sums, "values", part, bounds))
    error = error_of(bounds, parties)
    assert (np.abs(found - exact) <= error).all()
    assert (error <= parties * bounds * 2.0**-29).all()
    fine = together(
        [np.abs(part) for part in parts],
        lambda sums, part: total_magnitudes(sums, "magnitudes", part, bounds),
    )
    exact = np.abs(parts).sum(axis=0)
    assert (np.abs(fine - exact) <= parties * exact * 2.0**-29 + parties * error * 2.0**-29).all()


def test_several_sums_are_numbered():
    outcomes = each([1, 2, 3], lambda sums, n: [int(total_counts(sums, "n", np.array([n]))[0])] * 4)
    assert outcomes.pop("server") == 1
    assert all(found == [6, 6, 6, 6] for found in outcomes.values())

    def four(sums, n):
        return [int(total_counts(sums, f"n {at}", np.array([n * at]))[0]) for at in range(4)]

    outcomes = each([1, 2, 3], four)
    assert outcomes.pop("server") == 4
    assert all(found == [0, 6, 12, 18] for found in outcomes.values())


def test_parties_that_want_different_sums_are_told_of_each_other():
    outcomes = each(["mean", "mean", "median"], lambda s, n: total_counts(s, n, np.array([1])))
    assert isinstance(outcomes.pop("server"), RunError)
    for outcome in outcomes.values():
        assert isinstance(outcome, PartyError)
        assert "party 2 'median' of 1 words, number 0" in str(outcome)


def test_a_party_that_vanishes_ends_the_job_for_all():
    def work(sums, part):
        if part == 2:
            raise KeyError("gone")
        return total_counts(sums, "n", np.array([part]))

    outcomes = each([0, 1, 2], work)
    assert isinstance(outcomes.pop("party 2"), KeyError)
    assert all(isinstance(outcome, PartyError) for outcome in outcomes.values())


def test_what_would_not_fit_is_refused_before_it_is_sent():
    two = Alone(parties=2)
    with pytest.raises(SpecError, match="not all between 0 and 1073741823"):
        total_counts(two, "n", np.array([1 << 30]))
    with pytest.raises(SpecError, match="not all between 0"):
        total_counts(two, "n", np.array([-1]))
    with pytest.raises(SpecError, match="beyond their bounds"):
        total_values(two, "n", np.array([1.1]), np.array([1.0]))
    with pytest.raises(SpecError, match="beyond their bounds"):
        total_values(two, "n", np.array([np.nan]), np.array([1.0]))
    with pytest.raises(SpecError, match="negative"):
        total_magnitudes(two, "n", np.array([-1.0]), np.array([1.0]))
    outcomes = each([0, 1], lambda sums, part: sums.add("n", np.empty(0, np.uint32)))
    assert "has 1 to" in str(outcomes["party 0"])


def test_what_the_aggregator_sees_are_masked_words_and_the_total():
    seen = []

    def work(sums, part):
        send = sums.channel.send

        def noted(to, topic, message):
            seen.append(encode(message))
            send(to, topic, message)

        sums.channel.send = noted
        return total_counts(sums, "n", np.full(64, part))

    found = together([11, 22], work)
    assert (found == 33).all()
    for part in (11, 22):
        plain = np.full(64, part, "<u4").tobytes()
        assert not any(plain in data for data in seen)


def test_mutants_of_messages_are_refused_or_read():
    bodies = [
        ToSums(Wanted(3, "rows", 8)),
        ToSums(Finished()),
        FromSums(Total(3, bytes(32))),
        FromSums(Refused("why")),
    ]
    draw, understood = random.Random(0), 0
    for at in range(MUTANTS):
        message = bodies[at % len(bodies)]
        try:
            decode(mutated(encode(message), draw), type(message))
            understood += 1
        except PartyError:
            pass
    assert understood > MUTANTS // 200
