"""A cache changes nothing with bounds 0, and never exceeds its bounds with others."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from shardpar.errors import ConfigError, PlanError
from shardpar.ps.cache import CachedRows, CacheOptions
from shardpar.ps.client import Client, LocalServers
from shardpar.ps.consistency import ASP
from shardpar.ps.initializers import Zeros
from shardpar.ps.messages import PullRequest, RowsRequest
from shardpar.ps.optimizers import SGD, AdaGrad
from shardpar.ps.placement import Placement
from shardpar.ps.server import Server
from shardpar.ps.shard import ShardSpec
from shardpar.ps.table import Table
from tests.ps.clicks import key_data, plain_clicks, tables_of, together

ROWS = 40


def trained(steps=10, *, cache=None, finish=False, **more):
    wrap = (lambda client: CachedRows(client, cache)) if cache else (lambda client: client)
    servers, workers = together(wrap=wrap, **more)
    losses = [[worker.run(step).loss for worker in workers] for step in range(steps)]
    if finish:
        for worker in workers:
            worker.rows.flush()
    return losses, tables_of(servers, workers[0]), workers


@pytest.mark.parametrize("capacity", [2, 11, 1000])
def test_with_bounds_of_0_training_in_lockstep_is_bit_for_bit_as_without(capacity):
    losses, tables, _ = trained()
    cached_losses, cached_tables, _ = trained(cache=CacheOptions(capacity))
    assert cached_losses == losses
    for name, values in tables.items():
        np.testing.assert_array_equal(cached_tables[name], values)


@pytest.mark.parametrize("capacity", [3, 1000])
def test_one_worker_whose_updates_wait_ends_where_it_would_without(capacity):
    model = plain_clicks(AdaGrad(0.1))
    _, expected, plain = trained(workers=1, model=model, steps=14)
    cache = CacheOptions(capacity, pull_bound=4, push_bound=4)
    _, found, workers = trained(workers=1, model=model, steps=14, cache=cache, finish=True)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)
    if capacity == 1000:
        assert workers[0].rows.client.traffic.remote < 0.7 * plain[0].rows.traffic.remote


def counting(options, workers=3, rule=SGD(-1.0)):  # noqa: B008
    """Servers with a table that counts, and a cached client for each worker."""
    table, placement = Table(ROWS, 2, rule, Zeros()), Placement(rows=2)
    made = LocalServers(
        tuple(
            Server(ShardSpec({"t": table}, {"t": key_data(0)}, placement, i, workers, ASP))
            for i in range(2)
        )
    )
    clients = (Client(worker, made, {"t": table}, placement) for worker in range(workers))
    return made, [CachedRows(client, options) for client in clients]


def versions_of(servers):
    out = np.zeros(ROWS, np.int64)
    for index, server in enumerate(servers.servers):
        ids = np.arange(index, ROWS, 2)
        out[ids] = server.pull(PullRequest({"t": RowsRequest(ids)})).rows["t"].versions
    return out


@pytest.mark.parametrize("evict", ["lru", "lfu"])
@pytest.mark.parametrize(("pull", "push"), [(0, 0), (3, 0), (0, 2), (3, 2), (2, 5)])
@pytest.mark.parametrize("capacity", [5, 1000])
def test_no_copy_lacks_more_than_the_bound_no_update_waits_longer_and_all_arrive_once(
    pull, push, capacity, evict
):
    options = CacheOptions(capacity, pull, push, evict)
    servers, workers = counting(options)
    random = np.random.default_rng(1)
    expected = np.zeros(ROWS)
    most_lacking = most_waiting = 0
    for step in range(60):
        worker = workers[random.integers(len(workers))]
        ids = np.unique(np.minimum(random.zipf(1.3, 8) - 1, ROWS - 1))
        rows, _ = worker.pull({"t": ids})
        cached = worker.tables["t"]
        now = versions_of(servers)
        held = np.intersect1d(ids, cached._ids)
        if held.size:
            lacks = now[held] - cached._versions[cached._slot_of[held]]
            most_lacking = max(most_lacking, int(lacks.max()))
        # What it reads is what all have counted, but for what it may lack.
        assert (rows["t"][:, 0] <= expected[ids]).all()
        gradient = np.ones((ids.size, 2), np.float32)
        worker.push(step, {"t": (ids, gradient)}, weight=1.0, loss=0.0, dense={})
        expected[ids] += 1
        most_waiting = max(most_waiting, cached.waiting)
    assert most_lacking <= pull
    assert most_waiting <= push
    if capacity == 1000:
        # With room for all, rows are held long enough to reach the bounds; but where more
        # updates arrive at once than a copy may lack, it never lacks any.
        together = push + 1 if push else 1
        assert (most_lacking, most_waiting) == (pull // together * together, push)
    for worker in workers:
        worker.flush()
        assert worker.tables["t"].waiting == 0
    np.testing.assert_array_equal(versions_of(servers), expected)
    final = Client(0, servers, {"t": Table(ROWS, 2)}, Placement(rows=2))
    np.testing.assert_array_equal(final.pull({"t": np.arange(ROWS)})[0]["t"][:, 0], expected)


def touched(options, order):
    _, (worker,) = counting(options, workers=1)
    for step, ids in enumerate(order):
        ids = np.array(ids)
        worker.pull({"t": ids})
        gradient = np.ones((ids.size, 2), np.float32)
        worker.push(step, {"t": (ids, gradient)}, weight=1.0, loss=0.0, dense={})
    return sorted(worker.tables["t"]._ids.tolist())


def test_the_least_recently_or_least_frequently_used_row_goes():
    order = [[1], [1], [1], [2], [3], [4]]
    assert touched(CacheOptions(3, evict="lru"), order) == [2, 3, 4]
    assert touched(CacheOptions(3, evict="lfu"), order) == [1, 3, 4]


def test_a_loss_that_is_not_finite_changes_no_copy_and_loses_nothing_that_waits():
    servers, (worker, other) = counting(CacheOptions(1, 2, 2), workers=2)
    one, ones = np.array([1]), np.ones((1, 2), np.float32)
    worker.pull({"t": one})
    worker.push(0, {"t": (one, ones)}, weight=1.0, loss=0.0, dense={})
    # Its only row gives way, so that what waits goes out with a step whose loss is bad.
    worker.pull({"t": np.array([2])})
    bad = np.full((1, 2), np.nan, np.float32)
    worker.push(1, {"t": (np.array([2]), bad)}, weight=1.0, loss=float("nan"), dense={})
    assert versions_of(servers)[:3].tolist() == [0, 1, 0]
    rows, _ = other.pull({"t": np.array([1, 2])})
    assert rows["t"][:, 0].tolist() == [1, 0]


def test_updates_of_rules_whose_slots_are_averages_cannot_wait():
    options = CacheOptions(10, push_bound=1)
    wrap = partial(CachedRows, options=options)
    with pytest.raises(PlanError, match="updates by LazyAdam cannot wait"):
        together(wrap=wrap)


@pytest.mark.parametrize("bad", [{"pull_bound": -1}, {"capacity_rows": 0}, {"evict": "fifo"}])
def test_options_without_sense_are_refused(bad):
    with pytest.raises(ConfigError, match="a cache"):
        CacheOptions(**{"capacity_rows": 1, **bad})
