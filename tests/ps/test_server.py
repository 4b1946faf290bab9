"""A server takes each update once, by its table's rule, and starts anew where it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardpar.errors import CheckpointError, DataError, PlanError, RunError
from shardpar.ps.consistency import ASP
from shardpar.ps.initializers import Normal
from shardpar.ps.log import RecordLog
from shardpar.ps.messages import PullRequest, Push, RowsRequest, RowsUpdate, push_bytes
from shardpar.ps.optimizers import SGD, AdaGrad, LazyAdam
from shardpar.ps.placement import Placement
from shardpar.ps.server import Durability, Server
from shardpar.ps.shard import Dense, ShardSpec
from shardpar.ps.table import PlacedTable, Table, device_grid
from tests.ps.counting_server import IDS, counted, counter_spec, one_more

KEY = jax.random.key_data(jax.random.key(3))


def rows_of(server, ids, table="t", **request):
    asked = RowsRequest(np.asarray(ids), **request)
    return server.pull(PullRequest({table: asked})).rows[table]


@pytest.mark.parametrize("deal", ["turns", "ranges"])
def test_rows_are_born_as_in_a_table_on_devices(deal):
    table = Table(50, 4, init=Normal(1.0))
    placed = PlacedTable(table, Placement(), device_grid(jax.devices()[:1], 1, 1))
    whole = placed.whole(placed.init(jax.random.wrap_key_data(KEY)))[0]
    placement = Placement(rows=3, deal=deal)
    for index in range(3):
        server = Server(ShardSpec({"t": table}, {"t": KEY}, placement, index))
        mine = np.flatnonzero(placement.home(np.arange(50), 50)[0] == index)[::-1]
        np.testing.assert_allclose(rows_of(server, mine).pieces[0], whole[mine], rtol=1e-6)


def test_a_rule_runs_on_the_owner_as_in_numpy():
    rule = AdaGrad(0.5, initial=0.1)
    server = Server(ShardSpec({"t": Table(9, 2, rule)}, {"t": KEY}))
    expected = rows_of(server, np.arange(9)).pieces[0].astype(np.float64)
    total = np.full((9, 2), 0.1)
    random = np.random.default_rng(0)
    for sequence in range(4):
        ids = random.permutation(9)[:5]
        gradient = random.normal(size=(5, 2)).astype(np.float32)
        update = RowsUpdate(ids, (gradient,), np.ones(5, np.int64))
        server.push(Push(0, sequence, sequence, weight=4.0, loss=1.0, rows={"t": update}))
        mean = gradient / 4.0
        total[ids] += mean**2
        expected[ids] -= 0.5 * mean / (np.sqrt(total[ids]) + 1e-10)
    np.testing.assert_allclose(rows_of(server, np.arange(9)).pieces[0], expected, rtol=1e-5)


def test_a_push_that_comes_again_is_taken_once():
    server = Server(counter_spec())
    for sequence in (0, 0, 1, 0, 1):
        server.push(one_more(sequence))
    assert counted(server) == [2, 2, 2]
    assert server.shard.duplicates == 3
    assert server.position(0).pushes == 2


def test_a_push_whose_predecessor_is_missing_is_refused():
    server = Server(counter_spec())
    with pytest.raises(RunError, match="number 1, but 0 has not come"):
        server.push(one_more(1))


def test_in_lockstep_a_step_is_taken_when_all_have_pushed_and_divided_by_all_samples():
    spec = ShardSpec({"t": Table(9, 1, SGD(1.0))}, {"t": KEY}, workers=2)
    server = Server(spec)
    before = rows_of(server, [2, 3]).pieces[0]

    def push(worker, ids, value, weight):
        values = np.full((len(ids), 1), value, np.float32)
        update = RowsUpdate(np.array(ids), (values,), np.ones(len(ids), np.int64))
        server.push(Push(worker, 0, 0, weight=weight, loss=0.0, rows={"t": update}))

    push(1, [2, 3], 6.0, 1.0)
    assert (rows_of(server, [2, 3]).pieces[0] == before).all()
    with pytest.raises(RunError, match="ask the clock before a step"):
        server.push(replace(one_more(1, worker=1), rows={}))
    push(0, [3], 2.0, 3.0)
    fresh = rows_of(server, [2, 3])
    np.testing.assert_allclose(before - fresh.pieces[0], [[6 / 4], [8 / 4]], rtol=1e-6)
    assert fresh.versions.tolist() == [1, 2]


def test_without_lockstep_each_push_is_taken_when_it_comes_and_old_ones_count_less():
    for scaled, moved in ((False, [1.0, 1.0]), (True, [1.0, 1 / 3])):
        spec = counter_spec(workers=2, consistency=ASP, delay_scaled=scaled)
        server = Server(spec)
        for sequence in range(4):
            server.push(replace(one_more(sequence), seen=sequence))
        assert counted(server) == [4, 4, 4]
        # Four updates by the other of two workers came since these rows were pulled.
        server.push(one_more(0, worker=1, ids=np.array([0])))
        assert counted(server, np.array([0])) == pytest.approx([moved[1]])


def test_an_update_whose_loss_is_not_finite_is_left_out():
    server = Server(counter_spec())
    server.push(replace(one_more(0), loss=float("nan")))
    server.push(one_more(1))
    assert counted(server) == [1, 1, 1]
    assert server.shard.skipped == 1


def test_a_pull_gives_only_rows_that_lack_more_updates_than_the_bound():
    server = Server(counter_spec())
    for sequence in range(3):
        server.push(one_more(sequence))
    asked = np.array([1, 5, 8, 9])

    def stale(bound):
        versions = np.array([0, 1, 3, -1])
        return rows_of(server, asked, "count", versions=versions, bound=bound).positions.tolist()

    assert stale(0) == [0, 1, 3]
    assert stale(2) == [0, 3]
    assert stale(3) == [3]


def test_differences_are_added_to_rows_and_slots():
    server = Server(ShardSpec({"t": Table(9, 2, AdaGrad())}, {"t": KEY}))
    before = rows_of(server, [4], slots=True).pieces
    moves = (np.full((1, 2), 0.5, np.float32), np.full((1, 2), 2.0, np.float32))
    update = RowsUpdate(np.array([4]), moves, np.array([3]), "difference")
    server.push(Push(0, 0, 0, weight=1.0, loss=0.0, rows={"t": update}))
    after = rows_of(server, [4], slots=True)
    for old, new, move in zip(before, after.pieces, moves, strict=True):
        np.testing.assert_allclose(new, old + move)
    assert after.versions.tolist() == [3]


def adam_spec(**changes):
    parameters = {"w": np.ones((2, 3), np.float32)}
    dense = Dense(parameters, optax.adam(0.1))
    return ShardSpec({"t": Table(20, 3, LazyAdam(0.1))}, {"t": KEY}, dense=dense, **changes)


def adam_push(sequence, worker=0):
    random = np.random.default_rng([sequence, worker])
    ids = random.permutation(20)[:6]
    update = RowsUpdate(ids, (random.normal(size=(6, 3)).astype("f4"),), np.ones(6, np.int64))
    dense = {"w": random.normal(size=(2, 3)).astype("f4")}
    return Push(worker, sequence, sequence, 2.0, 1.0, rows={"t": update}, dense=dense)


def everything(server):
    pieces = rows_of(server, np.arange(20), slots=True)
    dense = server.pull(PullRequest({}, dense=True)).dense["w"]
    return [*pieces.pieces, pieces.versions, dense]


@pytest.mark.parametrize("snapshot_every", [1, 3, 100])
def test_a_restarted_server_is_bit_for_bit_what_it_was(tmp_path, snapshot_every):
    keep = Durability(tmp_path / "kept", snapshot_every=snapshot_every)
    spec = adam_spec(workers=2)
    # The last step has come from one of two workers only.
    order = [(s, w) for s in range(4) for w in (1, 0)] + [(4, 1)]
    server = Server(spec, keep)
    for sequence, worker in order:
        server.push(adam_push(sequence, worker))
    expected = everything(server)
    server.close()
    again = Server(spec, keep)
    for old, new in zip(expected, everything(again), strict=True):
        np.testing.assert_array_equal(old, new)
    assert [again.position(w).pushes for w in (0, 1)] == [4, 5]
    unbroken = Server(spec)
    for sequence, worker in [*order, (4, 0)]:
        unbroken.push(adam_push(sequence, worker))
    again.push(adam_push(4, 1))
    again.push(adam_push(4, 0))
    for old, new in zip(everything(unbroken), everything(again), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_damaged_snapshot_is_made_up_for_by_the_one_before_and_its_log(tmp_path):
    keep = Durability(tmp_path, snapshot_every=2)
    server = Server(counter_spec(), keep)
    for sequence in range(7):
        server.push(one_more(sequence))
    server.close()
    newest = sorted(tmp_path.glob("snapshot-*"))[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    again = Server(counter_spec(), keep)
    assert counted(again) == [7, 7, 7]
    again.close()
    for path in tmp_path.glob("snapshot-*"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        Server(counter_spec(), keep)


def test_a_damaged_log_is_refused(tmp_path):
    keep = Durability(tmp_path)
    server = Server(counter_spec(), keep)
    for sequence in range(3):
        server.push(one_more(sequence))
    server.close()
    log = tmp_path / "log-00000000"
    data = bytearray(log.read_bytes())
    data[-30] ^= 1
    log.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not fit its checksum"):
        Server(counter_spec(), keep)


def test_a_push_that_is_in_the_log_twice_is_played_once(tmp_path):
    """As when the disk failed to sync after the write, and the worker sent it again."""
    server = Server(counter_spec(), Durability(tmp_path))
    server.push(one_more(0))
    server.push(one_more(1))
    server.close()
    with RecordLog(tmp_path / "log-00000000", number=3) as log:
        log.add(push_bytes(one_more(1)))
    again = Server(counter_spec(), Durability(tmp_path))
    assert counted(again) == [2, 2, 2]
    again.push(one_more(2))
    again.close()
    assert counted(Server(counter_spec(), Durability(tmp_path))) == [3, 3, 3]


def test_a_directory_is_one_server_s(tmp_path):
    server = Server(counter_spec(), Durability(tmp_path))
    with pytest.raises(RunError, match="another process serves"):
        Server(counter_spec(), Durability(tmp_path))
    server.close()
    with pytest.raises(CheckpointError, match="written by another server"):
        Server(counter_spec(workers=2), Durability(tmp_path))


def test_functions_run_on_the_shard_once_and_outlive_it(tmp_path):
    placement = Placement(rows=2)
    spec = counter_spec(placement=placement, index=1)
    server = Server(spec, Durability(tmp_path))
    mine = np.array([1, 5])
    server.push(one_more(0, ids=mine))
    assert float(server.get("count", lambda rows, ids: rows.sum())) == 4
    assert server.get("count", lambda rows, ids: ids).tolist() == [1, 3, 5, 7, 9]
    for _ in range(2):
        server.update("count", lambda rows, ids: 10 * rows + ids[:, None], 0, 1)
    server.close()
    again = Server(spec, Durability(tmp_path))
    assert counted(again, np.array([1, 3, 5])) == [11, 3, 15]
    assert again.position(0).pushes == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": np.array([1, 1, 8])}, "has an id twice"),
        ({"ids": np.array([1, 5, 10])}, "has id 10, which shard 0"),
        ({"ids": np.array([-1, 5, 8])}, "has id -1"),
        ({"values": (np.ones((3, 3), np.float32),)}, r"their widths are \[2\]"),
        ({"counts": np.ones(2, np.int64)}, "other counts than ids"),
    ],
)
def test_a_push_that_does_not_fit_is_refused_and_not_logged(tmp_path, change, words):
    server = Server(counter_spec(), Durability(tmp_path))
    good = one_more(0)
    bad = replace(good, rows={"count": replace(good.rows["count"], **change)})
    with pytest.raises(DataError, match=words):
        server.push(bad)
    with pytest.raises(DataError, match="no table 'x'"):
        server.push(replace(good, rows={"x": good.rows["count"]}))
    with pytest.raises(DataError, match="has the parameters"):
        server.push(replace(good, dense={"w": np.ones(1)}))
    server.push(good)
    server.close()
    assert counted(Server(counter_spec(), Durability(tmp_path))) == [1, 1, 1]


def test_servers_do_not_cut_rows_into_columns():
    with pytest.raises(PlanError, match=r"use Placement\(rows=servers\)"):
        counter_spec(placement=Placement(columns=2))


def test_a_killed_server_loses_no_acknowledged_push_and_takes_none_twice(tmp_path):
    taken = 0
    for round_ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.ps.counting_server", str(tmp_path)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert child.stdout is not None
        for line in child.stdout:
            taken = int(line.split()[1])
            if taken >= 23 * (round_ + 1):
                break
        child.send_signal(signal.SIGKILL)
        for line in child.stdout:
            if line.startswith("taken") and line.endswith("\n"):
                taken = int(line.split()[1])
        child.wait()
        server = Server(counter_spec(), Durability(tmp_path, snapshot_every=7))
        # The one that was being taken may be in without its acknowledgement.
        position = server.position(0).pushes
        assert taken <= position <= taken + 1
        assert counted(server, IDS) == [position] * 3
        assert jnp.asarray(server.shard.tables["count"].step) == position
        server.close()
