"""The rates the cost model uses for one group of devices, and where each number came from."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from shardpar.spec.cluster import Cluster, Link
from shardpar.spec.mesh import Axes, Mesh

OVERLAP = 0.5
"""Share of gradient and parameter traffic assumed to hide behind compute, until it is measured."""


@dataclass(frozen=True)
class Rates:
    """What one device of a group does per second.

    Attributes:
      flops: matmul FLOP/s reached in the compute dtype: peak times efficiency.
      memory_bandwidth: bytes per second.
      memory_bytes: of the smallest device.
      extra_copies: as in DeviceKind, the most of any device.
      overlap: share of gradient and parameter traffic that hides behind compute.
      sources: (figure, measured | datasheet | assumed) pairs.
    """

    flops: float
    memory_bandwidth: float
    memory_bytes: float
    extra_copies: float = 0.0
    overlap: float = OVERLAP
    sources: tuple[tuple[str, str], ...] = ()


def rates(cluster: Cluster, devices: tuple[int, ...], dtype: str) -> Rates:
    """The rates of a group: those of its slowest device, as all wait for it.

    Args:
      cluster: the machines.
      devices: the group.
      dtype: compute dtype, "bfloat16" or "float32".
    """
    kinds = {cluster.kind_of(device) for device in devices}
    hidden = [kind.overlap for kind in kinds]
    slowest = min(kinds, key=lambda kind: kind.flops(dtype) * kind.efficiency)
    return Rates(
        flops=slowest.flops(dtype) * slowest.efficiency,
        memory_bandwidth=min(kind.memory_bandwidth for kind in kinds),
        memory_bytes=min(kind.memory_bytes for kind in kinds),
        extra_copies=max(kind.extra_copies for kind in kinds),
        overlap=min(OVERLAP if share is None else share for share in hidden),
        sources=(
            ("flops", slowest.source),
            ("memory", slowest.source),
            ("intra_host", cluster.intra_host.source),
            ("inter_host", cluster.inter_host.source),
            ("efficiency", slowest.source if slowest.source == "measured" else "assumed"),
            ("overlap", "assumed" if None in hidden else "measured"),
        ),
    )


@functools.lru_cache(maxsize=65536)
def link_over(cluster: Cluster, devices: tuple[int, ...], mesh: Mesh, axes: Axes) -> Link:
    """The slowest link that a collective over some of a stage's axes crosses, in any group."""
    near, starts = group(mesh, axes), group(mesh, mesh.without(axes))
    links = {cluster.link_among(tuple(devices[s + i] for i in near)) for s in starts}
    return min(links, key=lambda link: link.bandwidth)


def group(mesh: Mesh, axes: Axes) -> tuple[int, ...]:
    """Positions of the devices that differ from device 0 only along these axes.

    >>> group(Mesh.factored(8), ("a", "c"))
    (0, 1, 4, 5)
    """
    strides, stride = {}, 1
    for name, size in reversed(mesh.axes):
        strides[name] = stride
        stride *= size
    ranges = [range(size) if name in axes else range(1) for name, size in mesh.axes]
    return tuple(
        sum(i * strides[name] for i, name in zip(place, mesh.names, strict=True))
        for place in itertools.product(*ranges)
    )
