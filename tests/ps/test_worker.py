"""The same model trains with servers and in one program, to the same losses and tables."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shardpar.errors import DataError, PlanError
from shardpar.ps.client import Client
from shardpar.ps.consistency import ASP, SSP, Clocks
from shardpar.ps.embed import Embed
from shardpar.ps.placement import Placement
from shardpar.ps.program import SparseProgram
from shardpar.ps.worker import WorkerProgram
from tests.ps.clicks import (
    OPTIMIZER,
    ROWS,
    Clicks,
    batch_of,
    joint_batch,
    loss,
    tables_of,
    together,
)


def test_lockstep_gives_the_losses_and_tables_of_one_program():
    rate = optax.linear_schedule(1.0, 0.5, 6)
    program = SparseProgram(
        loss, Clicks, OPTIMIZER, batch=joint_batch(0, 2), devices=jax.devices()[:1], rate=rate
    )
    state = program.init(5)
    expected = []
    for step in range(6):
        state, metrics = program.step(state, joint_batch(step, 2))
        expected.append(float(metrics["loss"]))
    servers, workers = together(rate=rate)
    losses = []
    for step in range(6):
        # Whoever comes first: nothing is taken before both are there.
        order = workers if step % 2 else workers[::-1]
        found = [worker.run(step) for worker in order]
        losses.append(sum(f.loss for f in found) / sum(f.weight for f in found))
    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    there = tables_of(servers, workers[0])
    for name, placed in program.tables.items():
        rows = placed.lookup(state.tables[name], np.arange(ROWS))
        np.testing.assert_allclose(there[name], rows, atol=2e-6)
    for name, x in state.dense.items():
        np.testing.assert_allclose(there[name], x, atol=2e-6)


@pytest.mark.parametrize(("bound", "ahead"), [(SSP(2), 3), (ASP, 12)], ids=["ssp", "asp"])
def test_while_a_worker_is_stalled_the_other_goes_as_far_as_its_bound_and_learns(bound, ahead):
    servers, workers = together(consistency=bound)
    clocks, losses = Clocks.zero(2), []
    for turn in range(50):
        may = [worker for worker in (0, 1) if clocks.may_start(worker, bound)]
        if turn < 12:
            may = [worker for worker in may if worker == 0]
        if turn == 12:
            assert clocks.steps == (ahead, 0)
        for worker in may[:1]:
            found = workers[worker].run(clocks.steps[worker])
            clocks = clocks.finished(worker, clocks.steps[worker] + 1)
            losses.append(found.loss / found.weight)
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    assert servers.servers[0].shard.taken == sum(clocks.steps)


def test_a_worker_that_starts_anew_goes_on_where_its_pushes_ended():
    servers, workers = together(workers=1)
    reference_servers, reference = together(workers=1)
    for step in range(4):
        reference[0].run(step)
    workers[0].run(0)
    workers[0].run(1)
    rows = workers[0].rows
    # It dies after one of two servers has its third push.
    pushes = []
    rows._servers = type("Cut", (), {
        "pull": servers.pull,
        "push": staticmethod(pushes.extend),
    })  # fmt: skip
    workers[0].run(2)
    servers.servers[1].push(pushes[1])
    again = Client(0, servers, workers[0].program.tables, Placement(rows=2))
    assert (again.position.pushes, again.position.steps) == (2, 2)
    workers[0].rows = again
    for step in range(again.position.steps, 4):
        workers[0].run(step)
    assert servers.servers[1].shard.duplicates == 1
    assert [s.shard.taken for s in servers.servers] == [4, 4]
    expected = tables_of(reference_servers, reference[0])
    for name, rows in tables_of(servers, workers[0]).items():
        # What the dead worker's push changed on one server, its successor saw in its step.
        np.testing.assert_allclose(rows, expected[name], atol=0.05)


class Averaging(nnx.Module):
    def __init__(self, rngs):
        self.embed = Embed(ROWS, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)


class Computing(nnx.Module):
    def __init__(self, rngs):
        self.embed = Embed(ROWS, 1, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, ids):
        return self.embed((ids * 7) % ROWS).sum(axis=(1, 2)) + self.bias[...]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Averaging, r"keeps running values in norm\."),
        (Computing, "computes ids itself"),
        (lambda rngs: nnx.Linear(2, 2, rngs=rngs), "no `ps.Embed` layer"),
    ],
    ids=["averages", "computes", "no table"],
)
def test_a_model_that_workers_cannot_run_is_refused(model, words):
    with pytest.raises(PlanError, match=words):
        WorkerProgram(loss, model, batch=batch_of(0, 0))


def test_ids_outside_a_table_are_refused_before_anything_is_pushed():
    servers, workers = together(workers=1)
    bad = batch_of(0, 0)
    bad["ids"][2, 1] = ROWS
    workers[0].data = lambda worker, step: bad
    with pytest.raises(DataError, match=rf"rows 0 to {ROWS - 1}, but id {ROWS}"):
        workers[0].run(0)
    workers[0].data = lambda worker, step: {"ids": bad["ids"]}
    with pytest.raises(DataError, match="the program was made for"):
        workers[0].run(0)
    assert servers.positions(0)[0].pushes == 0


class Dropped(Clicks):
    """Half of what it sees is dropped while it learns."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, ids):
        deep = self.deep(ids).reshape(ids.shape[0], -1)
        return (self.wide(ids) + self.out(self.dropout(jnp.tanh(deep))))[:, 0]


def scores(model, batch):
    return model(batch["ids"])


def test_dropout_is_for_learning_only():
    batch = batch_of(0, 0)
    programs = [SparseProgram(loss, model, OPTIMIZER, batch=batch) for model in (Clicks, Dropped)]
    plain, dropped = (program.init(3) for program in programs)
    dropped = replace(dropped, dense=plain.dense, tables=plain.tables)
    (expected, found) = (
        program.apply(state, batch, scores)
        for program, state in zip(programs, (plain, dropped), strict=True)
    )
    np.testing.assert_array_equal(found, expected)
    before = programs[1].evaluate(dropped, batch)
    program = WorkerProgram(loss, Dropped, batch=batch)
    wanted = program.wanted(batch)
    rows = {
        name: np.asarray(programs[0].tables[name].lookup(plain.tables[name], ids))
        for name, ids in program.ids(wanted).items()
    }
    dense = {name: np.asarray(x) for name, x in plain.dense.items()}
    rest = program.begin(3).rest
    found = program.apply(dense, rest, rows, batch, wanted, scores)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    total, weight = program.apply(dense, rest, rows, batch, wanted, program.evaluate)
    assert float(total / weight) == pytest.approx(float(before["loss"]), rel=1e-5)
    _, learning = programs[1].step(dropped, batch)
    assert abs(float(learning["loss"]) - float(before["loss"])) > 1e-3
