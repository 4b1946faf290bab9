"""Whether devices have become slow while a run trains, and asks for a plan that knows it.

All devices are probed now and then; those that stay slower than their kind, or are well again,
change the speeds that the planner is told (Malleus, arXiv 2410.13333).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shardpar.planner.options import StragglerOptions
from shardpar.planner.stragglers import StragglerWatch
from shardpar.run.peers import Peers
from shardpar.spec.cluster import Cluster


@dataclass
class SpeedWatch:
    """Probes the devices of a run.

    Attributes:
      probe: seconds of the same work on each of some devices that is of this process.
      work_flops: operations of that work.
      cluster: the machines.
      peers: the processes of the run.
      tell: told the speeds in the first process when they have changed.
      options: how often, and when a device counts as slow.

    >>> from shardpar.run.peers import ALONE
    >>> from shardpar.spec.cluster import DeviceKind, Hosts, Link
    >>> kind = DeviceKind("x", (("float32", 1e12),), memory_bytes=16e9, memory_bandwidth=1e11)
    >>> cluster = Cluster("one", (kind,), (Hosts("x", 3),), Link(1e11), Link(1e10))
    >>> told = []
    >>> watch = SpeedWatch(lambda _: {0: 1.0, 1: 2.6, 2: 1.0}, 1e12, cluster, ALONE, told.append,
    ...                    StragglerOptions(for_s=30.0, every_s=10.0))
    >>> for now_s in range(0, 60, 10):
    ...     if watch.is_due(float(now_s)):
    ...         watch.look(float(now_s), [0, 1, 2])
    >>> told
    [{1: 0.38}]
    """

    probe: Callable[[Sequence[int]], Mapping[int, float]]
    work_flops: float
    cluster: Cluster
    peers: Peers
    tell: Callable[[Mapping[int, float]], None]
    options: StragglerOptions

    def __post_init__(self) -> None:
        self._watch = StragglerWatch(self.options)
        self._last_s: float | None = None
        self._told: dict[int, float] = {}

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to probe; asked in the first process."""
        if self.options.every_s == 0:
            return False
        return self._last_s is None or now_s - self._last_s >= self.options.every_s

    def look(self, now_s: float, devices: Sequence[int]) -> None:
        """Probes, in every process at once, while no step is under way.

        Args:
          now_s: when, by a clock that only goes forward.
          devices: those that are not lost.
        """
        said = self.peers.gather("speeds", {str(d): s for d, s in self.probe(devices).items()})
        measured_s = {int(d): s for of_one in said for d, s in of_one.items()}
        self._last_s = now_s
        if not self.peers.is_first:
            return
        predicted_s = {
            d: self.work_flops / self.cluster.slowed({d: 1.0}).kind_of(d).flops("float32")
            for d in measured_s
        }
        self._watch = self._watch.seen(now_s, measured_s, predicted_s)
        speeds = self._watch.speeds
        if speeds != self._told:
            # Devices that are well again are told too.
            self.tell({**dict.fromkeys(self._told, 1.0), **speeds})
            self._told = speeds
