"""Which nodes train together, decided from what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.run.membership import Epoch, Memory, Node, decide
from shardpar.run.options import SuperviseOptions

OPTIONS = SuperviseOptions(
    join_s=60, backoff_s=1, most_backoff_s=8, give_up_after=5, least_nodes=1, lost_after_s=30
)


def nodes(**states):
    return {
        name: Node(name, f"born-{name}", port=n + 1, state=state, epoch=1)
        for n, (name, state) in enumerate(states.items())
    }


def running(*names):
    return Epoch(1, names, tuple(f"born-{n}" for n in names), "localhost:1")


START = Epoch()
FRESH = Memory()


def look(alive, epoch=START, memory=FRESH, options=OPTIONS, now_s=0.0, wanted=2, progress=-1):
    return decide(
        alive, epoch, memory, options, now_s=now_s, wanted=wanted, progress=progress
    )  # fmt: skip


def kinds(decision):
    return [kind for kind, _ in decision.events]


def test_the_first_epoch_waits_for_all_nodes_or_for_long_enough():
    alone = look(nodes(a="waiting"))
    assert alone.epoch.members == ()
    assert look(nodes(a="waiting"), memory=alone.memory, now_s=59).epoch.members == ()
    assert look(nodes(a="waiting"), memory=alone.memory, now_s=60).epoch.members == ("a",)
    assert look(nodes(b="waiting", a="waiting")).epoch.members == ("a", "b")


def test_too_few_nodes_wait_for_more_however_long():
    few = look(nodes(a="waiting"), options=replace(OPTIONS, least_nodes=2))
    later = look(
        nodes(a="waiting"), memory=few.memory, options=replace(OPTIONS, least_nodes=2), now_s=1e6
    )
    assert later.epoch.members == ()


def test_a_lost_node_ends_the_epoch_at_once_and_the_others_keep_their_order():
    epoch = running("c", "a", "b")
    decision = look(nodes(c="running", b="running"), epoch, now_s=7)
    assert kinds(decision) == ["lost", "epoch"]
    assert decision.epoch.number == 2
    assert decision.epoch.members == ("c", "b")


def test_a_node_whose_supervisor_was_started_anew_counts_as_lost_and_comes_back():
    alive = nodes(a="running", b="waiting")
    alive["b"] = replace(alive["b"], born="another", epoch=0)
    decision = look(alive, running("a", "b"))
    assert kinds(decision) == ["lost", "epoch"]
    assert decision.epoch.members == ("a", "b")
    assert decision.epoch.born == ("born-a", "another")


def test_a_failed_trainer_is_started_again_with_all_others():
    decision = look(nodes(a="running", b="failed"), running("a", "b"))
    assert kinds(decision) == ["failed", "epoch"]
    assert decision.epoch.members == ("a", "b")


def test_waits_grow_without_progress_and_the_run_is_given_up():
    memory, epoch, now_s, waits = Memory(), running("a"), 0.0, []
    for _ in range(OPTIONS.give_up_after):
        failed = nodes(a="failed")
        failed["a"] = replace(failed["a"], epoch=epoch.number)
        begun_s = now_s
        decision = look(failed, epoch, memory, now_s=now_s, wanted=1, progress=40)
        while decision.epoch.number == epoch.number:
            now_s += 0.5
            decision = look(failed, epoch, decision.memory, now_s=now_s, wanted=1, progress=40)
            assert kinds(decision) in ([], ["epoch"]), "a failure is counted once"
        waits.append(now_s - begun_s)
        memory, epoch = decision.memory, decision.epoch
    assert waits == [0, 1, 2, 4, 8]
    failed["a"] = replace(failed["a"], epoch=epoch.number)
    end = look(failed, epoch, memory, now_s=now_s, wanted=1, progress=40)
    assert "6 failures in a row" in end.epoch.over
    assert end.epoch.code == 1
    # A new checkpoint in between forgives the failures before.
    again = look(failed, epoch, memory, now_s=now_s, wanted=1, progress=50)
    assert again.epoch.over is None
    assert again.memory.failures == 1


def test_a_node_that_comes_makes_the_others_stop_before_all_begin_again():
    epoch = running("a")
    decision = look(nodes(a="running", b="waiting"), epoch)
    assert kinds(decision) == ["joined"]
    assert decision.epoch.stop
    assert decision.epoch.number == 1
    same = look(nodes(a="running", b="waiting"), decision.epoch, decision.memory)
    assert same.epoch == decision.epoch
    after = look(nodes(a="stopped", b="waiting"), decision.epoch, decision.memory)
    assert after.epoch.number == 2
    assert after.epoch.members == ("a", "b")
    assert not after.epoch.stop


def test_trainers_that_were_all_stopped_from_outside_are_started_again():
    decision = look(nodes(a="stopped", b="stopped"), running("a", "b"))
    assert decision.epoch.number == 2


def test_refused_input_ends_the_run_and_done_ends_it_when_all_are():
    refused = look(nodes(a="running", b="refused"), running("a", "b"))
    assert "refuses its input" in refused.epoch.over
    assert refused.epoch.code == 2
    assert look(nodes(a="done", b="running"), running("a", "b")).epoch.over is None
    assert look(nodes(a="done", b="done"), running("a", "b")).epoch.over == "the run is done"


@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.tuples(
            st.sampled_from(["waiting", "running", "stopped", "failed", "done"]),
            st.integers(0, 3),
            st.booleans(),
        ),
    ),
    st.permutations("abcd"),
    st.integers(0, 4),
    st.booleans(),
    st.floats(0, 1e3),
)
def test_an_epoch_has_only_nodes_that_live_and_numbers_only_grow(said, order, size, stop, now_s):
    alive = {
        name: Node(name, f"born-{name}" if same else "new", state=state, epoch=epoch)
        for name, (state, epoch, same) in said.items()
    }
    members = tuple(order[:size])
    epoch = Epoch(2, members, tuple(f"born-{n}" for n in members), "x:1", stop and bool(members))
    decision = look(alive, epoch, now_s=now_s)
    after = decision.epoch
    assert after.number in (2, 3)
    if after.number == 3:
        assert set(after.members) == set(alive)
        assert after.born == tuple(alive[n].born for n in after.members)
        assert not after.stop
    else:
        assert after.members == members


@pytest.mark.parametrize("over", ["done", "gave up"])
def test_nothing_happens_after_the_end(over):
    epoch = replace(running("a"), over=over)
    assert look(nodes(a="failed"), epoch).epoch == epoch
