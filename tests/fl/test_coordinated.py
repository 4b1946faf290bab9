"""Coordinated rounds against the simulation, and through the death of anyone at any moment."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import jax
import numpy as np
import pytest

from shardpar.errors import CheckpointError, ConfigError, RunError
from shardpar.fl.clients import ClientData
from shardpar.fl.cohort import LocalWork, sample_cohort
from shardpar.fl.coordinator import Committed
from shardpar.fl.ledger import Ledger
from shardpar.fl.messages import array_of
from shardpar.fl.options import FederatedOptions
from shardpar.fl.privacy_options import PrivacyOptions
from shardpar.fl.private_rounds import budget_of
from shardpar.fl.simulate import simulation
from shardpar.fl.stored import read_record
from shardpar.fl.trainer import Kept
from tests.fl.deployed import (
    NET,
    SCAFFOLD,
    SECAGG,
    SERVER,
    Federation,
    Lives,
    compile_first,
    make_job,
    mortal_writes,
    params_of,
    rows_of,
    with_net,
)

assert mortal_writes
QUICK = replace(SECAGG, deadline_s=0.8)
LONG = bool(os.environ.get("SHARDPAR_LONG"))


def simulated(job, rounds: int) -> np.ndarray:
    """The same job in one program."""
    rows = [rows_of(party) for party in job.parties]
    arrays = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
    ends = np.cumsum([0, *(len(r["x"]) for r in rows)])
    parts = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    data = ClientData.of(arrays, parts)
    work = LocalWork(job.federated.batch, job.federated.epochs, job.federated.seed)
    sim = simulation(job.task, job.algorithm, work, devices=jax.devices()[:1])
    params = job.task.init(job.federated.seed)
    state, kept = sim.init(params), sim.kept(params)
    for round_ in range(rounds):
        cohort = sample_cohort(
            len(rows), job.federated.cohort, seed=job.federated.seed, round_=round_
        )
        state, _ = sim.round(state, kept, sim.pack(data, cohort, round_))
    return np.asarray(state["params"]["w"])


@pytest.mark.parametrize("cohort", [None, 2])
def test_plain_rounds_are_those_of_the_simulation(tmp_path, cohort):
    job = make_job(replace(SCAFFOLD, cohort=cohort, rounds=3))
    outcome = Federation(job, tmp_path).run()
    np.testing.assert_array_equal(params_of(outcome), simulated(job, 3))


def test_masked_rounds_come_to_the_same_within_the_grid(tmp_path):
    job = make_job(secagg=SECAGG)
    federation = Federation(job, tmp_path)
    outcome = federation.run()
    np.testing.assert_allclose(params_of(outcome), simulated(job, 2), atol=1e-4)
    assert [row["survivors"] for row in federation.rows] == [3, 3]
    # Nothing of a single party is sent: the longest messages are masked vectors.
    assert federation.rows[1]["loss"] < federation.rows[0]["loss"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """By kind: (the model, the events of each process) when nobody dies."""
    found = {}
    for kind, secagg in (("plain", None), ("masked", QUICK)):
        federation = Federation(make_job(secagg=secagg), tmp_path_factory.mktemp(kind))
        found[kind] = (params_of(federation.run()), federation.lives)
    return found


def moments(kind: str, process: str) -> list[int]:
    """When to die, counted in events: a few moments of each phase, or all of them."""
    most = {"plain": {"b": 26, SERVER: 56}, "masked": {"b": 44, SERVER: 108}}[kind][process]
    step = 1 if LONG else {"b": 3, SERVER: 7}[process]
    return list(range(0, most, step))


@pytest.mark.parametrize("process", ["b", SERVER])
@pytest.mark.parametrize("kind", ["plain", "masked"])
def test_whoever_is_killed_at_whatever_moment_the_model_is_the_same(
    tmp_path, undisturbed, mortal_writes, kind, process
):
    expected, _ = undisturbed[kind]
    job = make_job(secagg=None if kind == "plain" else QUICK)
    struck = 0
    for at in moments(kind, process):
        for loses_mail in (False, True) if LONG else (at % 2 == 0,):
            lives = Lives(dies_at=at)
            folder = tmp_path / f"{at}-{loses_mail}"
            federation = Federation(job, folder, {process: lives}, loses_mail=loses_mail)
            outcome = federation.run()
            struck += lives.dies_at is None
            where = (at, lives.events[at : at + 1], federation.said)
            np.testing.assert_array_equal(params_of(outcome), expected, err_msg=f"{where}")
            committed = read_record(folder / SERVER / "committed", Committed)
            assert (committed.round_, len(committed.survivors)) == (2, 3), where
    assert struck > len(moments(kind, process)) * 0.7


# Parties that are lost.

DROP = with_net(parties=("a", "b", "c", "d"), lost="drop", round_s=2.0, wait_s=4.0, join_s=4.0)
LATE = replace(SECAGG, deadline_s=2.0)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    compile_first(make_job(net=DROP), tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("secagg", [None, LATE], ids=["plain", "masked"])
@pytest.mark.parametrize("at", [4, 12])
def test_a_dead_party_is_dropped(tmp_path, compiled, mortal_writes, secagg, at):
    job = make_job(replace(SCAFFOLD, rounds=4), secagg, net=DROP)
    federation = Federation(job, tmp_path, {"c": Lives(dies_at=at)}, down=frozenset("c"))
    outcome = federation.run()
    assert outcome.rounds == 4
    assert federation.rows[-1]["dropped"] == "c"
    assert federation.rows[-1]["survivors"] == 3
    assert any("c (" in text for text in federation.said)
    for name in "abd":
        np.testing.assert_array_equal(
            federation.outcomes[name].params["w"], outcome.state["params"]["w"]
        )


def test_a_party_that_comes_back_takes_part_again(tmp_path, compiled, mortal_writes):
    job = make_job(replace(SCAFFOLD, rounds=4), None, net=DROP)
    federation = Federation(job, tmp_path, {"c": Lives(dies_at=11)})
    federation.evaluate = federation.waits_for("c")
    federation.run()
    assert federation.rows[-1]["dropped"] == ""


@pytest.mark.parametrize("when", ["/share", "/masked"])
def test_what_a_dropped_party_had_prepared_is_given_up(tmp_path, compiled, when):
    job = make_job(replace(SCAFFOLD, rounds=4), LATE, net=DROP)
    federation = Federation(job, tmp_path, {"c": Lives(dies_on=when)})
    federation.evaluate = federation.waits_for("c")
    outcome = federation.run()
    assert [row["dropped"] for row in federation.rows] == ["c", "", "", ""]
    kept = []
    for name in job.parties:
        record = read_record(tmp_path / name / "kept", Kept)
        assert record.of == (3, federation.rows[3]["attempts"] - 1)
        kept.append(array_of(record.kept["control/w"]))
    # SCAFFOLD's server holds the mean of the clients' controls, if all agree on what was committed.
    np.testing.assert_allclose(outcome.state["control"]["w"], np.mean(kept, axis=0), atol=1e-4)


def test_too_few_parties_are_an_error_that_names_the_missing(tmp_path, compiled, mortal_writes):
    job = make_job(replace(SCAFFOLD, rounds=4), None, net=DROP)
    gone = {"c": Lives(dies_at=5), "d": Lives(dies_at=8)}
    federation = Federation(job, tmp_path, gone, down=frozenset("abcd"))
    with pytest.raises(RunError, match=r"c, d of 4 parties are not there, and it takes 3"):
        federation.run()


def test_a_party_that_fails_says_why_and_the_rest_go_on(tmp_path, compiled, monkeypatch):
    job = make_job(replace(SCAFFOLD, rounds=2), None, net=DROP)
    federation = Federation(job, tmp_path)

    def broken(party):
        rows = rows_of(party)
        return {"x": rows["x"]} if party == "b" else rows

    monkeypatch.setattr("tests.fl.deployed.rows_of", broken)
    assert federation.run().rounds == 2
    assert any("b (KeyError" in text for text in federation.said)
    assert isinstance(federation.outcomes["b"], KeyError)


def test_an_update_that_is_not_finite_is_left_out(tmp_path, compiled, monkeypatch):
    job = make_job(replace(SCAFFOLD, rounds=2), None, net=DROP)

    def poisoned(party):
        rows = rows_of(party)
        return {**rows, "y": rows["y"] * np.float32("nan")} if party == "d" else rows

    monkeypatch.setattr("tests.fl.deployed.rows_of", poisoned)
    federation = Federation(job, tmp_path)
    outcome = federation.run()
    assert np.isfinite(params_of(outcome)).all()
    assert all(row["dropped"] == "d" for row in federation.rows)


# What all must agree on.


def test_a_party_with_other_terms_is_told_which(tmp_path, compiled):
    other = make_job(replace(SCAFFOLD, rounds=5), net=DROP)
    job = make_job(replace(SCAFFOLD, rounds=2), net=DROP)
    federation = Federation(job, tmp_path, jobs={"b": other})
    assert federation.run().rounds == 2
    error = federation.outcomes["b"]
    assert isinstance(error, ConfigError)
    assert "federated.rounds is 5 here and 2 at aggregator" in str(error)
    assert {row["dropped"] for row in federation.rows} == {"b"}


def test_state_of_another_run_is_not_taken_for_this_one(tmp_path, compiled):
    job = make_job(replace(SCAFFOLD, rounds=1))
    Federation(job, tmp_path / "one").run()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "b").rename(tmp_path / "two" / "b")
    federation = Federation(make_job(replace(SCAFFOLD, rounds=1), net=DROP), tmp_path / "two")
    federation.run()
    assert "is of another run" in str(federation.outcomes["b"])


def test_a_party_that_lost_what_it_kept_is_told_so(tmp_path):
    short = with_net(wait_s=2.0, join_s=2.0)
    Federation(make_job(replace(SCAFFOLD, rounds=1)), tmp_path).run()
    (tmp_path / "b" / "kept").unlink()
    (tmp_path / "b" / "prepared").unlink()
    federation = Federation(make_job(net=short), tmp_path, patience_s=3.0)
    with pytest.raises(RunError, match="b"):
        federation.run()
    assert "does not hold what b kept after round 1" in str(federation.outcomes["b"])


def test_damaged_state_is_noticed(tmp_path):
    Federation(make_job(replace(SCAFFOLD, rounds=1)), tmp_path).run()
    path = tmp_path / SERVER / "committed"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        Federation(make_job(), tmp_path, down=frozenset("abc")).run()


# Privacy.

TRAINED = FederatedOptions(rounds=3, batch=8, epochs=1, learning_rate=0.05, seed=3)


@pytest.mark.parametrize(
    ("kind", "secagg", "rate", "noise"),
    [
        ("central", None, 1.0, None),
        ("central", SECAGG, 1.0, None),
        ("central", None, 0.7, 1.15),
        ("distributed", SECAGG, 1.0, None),
        ("local", None, 1.0, None),
        ("example", SECAGG, 0.25, 1.06),
    ],
)
def test_every_kind_of_privacy_spends_its_budget_and_no_more(tmp_path, kind, secagg, rate, noise):
    # Noise for sampled releases is given, because finding it takes seconds.
    privacy = PrivacyOptions(kind, 6.0, noise_multiplier=noise, sampling_rate=rate)
    job = make_job(TRAINED, secagg, privacy, NET, 40)
    federation = Federation(job, tmp_path)
    outcome = federation.run()
    assert (outcome.rounds, outcome.stopped) == (3, "")
    spent = [row["epsilon"] for row in federation.rows]
    assert spent == sorted(spent)
    assert 5.4 < spent[-1] <= 6.0
    assert all("loss" not in row for row in federation.rows)
    pays = "abc" if kind in ("local", "example") else [SERVER]
    for name in pays:
        with Ledger(tmp_path / name / privacy.ledger, budget_of(privacy)) as ledger:
            assert len(ledger.releases) == 3
            assert ledger.spent() == pytest.approx(spent[-1])
    noiseless = make_job(TRAINED, secagg, PrivacyOptions(), NET)
    plain = params_of(Federation(noiseless, tmp_path / "plain").run())
    assert not np.allclose(params_of(outcome), plain, atol=1e-3)


@pytest.mark.parametrize(("kind", "secagg"), [("central", None), ("distributed", SECAGG)])
def test_training_stops_at_the_budget_and_says_so(tmp_path, kind, secagg):
    # Noise for three rounds, and a budget that two of them spend.
    privacy = PrivacyOptions(kind=kind, epsilon=6.0, noise_multiplier=1.3)
    federation = Federation(make_job(TRAINED, secagg, privacy, NET), tmp_path)
    outcome = federation.run()
    assert outcome.rounds < 3
    assert "the privacy budget allows no further round" in outcome.stopped
    assert federation.outcomes["a"].reason == outcome.stopped
    assert federation.rows[-1]["epsilon"] <= 6.0


def test_parties_whose_own_budget_is_spent_leave_and_the_job_ends(tmp_path):
    privacy = PrivacyOptions(kind="local", epsilon=6.0, noise_multiplier=1.3)
    federation = Federation(make_job(TRAINED, None, privacy, NET), tmp_path)
    outcome = federation.run()
    assert 0 < outcome.rounds < 3
    assert "the privacy budget of" in outcome.stopped
    assert "allows no round" in federation.outcomes["b"].reason


def test_an_update_with_own_noise_is_paid_for_once_however_often_its_round_is_run(
    tmp_path, mortal_writes
):
    privacy = PrivacyOptions(kind="local", epsilon=6.0)
    job = make_job(TRAINED, None, privacy, NET)
    federation = Federation(job, tmp_path, {SERVER: Lives(dies_at=16)}, loses_mail=True)
    assert federation.run().rounds == 3
    assert federation.lives[SERVER].dies_at is None
    for name in "abc":
        with Ledger(tmp_path / name / privacy.ledger, budget_of(privacy)) as ledger:
            assert len(ledger.releases) == 3


def test_what_cannot_run_between_processes_is_told_before_it_begins():
    with pytest.raises(ConfigError, match="fedbuff"):
        make_job(replace(SCAFFOLD, algorithm="fedbuff"))
    with pytest.raises(ConfigError, match="sampling_rate"):
        make_job(TRAINED, SECAGG, PrivacyOptions(kind="central", sampling_rate=0.5))
    with pytest.raises(ConfigError, match="name 3 or more"):
        make_job(TRAINED, net=with_net(topology="ring", parties=("a", "b")))
    with pytest.raises(ConfigError, match=r"federated\.cohort"):
        make_job(replace(TRAINED, cohort=2), net=with_net(topology="ring"))
    with pytest.raises(ConfigError, match="write distributed or example"):
        make_job(TRAINED, None, PrivacyOptions(kind="central"), with_net(topology="ring"))


def test_what_a_sum_costs_is_written_down_before_anyone_is_asked_to_unmask(tmp_path, monkeypatch):
    privacy = PrivacyOptions(kind="distributed", epsilon=6.0)
    federation = Federation(make_job(TRAINED, SECAGG, privacy, NET), tmp_path)
    seen = []

    def refuse(ledger, noise, what):
        boxes = federation.ends[SERVER].boxes
        seen.append([key[2].rsplit("/", 1)[1] for key in list(boxes) if "/secagg/" in f"/{key[2]}"])
        raise RunError("the disk is full")

    monkeypatch.setattr("shardpar.fl.coordinator.begin_distributed", refuse)
    net = replace(NET, wait_s=0.1)
    federation.jobs[SERVER] = make_job(TRAINED, SECAGG, privacy, net)
    federation.patience_s = 2.0
    with pytest.raises(RunError, match="the disk is full"):
        federation.run()
    assert "signed" in seen[0]
    assert "unmask" not in seen[0]
