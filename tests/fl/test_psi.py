"""Two-party intersections against Python's sets, over channels, one- and two-sided."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import DataError, PartyError, SpecError
from shardpar.fl import psi, psi_blinding, psi_messages
from shardpar.fl.he.pool import Pool
from shardpar.fl.psi import align, intersect
from shardpar.fl.psi_session import PsiSession, id_bytes, ids_of
from tests.fl.intersections import in_threads

SESSION = PsiSession("job", ("a", "b"))


def both(x, y, session=SESSION, how=align, patience_s=20.0, **options):
    return in_threads(
        {
            "a": lambda end: how(end, "b", x, session, **options),
            "b": lambda end: how(end, "a", y, session, **options),
        },
        patience_s,
    )


IDS = st.lists(st.one_of(st.text(min_size=1, max_size=3), st.integers(0, 30).map(str)), max_size=40)


def unique(ids):
    return list({unicodedata.normalize("NFC", one): one for one in ids}.values())


@settings(max_examples=40, deadline=None)
@given(IDS.map(unique), IDS.map(unique))
def test_rows_line_up_on_exactly_the_common_ids(x, y):
    rows = both(x, y)
    pairs = [(id_bytes(x[i]), id_bytes(y[j])) for i, j in zip(rows["a"], rows["b"], strict=True)]
    assert all(one == other for one, other in pairs)
    assert {one for one, _ in pairs} == set(map(id_bytes, x)) & set(map(id_bytes, y))
    assert len(pairs) == len({one for one, _ in pairs})


@pytest.fixture
def short_windows(monkeypatch):
    """Many messages for few ids."""
    for module in (psi, psi_blinding, psi_messages):
        if hasattr(module, "WINDOW_IDS"):
            monkeypatch.setattr(module, "WINDOW_IDS", 8)
    monkeypatch.setattr(psi_blinding, "_JOB_IDS", 4)


@pytest.mark.parametrize(("count", "other"), [(50, 7), (7, 50), (8, 8), (16, 0), (0, 0), (1, 33)])
def test_sets_of_any_sizes_are_streamed_in_windows(short_windows, count, other):
    x = [f"id {at}" for at in range(count)]
    y = [f"id {at}".encode() for at in range(count - 4, count - 4 + other)]
    seen = []
    rows = both(x, y, progress=lambda done, total: seen.append((done, total)))
    expected = set(map(id_bytes, x)) & set(y)
    assert {x[i].encode() for i in rows["a"]} == expected
    assert [x[i].encode() for i in rows["a"]] == [y[j] for j in rows["b"]]
    assert rows["a"].dtype == np.int64
    if count + other:
        assert max(seen) == (count + other, count + other)


def test_nobody_holds_more_than_a_window_in_flight(short_windows):
    # A queue that takes one window's messages and no more would not make the parties wait for
    # each other: the largest backlog seen is what a channel must buffer.
    deepest = 0

    def party(peer, ids):
        def run(end):
            put = end.send

            def send(to, topic, message):
                nonlocal deepest
                put(to, topic, message)
                deepest = max(deepest, end.boxes[end.party, to, topic].qsize())

            end.send = send
            return align(end, peer, ids, SESSION)

        return run

    ids = [str(at) for at in range(100)]
    rows = in_threads({"a": party("b", ids), "b": party("a", ids[::-1])})
    assert len(rows["a"]) == len(rows["b"]) == 100
    assert deepest <= 2


@pytest.mark.parametrize("learner", ["a", "b"])
def test_one_sided_runs_tell_one_party_only(learner):
    x, y = ["1", "2", "3", "4"], ["4", "2", "9"]
    session = PsiSession("job", ("a", "b"), learners=(learner,))
    rows = both(x, y, session, intersect)
    ids = {"a": x, "b": y}[learner]
    assert {ids[row] for row in rows.pop(learner)} == {"2", "4"}
    assert list(rows.values()) == [None]
    refused = both(x, y, session, align)
    assert all(isinstance(error, SpecError) for error in refused.values())


def test_processes_come_to_the_same_rows():
    x, y = [f"{at}" for at in range(300)], [f"{at}" for at in range(100, 400)]
    with Pool(2) as pool:
        rows = both(x, y, pool=pool)
    assert [x[i] for i in rows["a"]] == [y[j] for j in rows["b"]]
    assert len(rows["a"]) == 200


def test_orders_of_two_runs_differ():
    ids = [str(at) for at in range(30)]
    orders = {both(ids, ids)["a"].tobytes() for _ in range(2)}
    assert len(orders) == 2


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", b"a"], "rows 0 and 2 have the same id"),
        (["e\u0301", "\u00e9"], "rows 0 and 1 have the same id"),
        (["a", ""], "the id of row 1 is empty"),
        (["a", 3], "the id of row 1 is int; convert it to str"),
        (["\ud800"], "the id of row 0 is no text"),
    ],
)
def test_rows_without_an_id_of_their_own_are_named(ids, message):
    with pytest.raises(DataError, match=message) as caught:
        ids_of(ids)
    assert "'a'" not in str(caught.value)


def test_numpy_text_is_taken_as_it_stands():
    assert ids_of(np.array(["ab", "c"])) == [b"ab", b"c"] == ids_of(np.array([b"ab", b"c"]))


def test_parties_that_disagree_say_so():
    other = PsiSession("job", ("a", "b"), run=1)
    assert other.digest != SESSION.digest
    outcomes = in_threads(
        {
            "a": lambda end: end.send("b", f"{SESSION.label}/opening", other.opening(1)),
            "b": lambda end: align(end, "a", ["1"], SESSION),
        }
    )
    assert isinstance(outcomes["b"], PartyError)
    assert "disagrees about psi/job/0" in str(outcomes["b"])


def test_sets_that_are_too_small_or_too_large_are_refused_on_both_sides():
    session = PsiSession("job", ("a", "b"), least_ids=2, most_ids=4)
    outcomes = both(["1"], ["1", "2"], session)
    assert isinstance(outcomes["a"], DataError)
    for count in (1, 5):
        opening = psi_messages.Opening(session.digest, count)
        with pytest.raises(PartyError, match=f"brings {count} ids; .* takes 2 to 4"):
            session.opened("b", opening)


def test_sessions_that_make_no_sense_are_refused():
    with pytest.raises(SpecError, match="two or more"):
        PsiSession("job", ("a",))
    with pytest.raises(SpecError, match="two or more"):
        PsiSession("job", ("a", "a"))
    with pytest.raises(SpecError, match="learners"):
        PsiSession("job", ("a", "b"), learners=("c",))
    with pytest.raises(SpecError, match="in this order"):
        PsiSession("job", ("a", "b"), least_ids=5, most_ids=4)
    outcomes = both(["1"], ["1"], PsiSession("job", ("a", "c")))
    assert all("psi_ring" in str(error) for error in outcomes.values())


def test_what_is_agreed_on_is_in_the_digest():
    sessions = [
        SESSION,
        PsiSession("job2", ("a", "b")),
        PsiSession("job", ("b", "a")),
        PsiSession("job", ("a", "b"), learners=("a",)),
        PsiSession("job", ("a", "b"), learners=("b",)),
        PsiSession("job", ("a", "b"), least_ids=1),
        PsiSession("job", ("a", "b"), most_ids=99),
        PsiSession("job", ("a", "b"), run=1),
    ]
    assert len({session.dst for session in sessions}) == len(sessions)
    assert len(SESSION.dst) <= 255
