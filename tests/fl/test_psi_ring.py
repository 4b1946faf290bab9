"""Intersections of three parties and more: against Python's sets, and what the evaluator sees."""

import threading
from functools import partial, reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import PartyError, SpecError
from shardpar.fl import psi_blinding, psi_ring
from shardpar.fl.he.pool import Pool
from shardpar.fl.psi_messages import BlindedIds, CommonIds
from shardpar.fl.psi_ring import align_all, path_of, places_of_common
from shardpar.fl.psi_session import PsiSession
from tests.fl.intersections import blames, in_threads


def all_of(ids, learners=(), change=None, **options):
    session = PsiSession("job", tuple(ids), learners=learners)

    def party(mine, end):
        if change is not None:
            change(end)
        return align_all(end, mine, session, **options)

    return in_threads({name: partial(party, mine) for name, mine in ids.items()})


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 12).map(str), unique=True, max_size=12), min_size=3, max_size=5
    )
)
def test_rows_line_up_at_all_parties(sets):
    ids = {f"party {at}": mine for at, mine in enumerate(sets)}
    rows = all_of(ids)
    named = [[mine[row] for row in rows[name]] for name, mine in ids.items()]
    assert all(one == named[0] for one in named)
    assert set(named[0]) == reduce(set.intersection, map(set, sets))
    assert len(set(named[0])) == len(named[0])


@pytest.fixture
def short_windows(monkeypatch):
    for module in (psi_ring, psi_blinding):
        monkeypatch.setattr(module, "WINDOW_IDS", 8)
    monkeypatch.setattr(psi_blinding, "_JOB_IDS", 4)


@pytest.mark.parametrize("sizes", [(50, 9, 30, 17), (8, 16, 24), (1, 40, 2), (0, 9, 9)])
def test_sets_of_any_sizes_walk_in_windows(short_windows, sizes):
    ids = {f"p{at}": [str(i) for i in range(size)][::-1] for at, size in enumerate(sizes)}
    seen = []
    rows = all_of(ids, progress=lambda done, total: seen.append((done, total)))
    for name, mine in ids.items():
        assert {mine[row] for row in rows[name]} == {str(i) for i in range(min(sizes))}
    assert max(seen) == (sum(sizes), sum(sizes))


@pytest.mark.parametrize("learners", [("e",), ("a",), ("a", "b")])
def test_only_learners_learn(learners):
    ids = {"e": ["1", "2", "3"], "a": ["3", "1"], "b": ["0", "1", "9", "3"]}
    rows = all_of(ids, learners)
    for name, mine in ids.items():
        if name in learners:
            assert {mine[row] for row in rows[name]} == {"1", "3"}
        else:
            assert rows[name] is None


def test_processes_come_to_the_same_rows():
    ids = {
        name: [str(at) for at in range(start, start + 60)]
        for name, start in zip("eab", (0, 20, 40), strict=True)
    }
    with Pool(2) as pool:
        rows = all_of(ids, pool=pool)
    assert {ids["e"][row] for row in rows["e"]} == {str(at) for at in range(40, 60)}


def test_two_parties_are_told_where_to_go():
    outcomes = all_of({"e": ["1"], "a": ["1"]})
    assert all("two use shardpar.fl.psi" in str(outcome) for outcome in outcomes.values())
    assert all(isinstance(outcome, SpecError) for outcome in outcomes.values())


@pytest.mark.parametrize("count", [3, 4, 7])
def test_every_set_passes_everyone_once_and_ends_at_the_evaluator(count):
    parties = tuple(map(str, range(count)))
    for owner in parties:
        path = path_of(parties, owner)
        assert path[0] == owner
        assert path[-1] == parties[0]
        assert set(path) == set(parties)
        assert len(path) == count + (owner == parties[0])


def own_ids_that_the_evaluator_finds_at_one_party(monkeypatch, order) -> str:
    """The evaluator wants to know which of its ids party a has; that party b misses most of them.

    It sends its own in the order of its rows, and looks whether places survive the walk.
    """
    real, tags = psi_ring.secret_order, {}

    def drawn(count):
        mine = threading.current_thread().name == "e"
        return np.arange(count) if mine else (order or real)(count)

    def noted(found):
        tags.update(found)
        return places_of_common(found)

    ids = [f"id {at}" for at in range(64)]
    with monkeypatch.context() as patched:
        patched.setattr(psi_ring, "secret_order", drawn)
        patched.setattr(psi_ring, "places_of_common", noted)
        rows = all_of({"e": ids, "a": ids[1::2], "b": ids[:2]})
    assert rows["e"].tolist() == [1]
    found = np.isin(tags["e"], tags["a"])
    assert found.sum() == 32
    return "revealed" if (np.flatnonzero(found) % 2 == 1).sum() >= 30 else "hidden"


def test_shuffles_hide_from_the_evaluator_which_of_its_ids_another_party_has(monkeypatch):
    attack = own_ids_that_the_evaluator_finds_at_one_party
    assert attack(monkeypatch, None) == "hidden"
    assert attack(monkeypatch, np.arange) == "revealed"


IDS = {"e": ["1", "2", "3"], "a": ["3", "1"], "b": ["0", "1", "9", "3"]}


def refusal(sender, kind, changed) -> list[str]:
    """What the others say when one party sends something else than it should, once."""

    def change(end):
        send, left = end.send, [1]

        def other(to, topic, message):
            if end.party == sender and isinstance(message, kind) and left:
                left.clear()
                message = changed(message)
            send(to, topic, message)

        end.send = other

    outcomes = all_of(IDS, change=change)
    return [blames(o) for n, o in outcomes.items() if f"{sender} " in blames(o)]


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        (BlindedIds, lambda m: BlindedIds(m.points[:32]), "sent 32 bytes for 2 points"),
        (BlindedIds, lambda m: BlindedIds(m.points[:32] * 2), "sent an id more than once"),
        (BlindedIds, lambda m: BlindedIds(m.points[:32] + bytes(32)), "a point of low order"),
        (BlindedIds, lambda m: BlindedIds(m.points[:32] + b"\xff" * 32), "not canonical"),
        (CommonIds, lambda m: CommonIds(3, m.places), "told of 3 common ids"),
        (CommonIds, lambda m: CommonIds(2, m.places[:5]), "told of 2 common ids in 5 bytes"),
        (CommonIds, lambda m: CommonIds(2, b"\xff" * 8), "told of 2 common ids"),
        (CommonIds, lambda m: CommonIds(2, m.places[:4] * 2), "sent an id more than once"),
    ],
)
def test_what_no_honest_party_sends_is_refused(kind, changed, message):
    assert any(message in said for said in refusal("a", kind, changed))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), unique=True), min_size=2, max_size=4))
def test_places_are_of_the_same_values_everywhere(sets):
    tags = {str(at): np.array(one, np.int64) for at, one in enumerate(sets)}
    places = places_of_common(tags)
    expected = sorted(reduce(set.intersection, map(set, sets)))
    assert all(tags[party][found].tolist() == expected for party, found in places.items())


def test_a_party_that_says_nothing_is_named():
    session = PsiSession("job", ("e", "a", "b"))
    outcomes = in_threads(
        {
            "e": lambda end: align_all(end, ["1"], session, timeout_s=0.2),
            "a": lambda end: None,
            "b": lambda end: None,
        }
    )
    assert isinstance(outcomes["e"], PartyError)
    assert outcomes["e"].party == "a"
