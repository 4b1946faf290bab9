"""The machines: what each device can compute and hold, and how fast they reach each other.

A cluster is a list of hosts with equal devices inside each; devices are numbered
host by host. Every figure carries where it came from, because a plan is only as
true as the rates under it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from shardpar.errors import SpecError
from shardpar.spec.graph import DTYPE_BYTES

Source = Literal["measured", "datasheet", "assumed"]

MOST_DEVICES = 2**15
"""As many as a plan's file can list."""

LEAST, MOST = 1e-9, 1e30
"""Between these a rate or a size is taken at its word; beyond them prices overflow."""
_BETWEEN = f"write a number from {LEAST} to {MOST}"


@dataclass(frozen=True)
class DeviceKind:
    """One kind of device.

    Attributes:
      name: e.g. "h100-sxm"; hosts refer to it.
      matmul_flops: (dtype name, dense FLOP/s) pairs; the peak that MFU is measured against.
      efficiency: share of that peak a well-shaped matmul reaches.
      extra_copies: copies of the optimizer's arrays that the backend's compiled programs hold
        beyond what a plan implies.
      overlap: share of gradient and parameter traffic that hides behind compute, if it was
        measured; None leaves it to the cost model's assumption.
      memory_bytes: device memory.
      memory_bandwidth: bytes per second to and from it.
      source: where the rates came from.
      note: the datasheet or the command that measured them.
    """

    name: str
    matmul_flops: tuple[tuple[str, float], ...]
    memory_bytes: float
    memory_bandwidth: float
    efficiency: float = 0.6
    source: Source = "datasheet"
    note: str = ""
    extra_copies: float = 0.0
    overlap: float | None = None

    def __post_init__(self) -> None:
        if not self.matmul_flops:
            raise SpecError(
                f'device kind "{self.name}": matmul_flops is empty; give {{float32: …}}'
            )
        for dtype, _ in self.matmul_flops:
            if dtype not in DTYPE_BYTES:
                raise SpecError(
                    f'device kind "{self.name}": matmul_flops has no dtype {dtype}; write one of '
                    f"{', '.join(DTYPE_BYTES)}"
                )
        for what, value in (
            *((f"matmul_flops.{k}", v) for k, v in self.matmul_flops),
            ("memory_bytes", self.memory_bytes),
            ("memory_bandwidth", self.memory_bandwidth),
            ("efficiency", self.efficiency),
        ):
            if not (value > 0 and math.isfinite(value)):
                raise SpecError(
                    f'device kind "{self.name}": {what} is {value}; write a positive number'
                )
            if not LEAST <= value <= MOST:
                raise SpecError(f'device kind "{self.name}": {what} is {value}; {_BETWEEN}')
        if not 0 <= self.extra_copies <= MOST:
            raise SpecError(
                f'device kind "{self.name}": extra_copies is {self.extra_copies}; write 0 or more'
            )
        if self.overlap is not None and not 0 <= self.overlap <= 1:
            raise SpecError(
                f'device kind "{self.name}": overlap is {self.overlap}; '
                "it is a share of traffic, write 0 to 1"
            )
        if self.efficiency > 1:
            raise SpecError(
                f'device kind "{self.name}": efficiency is {self.efficiency}; '
                "it is a share of the peak, at most 1"
            )

    def flops(self, dtype: str) -> float:
        """Dense matmul FLOP/s for a dtype; an unlisted dtype runs at the slowest listed rate.

        >>> DeviceKind("x", (("float32", 1.0), ("bfloat16", 2.0)), 1, 1).flops("bfloat16")
        2.0
        """
        rates = dict(self.matmul_flops)
        return rates.get(dtype, min(rates.values()))

    def at(self, speed: float) -> DeviceKind:
        """The kind of a device that reaches only a share of these rates; its memory is whole.

        >>> slow = DeviceKind("x", (("float32", 8.0),), 1.0, 2.0).at(0.25)
        >>> slow.name, slow.matmul_flops, slow.memory_bandwidth
        ('x at 0.25', (('float32', 2.0),), 0.5)
        """
        if speed == 1:
            return self
        return replace(
            self,
            name=f"{self.name} at {speed}",
            matmul_flops=tuple((dtype, rate * speed) for dtype, rate in self.matmul_flops),
            memory_bandwidth=self.memory_bandwidth * speed,
        )


@dataclass(frozen=True)
class Link:
    """A connection one device has to its peers: bytes per second each way, and seconds of delay."""

    bandwidth: float
    latency_s: float = 1e-5
    source: Source = "datasheet"
    note: str = ""

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and math.isfinite(self.bandwidth)):
            raise SpecError(f"link: bandwidth is {self.bandwidth}; write positive bytes per second")
        if not LEAST <= self.bandwidth <= MOST:
            raise SpecError(f"link: bandwidth is {self.bandwidth}; {_BETWEEN}")
        if not 0 <= self.latency_s <= MOST:
            raise SpecError(f"link: latency_s is {self.latency_s}; write seconds, 0 or more")


@dataclass(frozen=True)
class Hosts:
    """`count` equal machines with `devices` devices of one kind each."""

    kind: str
    devices: int
    count: int = 1

    def __post_init__(self) -> None:
        if self.devices < 1 or self.count < 1:
            raise SpecError(
                f'hosts of kind "{self.kind}": {self.count} hosts with {self.devices} devices; '
                "both must be at least 1"
            )


@dataclass(frozen=True)
class Cluster:
    """Hosts, the kinds of their devices, and the links inside a host and between hosts.

    Attributes:
      name: for people, and for plans to say what they were made for.
      kinds: those that hosts refer to.
      hosts: in the order in which their devices are numbered.
      intra_host, inter_host: links between two devices of one host, and of two.
      speeds: (device, share of its kind's rates) of devices slower than their kind, in order.

    >>> kind = DeviceKind("x", (("float32", 1e12),), memory_bytes=16e9, memory_bandwidth=1e11)
    >>> cluster = Cluster("two", (kind,), (Hosts("x", 4, 2),), Link(1e11), Link(1e10))
    >>> cluster.num_devices, cluster.host_of(5)
    (8, 1)
    """

    name: str
    kinds: tuple[DeviceKind, ...]
    hosts: tuple[Hosts, ...]
    intra_host: Link
    inter_host: Link
    speeds: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        names = [kind.name for kind in self.kinds]
        if len(set(names)) != len(names):
            raise SpecError(f'cluster "{self.name}": a device kind is listed twice: {names}')
        if not self.hosts:
            raise SpecError(f'cluster "{self.name}": it has no hosts')
        for i, hosts in enumerate(self.hosts):
            if hosts.kind not in names:
                raise SpecError(
                    f'cluster "{self.name}": hosts[{i}].kind is "{hosts.kind}", '
                    f"which is not among its kinds: {', '.join(names)}"
                )
        if self.num_devices > MOST_DEVICES:
            raise SpecError(
                f'cluster "{self.name}": hosts have {self.num_devices:,} devices in all; a cluster '
                f"may have {MOST_DEVICES:,}"
            )
        if self.speeds:
            self._check_speeds()

    def _check_speeds(self) -> None:
        for device, speed in self.speeds:
            if not LEAST <= speed <= 1:
                raise SpecError(
                    f'cluster "{self.name}": speeds: device {device} has speed {speed}; it is a '
                    "share of its kind's rates, write more than 0 and at most 1"
                )
            if not 0 <= device < self.num_devices:
                raise SpecError(
                    f'cluster "{self.name}": speeds: there is no device {device}; name one from 0 '
                    f"to {self.num_devices - 1}"
                )
        for (one, _), (other, _) in itertools.pairwise(self.speeds):
            if other <= one:
                raise SpecError(
                    f'cluster "{self.name}": speeds: device {other} comes after device {one}; '
                    "name each device once, the smallest number first"
                )
        _ = self._slow  # A rate that is too small shows here, not in the middle of a search.

    @cached_property
    def _slow(self) -> dict[int, DeviceKind]:
        known: dict[tuple[str, float], DeviceKind] = {}
        slow = {}
        for device, speed in self.speeds:
            name = self._placement[device][0]
            if (name, speed) not in known:
                known[name, speed] = self._by_name[name].at(speed)
            slow[device] = known[name, speed]
        return slow

    @cached_property
    def _placement(self) -> tuple[tuple[str, int], ...]:
        placed: list[tuple[str, int]] = []
        host = 0
        for hosts in self.hosts:
            for _ in range(hosts.count):
                placed += [(hosts.kind, host)] * hosts.devices
                host += 1
        return tuple(placed)

    @cached_property
    def _by_name(self) -> dict[str, DeviceKind]:
        return {kind.name: kind for kind in self.kinds}

    @cached_property
    def num_devices(self) -> int:
        """Devices in all."""
        return sum(hosts.count * hosts.devices for hosts in self.hosts)

    def kind_of(self, device: int) -> DeviceKind:
        """The kind of a device, by its number; that of a slow one has the rates it reaches."""
        self._require(device)
        slow = self._slow.get(device)
        return self._by_name[self._placement[device][0]] if slow is None else slow

    def host_of(self, device: int) -> int:
        """The number of the host a device sits in."""
        self._require(device)
        return self._placement[device][1]

    def link_among(self, devices: tuple[int, ...]) -> Link:
        """The slowest link a collective over these devices must cross."""
        hosts = {self.host_of(device) for device in devices}
        return self.intra_host if len(hosts) <= 1 else self.inter_host

    def only(self, devices: Iterable[int]) -> Cluster:
        """The cluster of some of the devices, numbered anew in their old order.

        Hosts without any of them vanish, so hosts may become unequal.

        Raises:
          SpecError: there is no such device, or none is left.

        >>> kind = DeviceKind("x", (("float32", 1e12),), memory_bytes=16e9, memory_bandwidth=1e11)
        >>> cluster = Cluster("two", (kind,), (Hosts("x", 4, 2),), Link(1e11), Link(1e10))
        >>> cluster.only({1, 2, 3, 4, 5, 6, 7}).hosts
        (Hosts(kind='x', devices=3, count=1), Hosts(kind='x', devices=4, count=1))
        """
        kept = sorted(set(devices))
        if not kept:
            raise SpecError(f'cluster "{self.name}": no device is left; name at least one to keep')
        for device in kept:
            self._require(device)
        sizes = [
            (self._placement[members[0]][0], len(members))
            for _, group in itertools.groupby(kept, self.host_of)
            if (members := list(group))
        ]
        hosts = tuple(
            Hosts(kind, size, len(list(alike))) for (kind, size), alike in itertools.groupby(sizes)
        )
        known = self._speed_by_device
        speeds = tuple((new, known[old]) for new, old in enumerate(kept) if old in known)
        return replace(self, hosts=hosts, speeds=speeds)

    def slowed(self, speeds: Mapping[int, float]) -> Cluster:
        """The cluster with some devices slower than their kind, or as fast as it again.

        Args:
          speeds: by device, the share of its kind's rates that it reaches; devices that are
            not named keep the speed they have.

        Raises:
          SpecError: a speed is not above 0 and at most 1, or there is no such device.

        >>> kind = DeviceKind("x", (("float32", 1e12),), memory_bytes=16e9, memory_bandwidth=1e11)
        >>> cluster = Cluster("one", (kind,), (Hosts("x", 4),), Link(1e11), Link(1e10))
        >>> slow = cluster.slowed({2: 0.4})
        >>> slow.kind_of(2).name, slow.slowed({2: 1.0}) == cluster
        ('x at 0.4', True)
        """
        for device in speeds:
            self._require(device)
        known = {**self._speed_by_device, **speeds}
        return replace(self, speeds=tuple((d, s) for d, s in sorted(known.items()) if s != 1))

    def speed_of(self, device: int) -> float:
        """The share of its kind's rates that a device reaches."""
        self._require(device)
        return self._speed_by_device.get(device, 1.0)

    @cached_property
    def _speed_by_device(self) -> dict[int, float]:
        return dict(self.speeds)

    def _require(self, device: int) -> None:
        if not 0 <= device < self.num_devices:
            raise SpecError(
                f'cluster "{self.name}" has devices 0 to {self.num_devices - 1}; got {device}'
            )
