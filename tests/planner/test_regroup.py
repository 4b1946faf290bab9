"""Groups of devices of one speed, and the plans on them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.planner.cost import plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.rebalance import rebalanced
from shardpar.planner.regroup import groupings, is_even, regrouped
from shardpar.planner.search import search
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import simulate
from shardpar.spec.check import check
from shardpar.spec.cluster import DeviceKind, Hosts
from tests.planner.cases import cluster_of
from tests.planner.test_rebalance import HEAVY

WORK = Workload(8, loops=False)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(4, 1), (4, 2), (3, 2), (8, 2)]),
    st.dictionaries(st.integers(0, 5), st.sampled_from([0.4, 0.7]), max_size=3),
    st.data(),
)
def test_groups_have_all_devices_once_in_powers_of_two_of_one_speed(size, speeds, data):
    cluster = cluster_of(*size)
    cluster = cluster.slowed({d: s for d, s in speeds.items() if d < cluster.num_devices})
    kept = data.draw(st.sets(st.sampled_from(range(cluster.num_devices)), min_size=1))
    cluster = cluster.only(kept)
    found = list(groupings(cluster))
    assert found
    assert len(set(found)) == len(found)
    for grouping in found:
        groups = list(itertools.chain.from_iterable(grouping))
        assert sorted(itertools.chain.from_iterable(groups)) == list(range(cluster.num_devices))
        for group in groups:
            assert len({cluster.speed_of(d) for d in group}) == 1
            hosts = {cluster.host_of(d) for d in group}
            if len(hosts) > 1:
                # Whole hosts only: any other group that crosses them is slower than its parts.
                everyone = [d for d in range(cluster.num_devices) if cluster.host_of(d) in hosts]
                assert sorted(group) == everyone
            elif len(group) & (len(group) - 1):
                raise AssertionError(f"{group} is no power of two")


def test_the_groupings_of_a_host_with_a_slow_device():
    """Device 1 is the slow one; the strongest group of a pipeline is last."""
    assert list(groupings(cluster_of(4).slowed({1: 0.5}))) == [
        (((3,), (1,), (0, 2)),),
        (((1,), (3,), (0, 2)),),
        (((0, 2),), ((1,), (3,))),
        (((2,), (3,), (1,), (0,)),),
        (((1,), (3,), (2,), (0,)),),
        (((3,), (0,)), ((1,), (2,))),
        (((0,),), ((2,),), ((3,),), ((1,),)),
    ]


def test_strength_is_that_of_the_compute_dtype():
    """Of two kinds, either is the stronger in one dtype; it is the last of a pipeline."""
    links = cluster_of(1)
    one = DeviceKind("one", (("bfloat16", 9e12), ("float32", 1e12)), 16e9, 1e11)
    two = DeviceKind("two", (("bfloat16", 4e12), ("float32", 2e12)), 16e9, 1e11)
    cluster = replace(links, kinds=(one, two), hosts=(Hosts("one", 1), Hosts("two", 1)))
    assert next(groupings(cluster, dtype="bfloat16")) == (((1,), (0,)),)
    assert next(groupings(cluster, dtype="float32")) == (((0,), (1,)),)


def test_pins_of_stages_and_pipelines_hold():
    cluster = cluster_of(4, 2).slowed({1: 0.5})
    assert {len(g) for g in groupings(cluster, SearchOptions(pipelines=1))} == {1}
    assert min(len(g) for g in groupings(cluster, SearchOptions(pipelines=2))) == 2
    assert all(len(chain) == 2 for g in groupings(cluster, SearchOptions(stages=2)) for chain in g)


def test_even_machines():
    assert is_even(cluster_of(4, 2))
    assert not is_even(cluster_of(4, 2).slowed({0: 0.5}))
    assert not is_even(cluster_of(4, 2).only(range(7)))
    assert is_even(cluster_of(4, 2).slowed(dict.fromkeys(range(8), 0.5)))


def test_a_slow_device_costs_little_more_than_what_it_is_worth():
    """Of eight devices one at 0.4: 7.4 of 8 are left."""
    cluster = cluster_of(4, 2)
    healthy = search(HEAVY, cluster, WORK)
    slow = cluster.slowed({1: 0.4})
    kept = simulate(healthy.plan, plan_cost(healthy.plan, HEAVY, slow, WORK)).step_s
    step_s, plan = regrouped(HEAVY, slow, WORK)
    check(plan, HEAVY, slow)
    cost = plan_cost(plan, HEAVY, slow, WORK)
    assert step_s == simulate(plan, cost).step_s
    assert step_s < 0.75 * kept
    # And nothing is left to gain by dealing layers and sequences anew.
    again = rebalanced(plan, HEAVY, slow, WORK)
    assert plan_cost(again, HEAVY, slow, WORK).step_s == pytest.approx(cost.step_s, rel=1e-9)


def test_seven_devices_of_two_hosts_are_all_used():
    cluster = cluster_of(4, 2).only(range(7))
    step_s, plan = regrouped(HEAVY, cluster, WORK)
    check(plan, HEAVY, cluster)
    assert step_s < search(HEAVY, cluster_of(4), WORK).simulated_s


def test_what_fits_nowhere_gives_no_plan():
    assert regrouped(HEAVY, cluster_of(4, memory_bytes=1e5).slowed({0: 0.5}), WORK) is None
