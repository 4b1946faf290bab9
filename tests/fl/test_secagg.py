"""Secure aggregation: sums against NumPy's, whoever drops out, by machines and over channels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import ConfigError, PartyError, RunError, SpecError
from shardpar.fl.neighbours import neighbours_of
from shardpar.fl.secagg_options import SecAggOptions
from shardpar.fl.secagg_session import Session
from tests.fl.federation import PHASES, Federation, modular_sum, play, run_threads


def expected_survivors(federation, gone):
    before_mask = PHASES[: PHASES.index("masked") + 1]
    return tuple(n for n in federation.identities if gone.get(n, "never") not in before_mask)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_sums_are_exact_whoever_drops_out_down_to_the_threshold(data):
    clients = data.draw(st.integers(2, 7))
    threshold = data.draw(st.integers(max(2, clients // 2 + 1), clients))
    federation = Federation.of(clients, data.draw(st.integers(1, 40)), threshold)
    lost = data.draw(st.permutations(list(federation.identities)))[: clients - threshold]
    gone = {name: data.draw(st.sampled_from(PHASES)) for name in lost}
    vectors = federation.vectors(data.draw(st.integers(0, 1000)))
    total, survivors = play(federation, vectors, gone).server.total()
    assert survivors == expected_survivors(federation, gone)
    np.testing.assert_array_equal(total, modular_sum(vectors[name] for name in survivors))


@pytest.mark.parametrize("phase", PHASES)
def test_below_the_threshold_the_round_is_given_up(phase):
    federation = Federation.of(4, 8, threshold=3)
    gone = dict.fromkeys(list(federation.identities)[:2], phase)
    with pytest.raises((RunError, PartyError), match=r"takes 3"):
        play(federation, federation.vectors(0), gone).server.total()


def test_with_neighbours_only_some_pairs_share_masks():
    federation = Federation.of(14, 50, threshold=9, neighbours=6)
    names = list(federation.identities)
    gone = {names[2]: "masked", names[5]: "share", names[7]: "unmask"}
    vectors = federation.vectors(3)
    played = play(federation, vectors, gone)
    near = next(iter(played.clients.values()))._near
    assert len(near) == 6
    total, survivors = played.server.total()
    np.testing.assert_array_equal(total, modular_sum(vectors[name] for name in survivors))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(2, 12), st.binary(max_size=8))
def test_the_graph_is_regular_symmetric_and_connected(count, degree, seed):
    parties = [f"{at:02}" for at in range(count)]
    near = neighbours_of(parties, degree, seed)
    size = min(count - 1, degree + degree % 2)
    assert all(len(set(found)) == size and p not in found for p, found in near.items())
    assert all(p in near[other] for p, found in near.items() for other in found)
    reached, edge = {parties[0]}, [parties[0]]
    while edge:
        fresh = set(near[edge.pop()]) - reached
        reached |= fresh
        edge += fresh
    assert reached == set(parties)


def test_another_seed_gives_another_graph():
    parties = [f"{at:02}" for at in range(30)]
    assert neighbours_of(parties, 4, b"a") == neighbours_of(parties, 4, b"a")
    assert neighbours_of(parties, 4, b"a") != neighbours_of(parties, 4, b"b")


def test_over_channels_with_a_client_that_dies_in_each_phase():
    federation = Federation.of(12, 3000, threshold=7)
    names = list(federation.identities)
    gone = dict(zip(names, PHASES, strict=False))
    vectors = federation.vectors(1)
    aggregate, outcomes = run_threads(federation, vectors, gone, deadline_s=1.0)
    assert aggregate.survivors == tuple(names[3:])
    np.testing.assert_array_equal(aggregate.total, modular_sum(vectors[n] for n in names[3:]))
    assert set(aggregate.dropped) == set(names[:3])
    assert "sent nothing" in aggregate.dropped[names[1]]
    assert all(outcomes[name] == tuple(names[3:]) for name in names[5:])


def test_over_channels_below_the_threshold_everyone_is_told():
    federation = Federation.of(4, 10, threshold=3)
    names = list(federation.identities)
    gone = dict.fromkeys(names[:2], "masked")
    vectors = federation.vectors(1)
    outcomes = {}
    with pytest.raises(RunError, match=r"2 of 4 clients sent a masked vector .* takes 3"):
        _, outcomes = run_threads(federation, vectors, gone, deadline_s=0.5)
    assert not outcomes


def test_those_who_are_left_learn_that_the_round_is_over():
    from tests.fl import federation as tools

    federation = Federation.of(3, 10, threshold=3)
    names = list(federation.identities)
    ends = tools.local_channels(["server", *names])
    import threading

    caught = {}

    def client(name):
        try:
            tools.run_client(
                ends[name],
                "server",
                federation.identities[name],
                federation.session,
                federation.roster,
                np.zeros(10, np.uint32),
                timeout_s=10.0,
            )
        except PartyError as error:
            caught[name] = str(error)

    threads = [threading.Thread(target=client, args=(n,)) for n in names[:2]]
    for thread in threads:
        thread.start()
    with pytest.raises(RunError, match=r"2 of 3 .*dropped: client 002"):
        tools.run_server(ends["server"], federation.session, federation.roster, 0.3)
    for thread in threads:
        thread.join(10)
    assert set(caught) == set(names[:2])
    assert all("gave up job/1.0" in text for text in caught.values())


def test_sessions_that_could_reveal_an_update_are_refused():
    with pytest.raises(SpecError, match="client's own update"):
        Session("j", 0, ("a",), 1, 1)
    with pytest.raises(SpecError, match="use 3 to 4"):
        Session("j", 0, ("a", "b", "c", "d"), 1, 2)
    with pytest.raises(SpecError, match="sorted"):
        Session("j", 0, ("b", "a"), 1, 2)
    with pytest.raises(ConfigError, match=r"more than 0\.5"):
        SecAggOptions(threshold=0.5)


def test_parties_that_disagree_are_found_at_the_first_message():
    federation = Federation.of(3, 8, threshold=2)
    other = Session("job", 1, federation.session.cohort, 9, 2)
    with pytest.raises(PartyError, match="disagree about the session"):
        play(federation, federation.vectors(0), {}, clients=federation.clients(session=other))


def test_a_vector_of_another_length_is_refused_on_both_sides():
    federation = Federation.of(3, 8, threshold=2)
    with pytest.raises(SpecError, match=r"adds up uint32 \(8,\)"):
        play(federation, {n: np.zeros(7, np.uint32) for n in federation.identities}, {})
