"""Coordinated rounds against the simulation, and through the death of anyone at any moment."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import jax
import numpy as np
import pytest

from shardpar.fl.clients import ClientData
from shardpar.fl.cohort import LocalWork, sample_cohort
from shardpar.fl.coordinator import Committed
from shardpar.fl.simulate import simulation
from shardpar.fl.stored import read_record
from tests.fl.deployed import (
    SCAFFOLD,
    SECAGG,
    SERVER,
    Federation,
    Lives,
    make_job,
    mortal_writes,
    params_of,
    rows_of,
)

assert mortal_writes
QUICK = replace(SECAGG, deadline_s=0.6)
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
