"""The devices of a cluster by kind, in the units that pipelines are made of."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shardpar.planner.pipeline import Groups
from shardpar.spec.cluster import Cluster
from shardpar.spec.plan import Pipeline

Units = tuple[int, ...]
"""How many units of each kind."""

MOST_UNITS = 4


@dataclass(frozen=True)
class Stock:
    """The devices of a cluster by kind, in units.

    Attributes:
      kinds: names, the one with most memory first: early stages hold most activations.
      devices: per kind, its devices in order.
      unit: per kind, devices of one unit.
    """

    kinds: tuple[str, ...]
    devices: tuple[tuple[int, ...], ...]
    unit: tuple[int, ...]

    @classmethod
    def of(cls, cluster: Cluster, most_units: int = MOST_UNITS) -> Stock:
        """Units are whole hosts, as many to a unit as keeps their number small."""
        by_kind: dict[str, list[int]] = {}
        for device in range(cluster.num_devices):
            by_kind.setdefault(cluster.kind_of(device).name, []).append(device)
        names = sorted(by_kind, key=lambda n: (-cluster.kind_of(by_kind[n][0]).memory_bytes, n))
        units = []
        for name in names:
            sizes = set(Counter(map(cluster.host_of, by_kind[name])).values())
            total = len(by_kind[name])
            size = sizes.pop() if len(sizes) == 1 else total
            while total // size > most_units or total % size:
                size = next(s for s in range(size + 1, total + 1) if total % s == 0)
            units.append(size)
        return cls(tuple(names), tuple(tuple(by_kind[n]) for n in names), tuple(units))

    @property
    def units(self) -> Units:
        """All there is."""
        return tuple(len(d) // u for d, u in zip(self.devices, self.unit, strict=True))

    def chains(self, units: Units, most_stages: int) -> Iterator[Groups]:
        """Stages for some units: equal ones within a kind, kinds in every order."""
        per_kind: list[list[Groups]] = []
        for count, devices, unit in zip(units, self.devices, self.unit, strict=True):
            own = devices[: count * unit]
            options = []
            for stages in range(1, len(own) + 1):
                if len(own) % stages == 0 and stages <= most_stages:
                    size = len(own) // stages
                    options.append(tuple(own[i : i + size] for i in range(0, len(own), size)))
            per_kind.append(options or [()])
        used = [k for k, count in enumerate(units) if count]
        for picks in itertools.product(*per_kind):
            if sum(map(len, picks)) > most_stages:
                continue
            for order in itertools.permutations(used):
                yield tuple(group for k in order for group in picks[k])

    def placed(self, pipelines: Sequence[tuple[Units, Pipeline]]) -> tuple[Pipeline, ...]:
        """Pipelines on devices of their own; each comes on the first of its units."""
        taken = [0] * len(self.kinds)
        out = []
        for units, pipeline in pipelines:
            moved: dict[int, int] = {}
            for k, count in enumerate(units):
                size = count * self.unit[k]
                devices = self.devices[k]
                moved.update(zip(devices[:size], devices[taken[k] : taken[k] + size], strict=True))
                taken[k] += size
            stages = tuple(
                replace(stage, devices=tuple(moved[d] for d in stage.devices))
                for stage in pipeline.stages
            )
            out.append(replace(pipeline, stages=stages))
        return tuple(out)
