"""Who sends what: against a linear programme solved by HiGHS, and against the field's greedy."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from shardpar.spec.cluster import Cluster, DeviceKind, Hosts, Link
from shardpar.spec.exchange import Demand, Have, Want, demands
from shardpar.spec.routing import greedy, route


def machines(devices_per_host: int = 4, hosts: int = 4) -> Cluster:
    kind = DeviceKind("x", (("float32", 1e12),), 1e9, 1e11)
    return Cluster("c", (kind,), (Hosts("x", devices_per_host, hosts),), Link(10.0), Link(1.0))


def least_by_highs(wanted, num_bytes, cluster) -> float:
    """The least load of the busiest port, cells being divisible at will."""
    ports, columns, needs = {}, [], []
    for demand, size in zip(wanted, num_bytes, strict=True):
        for receiver in demand.receivers:
            host = cluster.host_of if cluster else {}.get
            near = [o for o in demand.owners if host(o) == host(receiver)]
            row = len(needs)
            needs.append(1.0)
            for owner in near or demand.owners:
                port = (owner, not near)
                speed = 1.0
                if cluster:
                    speed = (cluster.intra_host if near else cluster.inter_host).bandwidth
                columns.append((row, ports.setdefault(port, len(ports)), size / speed))
    n = len(columns)
    a_eq, a_ub = np.zeros((len(needs), n + 1)), np.zeros((len(ports), n + 1))
    for j, (row, port, load) in enumerate(columns):
        a_eq[row, j] = 1.0
        a_ub[port, j] = load
    a_ub[:, n] = -1.0
    cost = np.zeros(n + 1)
    cost[n] = 1.0
    solved = linprog(cost, a_ub, np.zeros(len(ports)), a_eq, needs)
    assert solved.status == 0
    return float(solved.fun)


def random_demands(seed: int) -> tuple[list[Demand], list[float]]:
    draw = random.Random(seed)
    wanted, sizes = [], []
    for _ in range(draw.randint(1, 12)):
        rows = draw.choice((64, 256, 1024))
        devices = draw.sample(range(16), draw.randint(2, 9))
        owners = tuple(sorted(devices[: draw.randint(1, len(devices) - 1)]))
        receivers = tuple(d for d in devices if d not in owners)
        wanted.append(Demand(((0, rows), (0, 3)), 0, owners, receivers))
        sizes.append(12.0 * rows)
    return wanted, sizes


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**6), st.booleans())
def test_the_busiest_port_is_as_little_busy_as_a_linear_programme_allows(seed, on_cluster):
    wanted, sizes = random_demands(seed)
    cluster = machines() if on_cluster else None
    found = route(wanted, sizes, cluster)
    least = least_by_highs(wanted, sizes, cluster)
    assert found.bound_s == pytest.approx(least, rel=1e-4)
    assert found.busiest_s <= 1.05 * least
    assert found.busiest_s <= greedy(wanted, sizes, cluster).busiest_s * (1 + 1e-9)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**6), st.booleans())
def test_every_receiver_gets_each_element_once_from_an_owner(seed, on_cluster):
    wanted, sizes = random_demands(seed)
    got: dict = defaultdict(list)
    for move in route(wanted, sizes, machines() if on_cluster else None).moves(wanted):
        got[move.receiver, move.label].append(move)
    for demand in wanted:
        for receiver in demand.receivers:
            mine = [m for m in got[receiver, 0] if m.cell[1] == demand.cell[1]]
            assert {m.sender for m in mine} <= {o for d in wanted for o in d.owners}
    total = sum(m.size for moves in got.values() for m in moves)
    assert total == sum(d.size * len(d.receivers) for d in wanted)


def test_cells_that_cannot_be_cut_are_dealt_out_evenly():
    wanted = [Demand(((i, i + 1),), 0, (0, 1, 2), (3,)) for i in range(7)]
    found = route(wanted, [4.0] * 7)
    assert found.busiest_s == 12.0
    assert found.bound_s == pytest.approx(28 / 3)


def test_links_that_are_not_critical_are_balanced_too():
    wanted = [
        Demand(((0, 100),), 0, (0,), (9,)),
        Demand(((100, 200),), 0, (1, 2), (9,)),
    ]
    load = route(wanted, [100.0, 60.0]).load_s
    assert load == {(0, False): 100.0, (1, False): 30.0, (2, False): 30.0}


def test_nothing_wanted_is_nothing_sent():
    assert route([], []).shares == ()
    assert demands([Have(0, 0, (((0, 4),),))], [Want(0, (0,), (((1, 3),),))]) == ()
