"""Rounds without an aggregator against those with one, and through the death of anyone."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from shardpar.errors import ConfigError, RunError
from shardpar.fl.ring_rounds import Agreed, RingOutcome
from shardpar.fl.roll_call import Epoch
from shardpar.fl.stored import read_record, write_record
from tests.fl.deployed import (
    NET,
    SCAFFOLD,
    SECAGG,
    Federation,
    Lives,
    compile_first,
    make_job,
    mortal_writes,
    params_of,
    with_net,
)

assert mortal_writes
LONG = bool(os.environ.get("SHARDPAR_LONG"))
RING = with_net(topology="ring", wait_s=15.0)
FOUR = replace(RING, parties=("a", "b", "c", "d"), lost="drop", round_s=2.0, join_s=3.0)


def ring_job(net=RING, federated=SCAFFOLD):
    return make_job(federated, replace(SECAGG, enabled=False), net=net)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    compile_first(ring_job(FOUR), tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def coordinated(tmp_path_factory):
    """The model with an aggregator."""
    job = make_job(secagg=SECAGG, net=NET)
    return params_of(Federation(job, tmp_path_factory.mktemp("coordinated")).run())


def finals(federation, names):
    outcomes = [federation.outcomes[name] for name in names]
    assert all(isinstance(o, RingOutcome) for o in outcomes), (outcomes, federation.said)
    return [params_of(outcome) for outcome in outcomes]


def test_all_parties_come_to_the_model_that_an_aggregator_would(tmp_path, coordinated):
    federation = Federation(ring_job(), tmp_path)
    federation.run()
    for params in finals(federation, "abc"):
        np.testing.assert_array_equal(params, coordinated)
    assert sorted(row["party"] for row in federation.rows) == [*"aabbcc"]
    assert not any(row["dropped"] for row in federation.rows)


def test_whoever_is_killed_at_whatever_moment_all_come_to_the_same_model(
    tmp_path, coordinated, mortal_writes
):
    struck, moments = 0, list(range(0, 70, 1 if LONG else 6))
    for at in moments:
        for loses_mail in (False, True) if LONG else (at % 4 == 0,):
            lives = Lives(dies_at=at)
            folder = tmp_path / f"{at}-{loses_mail}"
            federation = Federation(ring_job(), folder, {"b": lives}, loses_mail=loses_mail)
            federation.run()
            struck += lives.dies_at is None
            where = (at, loses_mail, lives.events[at : at + 1], federation.said)
            for params in finals(federation, "abc"):
                np.testing.assert_array_equal(params, coordinated, err_msg=f"{where}")
    assert struck > len(moments) * 0.7


@pytest.mark.parametrize("at", [0, 14, 40])
def test_the_others_go_on_without_one_that_is_gone(tmp_path, compiled, mortal_writes, at):
    federation = Federation(
        ring_job(FOUR, replace(SCAFFOLD, rounds=3)),
        tmp_path,
        {"c": Lives(dies_at=at)},
        down=frozenset("c"),
    )
    federation.run()
    one, *others = finals(federation, "abd")
    for other in others:
        np.testing.assert_array_equal(one, other)
    last = [row for row in federation.rows if row["round"] == 3]
    assert [row["dropped"] for row in last] == ["c", "c", "c"]


def test_too_few_give_up_and_say_who_is_missing(tmp_path, compiled, mortal_writes):
    net = replace(FOUR, round_s=0.5, wait_s=1.5, join_s=1.5)
    gone = {"c": Lives(dies_at=20), "d": Lives(dies_at=25)}
    federation = Federation(ring_job(net), tmp_path, gone, down=frozenset("cd"))
    with pytest.raises(RunError, match=r"c, d of 4 parties are not there, and it takes 3"):
        federation.run()


def test_one_that_committed_by_itself_is_taken_along(tmp_path, compiled):
    """`a` had the sum of round 1 and died with it; the others repeated the round without `a`."""
    one = replace(SCAFFOLD, rounds=1)
    all_four = Federation(ring_job(FOUR, one), tmp_path / "x")
    all_four.run()
    three = Federation(ring_job(FOUR, one), tmp_path / "y", {"a": Lives(dies_at=0)},
                       down=frozenset("a"))  # fmt: skip
    for name in "bcd":
        (tmp_path / "y" / name).mkdir(parents=True)
        write_record(tmp_path / "y" / name / "epoch", Epoch(7))
    with pytest.raises(BaseException, match="here"):
        three.run()
    forked, kept = (read_record(tmp_path / w / "agreed", Agreed) for w in ("x/a", "y/b"))
    assert forked.rounds == kept.rounds == 1
    assert forked.state != kept.state
    shutil.rmtree(tmp_path / "y" / "a", ignore_errors=True)
    shutil.copytree(tmp_path / "x" / "a", tmp_path / "y" / "a")
    again = Federation(ring_job(FOUR), tmp_path / "y")
    again.run()
    first, *others = finals(again, "abcd")
    for other in others:
        np.testing.assert_array_equal(first, other)
    assert "took over 1 rounds from b" in again.said
    assert [row["dropped"] for row in again.rows] == ["", "", "", ""]


def test_parties_with_other_terms_are_told_which(tmp_path):
    other = ring_job(federated=replace(SCAFFOLD, rounds=5))
    net = replace(RING, join_s=3.0, wait_s=3.0)
    federation = Federation(ring_job(net), tmp_path, jobs={"b": other})
    with pytest.raises(ConfigError, match=r"federated.rounds is 2 here and 5 at b"):
        federation.run()
    assert "federated.rounds is 5 here and 2 at" in str(federation.outcomes["b"])
