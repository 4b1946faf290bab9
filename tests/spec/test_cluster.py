"""Clusters, devices and links; datasheets by the name jax gives a device."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.errors import SpecError
from shardpar.spec.cluster import Cluster, DeviceKind, Hosts, Link
from shardpar.spec.datasheet import KNOWN, lookup
from tests.spec.values import clusters

FAST = DeviceKind("fast", (("bfloat16", 4.0), ("float32", 1.0)), 80.0, 3.0)
SLOW = DeviceKind("slow", (("float32", 2.0),), 16.0, 1.0)
INTRA, INTER = Link(8.0), Link(1.0)
MIXED = Cluster("m", (FAST, SLOW), (Hosts("slow", 2, 2), Hosts("fast", 3)), INTRA, INTER)


def test_devices_are_numbered_host_by_host():
    assert MIXED.num_devices == 7
    assert [MIXED.host_of(d) for d in range(7)] == [0, 0, 1, 1, 2, 2, 2]
    assert [MIXED.kind_of(d).name for d in range(7)] == ["slow"] * 4 + ["fast"] * 3


@given(clusters())
def test_every_device_has_a_host_and_a_kind(cluster):
    plain = replace(cluster, speeds=())
    placed = [(plain.host_of(d), plain.kind_of(d).name) for d in range(plain.num_devices)]
    expected = []
    for hosts in cluster.hosts:
        for _ in range(hosts.count):
            number = expected[-1][0] + 1 if expected else 0
            expected += [(number, hosts.kind)] * hosts.devices
    assert placed == expected


@pytest.mark.parametrize(
    ("devices", "link"),
    [
        ((), INTRA),
        ((3,), INTRA),
        ((0, 1), INTRA),
        ((1, 2), INTER),
        ((4, 6), INTRA),
        ((0, 4), INTER),
    ],
)
def test_a_collective_crosses_the_slowest_link_between_its_devices(devices, link):
    assert MIXED.link_among(devices) is link


def test_a_slow_device_has_its_own_rates_and_its_place():
    slow = MIXED.slowed({5: 0.25})
    assert slow.kind_of(5) == replace(
        FAST, name="fast at 0.25", matmul_flops=(("bfloat16", 1.0), ("float32", 0.25)),
        memory_bandwidth=0.75,
    )  # fmt: skip
    assert [slow.kind_of(d) for d in (4, 6)] == [FAST, FAST]
    assert slow.link_among((4, 5, 6)) is INTRA
    assert [slow.speed_of(d) for d in (4, 5)] == [1.0, 0.25]
    assert slow.slowed({0: 0.5}).speeds == ((0, 0.5), (5, 0.25))
    assert slow.slowed({5: 1.0}) == MIXED


@given(clusters(), st.data())
def test_a_cluster_of_some_devices_has_them_as_they_were(cluster, data):
    everything = range(cluster.num_devices)
    kept = data.draw(st.sets(st.sampled_from(everything), min_size=1))
    part, old = cluster.only(kept), sorted(kept)
    assert part.num_devices == len(old)
    assert [part.kind_of(d) for d in range(len(old))] == [cluster.kind_of(d) for d in old]
    assert part.only(range(len(old))) == part
    for new, d in enumerate(old):
        for other, e in enumerate(old):
            assert part.link_among((new, other)) == cluster.link_among((d, e))


@pytest.mark.parametrize("device", [-1, 7])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(SpecError) as error:
        MIXED.kind_of(device)
    assert str(error.value) == f'cluster "m" has devices 0 to 6; got {device}'


def test_an_unlisted_dtype_runs_at_the_slowest_listed_rate():
    assert [FAST.flops(d) for d in ("bfloat16", "float32", "int8")] == [4.0, 1.0, 1.0]


def kind(**changed):
    fields = {"memory_bytes": 1.0, "memory_bandwidth": 1.0, "matmul_flops": (("float32", 1.0),)}
    return DeviceKind("k", **{**fields, **changed})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: kind(matmul_flops=()),
            'device kind "k": matmul_flops is empty; give {float32: …}',
        ),
        (
            lambda: kind(matmul_flops=(("float32", 1.0), ("int8", 0.0))),
            'device kind "k": matmul_flops.int8 is 0.0; write a positive number',
        ),
        (
            lambda: kind(memory_bytes=float("nan")),
            'device kind "k": memory_bytes is nan; write a positive number',
        ),
        (
            lambda: kind(memory_bandwidth=float("inf")),
            'device kind "k": memory_bandwidth is inf; write a positive number',
        ),
        (lambda: kind(efficiency=0), 'device kind "k": efficiency is 0; write a positive number'),
        (
            lambda: kind(efficiency=60),
            'device kind "k": efficiency is 60; it is a share of the peak, at most 1',
        ),
        (
            lambda: kind(overlap=1.5),
            'device kind "k": overlap is 1.5; it is a share of traffic, write 0 to 1',
        ),
        (
            lambda: kind(extra_copies=-0.5),
            'device kind "k": extra_copies is -0.5; write 0 or more',
        ),
        (lambda: Link(0), "link: bandwidth is 0; write positive bytes per second"),
        (lambda: Link(1, -1), "link: latency_s is -1; write seconds, 0 or more"),
        (
            lambda: Hosts("k", 0, 2),
            'hosts of kind "k": 2 hosts with 0 devices; both must be at least 1',
        ),
        (
            lambda: Cluster("c", (FAST, FAST), (Hosts("fast", 1),), INTRA, INTER),
            "cluster \"c\": a device kind is listed twice: ['fast', 'fast']",
        ),
        (lambda: Cluster("c", (FAST,), (), INTRA, INTER), 'cluster "c": it has no hosts'),
        (
            lambda: Cluster("c", (FAST,), (Hosts("fast", 10**6, 10**6),), INTRA, INTER),
            'cluster "c": hosts have 1,000,000,000,000 devices in all; a cluster may have 32,768',
        ),
        (
            lambda: kind(memory_bytes=1e300),
            'device kind "k": memory_bytes is 1e+300; write a number from 1e-09 to 1e+30',
        ),
        (lambda: Link(1e-300), "link: bandwidth is 1e-300; write a number from 1e-09 to 1e+30"),
        *(
            (
                lambda speed=speed: MIXED.slowed({1: speed}),
                f'cluster "m": speeds: device 1 has speed {speed}; it is a share of its kind\'s '
                "rates, write more than 0 and at most 1",
            )
            for speed in (0.0, -0.4, 1.5, float("nan"), float("inf"), 1e-10)
        ),
        (
            lambda: replace(MIXED, speeds=((7, 0.5),)),
            'cluster "m": speeds: there is no device 7; name one from 0 to 6',
        ),
        (
            lambda: replace(MIXED, speeds=((3, 0.5), (1, 0.5))),
            'cluster "m": speeds: device 1 comes after device 3; name each device once, the '
            "smallest number first",
        ),
        (
            lambda: replace(MIXED, speeds=((3, 0.5), (3, 0.4))),
            'cluster "m": speeds: device 3 comes after device 3; name each device once, the '
            "smallest number first",
        ),
        (
            lambda: Cluster(
                "c", (kind(memory_bandwidth=1e-8),), (Hosts("k", 1),), INTRA, INTER, ((0, 0.01),)
            ),
            'device kind "k at 0.01": memory_bandwidth is 1e-10; write a number from 1e-09 to '
            "1e+30",
        ),
        (
            lambda: MIXED.only(()),
            'cluster "m": no device is left; name at least one to keep',
        ),
        (lambda: MIXED.only((0, 7)), 'cluster "m" has devices 0 to 6; got 7'),
        (lambda: MIXED.slowed({9: 0.5}), 'cluster "m" has devices 0 to 6; got 9'),
        (
            lambda: Cluster("c", (FAST, SLOW), (Hosts("k", 1),), INTRA, INTER),
            'cluster "c": hosts[0].kind is "k", which is not among its kinds: fast, slow',
        ),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(build, message):
    with pytest.raises(SpecError) as error:
        build()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("jax_name", "kind"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("TPU v6 lite", "tpu-v6e"),
        ("TPU v5p", "tpu-v5p"),
        ("TPU v5", "tpu-v5p"),
        ("TPU v5 lite", "tpu-v5e"),
        ("TPU v5e", "tpu-v5e"),
        ("cpu", None),
        ("NVIDIA H20", "h20"),
        ("NVIDIA H20-3e", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H800", "h800"),
        ("NVIDIA H800 PCIe", None),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_device_is_looked_up_by_the_name_jax_gives_it(jax_name, kind):
    found = lookup(jax_name)
    assert (found and found[0].name) == kind


def test_datasheets_are_plausible():
    for _, sheet, link in KNOWN:
        assert sheet.flops("bfloat16") >= 2 * sheet.flops("float32") * 0.999, sheet.name
        assert 16e9 <= sheet.memory_bytes <= 200e9, sheet.name
        assert link.bandwidth < sheet.memory_bandwidth < sheet.flops("float32"), sheet.name
        assert sheet.source == link.source == "datasheet"
        assert sheet.note
        assert link.note


def test_rates_of_a_dtype_that_does_not_exist_are_refused():
    with pytest.raises(SpecError, match="matmul_flops has no dtype fp99; write one of bool"):
        DeviceKind("x", (("fp99", 1.0),), 1.0, 1.0)
