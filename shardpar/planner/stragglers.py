"""Which devices are slow, from what their work took and what it should have taken.

A device is called slow when it is slower than predicted by a factor for a time, and well again
when it is nearly as fast as predicted for that time (Malleus, arXiv 2410.13333, watches for
stragglers the same way). A watch is a value: what it has seen goes in, a new one comes out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low
from typing import Literal

from shardpar.errors import SpecError
from shardpar.planner.options import StragglerOptions
from shardpar.spec.plan import Plan

Drift = Literal["", "slower", "faster"]


@dataclass(frozen=True)
class Watched:
    """What is known of one device.

    Attributes:
      device: its number.
      speed: the share of its profile's rate that is reported; 1 for one that is well.
      drift: which way its readings disagree with that, one and all since `since_s`.
      since_s: when they began to.
      readings: how many they are, and `ratios` their factors over the prediction added up.
      well_since_s: when it began to be nearly as fast as predicted; None while it is not. A change
        of speed does not start that time anew.
    """

    device: int
    speed: float = 1.0
    drift: Drift = ""
    since_s: float = 0.0
    readings: int = 0
    ratios: float = 0.0
    well_since_s: float | None = None


@dataclass(frozen=True)
class StragglerWatch:
    """The devices that were seen so far.

    >>> watch = StragglerWatch(StragglerOptions(for_s=20.0))
    >>> for at_s in (0.0, 10.0, 20.0):
    ...     watch = watch.seen(at_s, {0: 2.0, 1: 5.0, 2: 2.0}, {0: 2.0, 1: 2.0, 2: 2.0})
    >>> watch.speeds
    {1: 0.4}
    """

    options: StragglerOptions = field(default_factory=StragglerOptions)
    devices: tuple[Watched, ...] = ()
    at_s: float = -math.inf

    @property
    def _well(self) -> float:
        return min(self.options.recovered, self.options.factor)

    @property
    def speeds(self) -> dict[int, float]:
        """The speeds of the devices that are slow: what `Cluster.slowed` takes."""
        return {w.device: w.speed for w in self.devices if w.speed < 1}

    def seen(
        self, at_s: float, measured_s: Mapping[int, float], predicted_s: Mapping[int, float]
    ) -> StragglerWatch:
        """The watch after one more step.

        Args:
          at_s: when, by any clock that does not go back.
          measured_s: by device, what its own work took: waiting for others left out. Devices
            that are not in it, as they stand by, stay what they are called.
          predicted_s: by device, the same by the profile: by rates of devices that are well,
            also where a plan was made for slow ones.

        Raises:
          SpecError: time goes back, seconds are not positive, or a prediction is missing.
        """
        if not at_s >= self.at_s or math.isinf(at_s):
            raise SpecError(
                f"stragglers: a reading at {at_s} s after one at {self.at_s} s; give the time of a "
                "clock that does not go back"
            )
        ratios = {device: _ratio(device, measured_s, predicted_s) for device in measured_s}
        if self.options.relative and ratios:
            # Of an even number the lower one, so that of two devices one may be slow.
            typical = median_low(ratios.values())
            ratios = {device: ratio / typical for device, ratio in ratios.items()}
        known = {w.device: w for w in self.devices}
        for device, ratio in ratios.items():
            known[device] = self._next(known.get(device, Watched(device)), at_s, ratio)
        return replace(self, devices=tuple(known[d] for d in sorted(known)), at_s=at_s)

    def _next(self, before: Watched, at_s: float, ratio: float) -> Watched:
        began = at_s if before.well_since_s is None else before.well_since_s
        well_since_s = began if ratio <= self._well else None
        if well_since_s is not None and at_s - well_since_s >= self.options.for_s:
            return Watched(before.device, well_since_s=well_since_s)
        drift = self._drift(before.speed, ratio)
        if not drift:
            return Watched(before.device, before.speed, well_since_s=well_since_s)
        if drift != before.drift:
            now = Watched(before.device, before.speed, drift, at_s, 1, ratio)
        else:
            now = replace(before, readings=before.readings + 1, ratios=before.ratios + ratio)
        now = replace(now, well_since_s=well_since_s)
        if at_s - now.since_s < self.options.for_s:
            return now
        mean = now.ratios / now.readings
        # Rounded, so that devices that are slow alike are one kind to the planner.
        speed = 1.0 if mean <= self._well else max(0.01, round(1 / mean, 2))
        return Watched(now.device, speed, well_since_s=well_since_s)

    def _drift(self, speed: float, ratio: float) -> Drift:
        if ratio * speed >= self.options.factor:
            return "slower"
        faster = ratio * speed <= 1 / self.options.factor or ratio <= self._well
        return "faster" if speed < 1 and faster else ""


def _ratio(device: int, measured_s: Mapping[int, float], predicted_s: Mapping[int, float]) -> float:
    if device not in predicted_s:
        raise SpecError(
            f"stragglers: device {device} has a measured time but no predicted one; give both"
        )
    for what, value in (("measured", measured_s[device]), ("predicted", predicted_s[device])):
        if not (value > 0 and math.isfinite(value)):
            raise SpecError(
                f"stragglers: device {device} has {what} seconds {value}; write a positive number"
            )
    return measured_s[device] / predicted_s[device]


def by_device(plan: Plan, stages_s: Sequence[float]) -> dict[int, float]:
    """Seconds of each device from seconds of each stage: those of all stages that it holds.

    All devices of a group wait for its slowest, so a slow one makes its whole group look slow.

    Args:
      plan: the plan that ran.
      stages_s: of each stage, pipeline by pipeline.

    Raises:
      SpecError: there are more stages than seconds, or fewer.

    >>> from shardpar.spec.mesh import Mesh
    >>> from shardpar.spec.plan import LayerStrategy, Pipeline, Stage
    >>> stage = Stage((4, 5), Mesh.factored(2), (LayerStrategy("all"),))
    >>> by_device(Plan("c", 1, (Pipeline(1, 1, (stage,)),)), [0.5])
    {4: 0.5, 5: 0.5}
    """
    stages = [stage for pipeline in plan.pipelines for stage in pipeline.stages]
    if len(stages) != len(stages_s):
        raise SpecError(
            f"stragglers: the plan has {len(stages)} stages, but there are seconds of "
            f"{len(stages_s)}; give one number for each stage"
        )
    total: dict[int, float] = {}
    for stage, seconds in zip(stages, stages_s, strict=True):
        for device in stage.devices:
            total[device] = total.get(device, 0.0) + seconds
    return total
