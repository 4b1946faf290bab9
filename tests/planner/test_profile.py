"""Rates of a group of devices, and which links a collective over some axes crosses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.planner.profile import OVERLAP, group, link_over, rates
from shardpar.spec.cluster import Cluster, DeviceKind, Hosts, Link
from shardpar.spec.mesh import Mesh
from tests.spec.values import meshes

FAST = DeviceKind(
    "fast", (("bfloat16", 400.0), ("float32", 100.0)), 80.0, 30.0, 0.5, source="measured"
)
SLOW = DeviceKind("slow", (("float32", 90.0),), 16.0, 40.0, 0.25)
NEAR, FAR = Link(10.0, source="assumed"), Link(1.0)
CLUSTER = Cluster("c", (FAST, SLOW), (Hosts("fast", 3, 2), Hosts("slow", 2)), NEAR, FAR)


def test_a_group_has_the_rates_of_its_slowest_and_smallest_device():
    alone = rates(CLUSTER, (0, 1), "bfloat16")
    assert (alone.flops, alone.memory_bandwidth, alone.memory_bytes) == (200.0, 30.0, 80.0)
    assert rates(CLUSTER, (0,), "float32").flops == 50.0
    mixed = rates(CLUSTER, (0, 6), "bfloat16")
    assert (mixed.flops, mixed.memory_bandwidth, mixed.memory_bytes) == (22.5, 30.0, 16.0)
    # What counts is the rate it reaches, not its peak.
    proud = replace(SLOW, matmul_flops=(("float32", 110.0),))
    boasting = replace(CLUSTER, kinds=(FAST, proud))
    assert rates(boasting, (0, 6), "float32").flops == 27.5
    assert (alone.overlap, mixed.overlap) == (OVERLAP, OVERLAP)


def test_each_rate_says_where_it_came_from():
    assert rates(CLUSTER, (0,), "bfloat16").sources == (
        ("flops", "measured"),
        ("memory", "measured"),
        ("intra_host", "assumed"),
        ("inter_host", "datasheet"),
        ("efficiency", "measured"),
        ("overlap", "assumed"),
    )
    assert dict(rates(CLUSTER, (0, 6), "bfloat16").sources)["flops"] == "datasheet"
    assert dict(rates(CLUSTER, (0, 6), "bfloat16").sources)["efficiency"] == "assumed"


@given(meshes(most=64), st.data())
def test_a_group_is_the_slice_of_the_device_array_through_device_0(mesh, data):
    axes = tuple(data.draw(st.sets(st.sampled_from(mesh.names)))) if mesh.names else ()
    numbers = np.arange(mesh.num_devices).reshape(mesh.sizes)
    index = tuple(slice(None) if name in axes else 0 for name in mesh.names)
    assert group(mesh, axes) == tuple(numbers[index].reshape(-1).tolist())


def links_by_hand(cluster, devices, mesh, axes):
    """Every group, one by one."""
    numbers = np.array(devices).reshape(mesh.sizes)
    inside = [i for i, name in enumerate(mesh.names) if name in axes]
    moved = np.moveaxis(numbers, inside, range(len(inside)))
    size = mesh.size_of(axes)
    for members in moved.reshape(size, -1).T:
        yield cluster.link_among(tuple(members.tolist()))


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_collective_is_as_slow_as_its_slowest_group(devices, hosts, data):
    cluster = replace(CLUSTER, hosts=(Hosts("fast", devices, hosts),))
    chosen = tuple(data.draw(st.permutations(range(cluster.num_devices))))
    mesh = Mesh.factored(cluster.num_devices)
    axes = tuple(data.draw(st.sets(st.sampled_from(mesh.names)))) if mesh.names else ()
    slow = FAR in set(links_by_hand(cluster, chosen, mesh, axes))
    assert link_over(cluster, chosen, mesh, axes) is (FAR if slow else NEAR)


@pytest.mark.parametrize(("axes", "link"), [(("a",), FAR), (("b",), FAR), ((), NEAR)])
def test_a_group_that_straddles_hosts_counts_even_if_the_first_does_not(axes, link):
    # Hosts of three: pairs (0, 1), (2, 3) and (4, 5), of which the second straddles.
    cluster = replace(CLUSTER, hosts=(Hosts("fast", 3, 2),))
    mesh = Mesh((("a", 3), ("b", 2)))
    assert link_over(cluster, tuple(range(6)), mesh, axes) is link


def test_a_group_hides_as_little_traffic_as_a_device_of_it_does():
    measured = replace(CLUSTER, kinds=(replace(FAST, overlap=0.9), replace(SLOW, overlap=0.2)))
    assert rates(measured, (0, 1), "bfloat16").overlap == 0.9
    assert rates(measured, (0, 6), "bfloat16").overlap == 0.2
    assert dict(rates(measured, (0, 6), "bfloat16").sources)["overlap"] == "measured"
    half = replace(CLUSTER, kinds=(replace(FAST, overlap=0.9), SLOW))
    assert rates(half, (0, 6), "bfloat16").overlap == 0.5
    assert dict(rates(half, (0, 6), "bfloat16").sources)["overlap"] == "assumed"


def test_a_group_holds_the_most_extra_copies_that_a_device_of_it_does():
    greedy = replace(SLOW, extra_copies=1.5)
    cluster = replace(CLUSTER, kinds=(replace(FAST, extra_copies=0.5), greedy))
    assert rates(cluster, (0, 1), "bfloat16").extra_copies == 0.5
    assert rates(cluster, (0, 6), "bfloat16").extra_copies == 1.5
    assert rates(CLUSTER, (0, 6), "bfloat16").extra_copies == 0.0
