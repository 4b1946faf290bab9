"""What was measured of some devices and of a model's layers, and what a planner may conclude.

A profile keeps the curves; a cluster keeps one figure for each. `measured_cluster`
decides how the first becomes the second, `fit` how a few timings become a line.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardpar.errors import SpecError
from shardpar.spec.cluster import Cluster, DeviceKind, Link
from shardpar.spec.graph import DTYPE_BYTES

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
"""The kinds that are timed, by the names XLA gives them in a compiled program."""

RING = ("all-reduce", "all-gather", "reduce-scatter")
"""The kinds whose price the planner derives from a link's bandwidth and latency."""

MEMORY_OPS = {"scale": 2, "add": 3}
"""Elementwise operations that are timed, and how many arrays each reads and writes."""


@dataclass(frozen=True)
class Timed:
    """Seconds of one run of something, from several measurements of it.

    Attributes:
      best_s: the least; what rates are computed from, as others' work on a machine only adds.
      median_s: the middle one; far above the least on a busy machine.
    """

    best_s: float
    median_s: float

    def __post_init__(self) -> None:
        _require_positive("timing", best_s=self.best_s, median_s=self.median_s)
        if self.median_s < self.best_s:
            raise SpecError(
                f"timing: median_s is {self.median_s}, less than best_s, which is {self.best_s}; "
                "the least of several timings cannot be above their median"
            )


@dataclass(frozen=True)
class MatmulTime:
    """A product of two square matrices, on all devices at once.

    >>> MatmulTime("float32", 1000, Timed(0.01, 0.02)).flops
    200000000000.0
    """

    dtype: str
    size: int
    time: Timed

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise SpecError(
                f"matmuls: there is no dtype {self.dtype}; write one of {', '.join(DTYPE_BYTES)}"
            )
        _require_positive(f"matmuls: {self.dtype}", size=self.size)

    @property
    def flops(self) -> float:
        """FLOP/s reached by one device: a product and a sum for each of size³ terms."""
        return 2.0 * self.size**3 / self.time.best_s


@dataclass(frozen=True)
class MemoryTime:
    """An elementwise operation on arrays of `num_bytes` each, on all devices at once.

    >>> MemoryTime("add", 1000, Timed(1e-6, 1e-6)).bandwidth
    3000000000.0
    """

    op: str
    num_bytes: int
    time: Timed

    def __post_init__(self) -> None:
        if self.op not in MEMORY_OPS:
            raise SpecError(
                f'memory: there is no operation "{self.op}"; write {" or ".join(MEMORY_OPS)}'
            )
        _require_positive(f"memory: {self.op}", num_bytes=self.num_bytes)

    @property
    def bandwidth(self) -> float:
        """Bytes per second that one device read and wrote."""
        return MEMORY_OPS[self.op] * self.num_bytes / self.time.best_s


@dataclass(frozen=True)
class Fit:
    """A line through timings: seconds = fixed_s + per_unit_s * x.

    Attributes:
      fixed_s: what even the smallest takes.
      per_unit_s: for each byte, or each sequence, more.
      residual: root mean square of (line - timing) / timing: 0.1 is 10% off.
    """

    fixed_s: float
    per_unit_s: float
    residual: float

    def __post_init__(self) -> None:
        for what in ("fixed_s", "per_unit_s", "residual"):
            value = getattr(self, what)
            if not (value >= 0 and math.isfinite(value)):
                raise SpecError(f"fit: {what} is {value}; write a number, 0 or more")

    def seconds(self, x: float) -> float:
        """The line's value."""
        return self.fixed_s + self.per_unit_s * x


def fit(points: Sequence[tuple[float, float]]) -> Fit:
    """The line nearest to some timings, by least squares of the relative errors.

    Relative, because sizes go over many powers of ten: absolute errors would leave
    the fixed part to the noise of the largest. Neither part may be negative.

    Args:
      points: (x, seconds) pairs, at two or more different x.

    Raises:
      SpecError: all points are at one x.

    >>> line = fit([(1e3, 2e-5 + 1e-6), (1e6, 2e-5 + 1e-3), (1e8, 2e-5 + 1e-1)])
    >>> f"{line.fixed_s:.3g} {line.per_unit_s:.3g} {line.residual:.3g}"
    '2e-05 1e-09 0'
    """
    if len({x for x, _ in points}) < 2:
        raise SpecError(f"a line needs timings at two sizes or more; got {list(points)}")
    fixed_s, per_unit_s, residual = _least_squares([(1.0, x, s) for x, s in points])
    return Fit(_rounded(fixed_s), _rounded(per_unit_s), round(residual, 4))


def _least_squares(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """(p, q, residual), p and q not negative, that make p * u + q * v nearest to t, relative to t.

    With two unknowns, the best point is where no bound holds, or on one of the two.
    """
    scaled = [(u / t, v / t) for u, v, t in rows]
    uu, vv = (math.fsum(row[i] ** 2 for row in scaled) for i in (0, 1))
    uv = math.fsum(u * v for u, v in scaled)
    u1, v1 = (math.fsum(row[i] for row in scaled) for i in (0, 1))
    candidates = [(u1 / uu if uu else 0.0, 0.0), (0.0, v1 / vv if vv else 0.0)]
    determinant = uu * vv - uv * uv
    if determinant > 1e-12 * uu * vv:
        p, q = (u1 * vv - v1 * uv) / determinant, (v1 * uu - u1 * uv) / determinant
        if p >= 0 and q >= 0:
            candidates.append((p, q))

    def off(pair: tuple[float, float]) -> float:
        total = math.fsum((pair[0] * u + pair[1] * v - 1) ** 2 for u, v in scaled)
        return math.sqrt(total / len(scaled))

    best = min(candidates, key=off)
    return (*best, off(best))


@dataclass(frozen=True)
class CollectiveCurve:
    """One kind of collective over groups of one size, all groups at once.

    Attributes:
      kind: one of COLLECTIVES.
      group_size: devices in a group.
      times: (bytes, seconds) by size: the bytes of the array on one device, before it or
        after it, whichever are more.
      latency_s, bandwidth: a message of n bytes takes latency_s + n / bandwidth seconds.
      residual: how far that is from `times`, as in Fit.
    """

    kind: str
    group_size: int
    times: tuple[tuple[int, Timed], ...]
    latency_s: float
    bandwidth: float
    residual: float

    def __post_init__(self) -> None:
        where = f"collectives: {self.kind} over {self.group_size}"
        if self.kind not in COLLECTIVES:
            raise SpecError(f"{where}: no such kind; write one of {', '.join(COLLECTIVES)}")
        if self.group_size < 2:
            raise SpecError(f"{where}: a group has 2 devices or more")
        if not self.times:
            raise SpecError(f"{where}: times is empty; give at least one size with its seconds")
        _require_positive(where, bandwidth=self.bandwidth)
        _require_positive(where, **{f"times[{i}]": n for i, (n, _) in enumerate(self.times)})
        for what, value in (("latency_s", self.latency_s), ("residual", self.residual)):
            if not (value >= 0 and math.isfinite(value)):
                raise SpecError(f"{where}: {what} is {value}; write a number, 0 or more")

    def seconds(self, num_bytes: float) -> float:
        """What the fit says a message of this size takes."""
        return self.latency_s + num_bytes / self.bandwidth


def collective_curve(
    kind: str, group_size: int, times: Sequence[tuple[int, Timed]]
) -> CollectiveCurve:
    """Fits a curve to timings by message size.

    Where larger messages took no longer, noise or latency hid the bandwidth. It is
    then taken to be what the largest message reached, which is too low rather than too high.
    """
    points = [(float(n), time.best_s) for n, time in times]
    line = fit(points)
    latency_s, bandwidth, residual = line.fixed_s, _inverse(line.per_unit_s), line.residual
    if bandwidth is None:
        num_bytes, seconds = max(points)
        bandwidth = _rounded(num_bytes / seconds)
    return CollectiveCurve(kind, group_size, tuple(times), latency_s, bandwidth, residual)


def ring_share(kind: str, group_size: int) -> tuple[int, float]:
    """(hops, bytes over a link for each byte of the array) of a ring, as the planner counts them.

    >>> ring_share("all-gather", 4), ring_share("all-reduce", 4)
    ((3, 0.75), (3, 1.5))
    """
    passes = 2 if kind == "all-reduce" else 1
    return group_size - 1, passes * (group_size - 1) / group_size


def ring_link(curves: Sequence[CollectiveCurve]) -> tuple[float, float, float]:
    """The link that explains all ring collectives best: (bandwidth, latency_s of a hop, residual).

    Args:
      curves: at least one of a kind in RING.

    Raises:
      SpecError: there is none.
    """
    rows = [
        (float(hops), share * num_bytes, time.best_s)
        for curve in curves
        if curve.kind in RING
        for hops, share in [ring_share(curve.kind, curve.group_size)]
        for num_bytes, time in curve.times
    ]
    if not rows:
        raise SpecError(f"no {', '.join(RING)} was timed; a link cannot be told without one")
    latency_s, per_byte_s, residual = _least_squares(rows)
    bandwidth = _inverse(_rounded(per_byte_s)) or _rounded(max(b / s for _, b, s in rows))
    return bandwidth, _rounded(latency_s), round(residual, 4)


@dataclass(frozen=True)
class Overlap:
    """A matrix product and an all-reduce that do not need each other: apart, and in one program.

    Attributes:
      group_size: devices of the all-reduce.
      num_bytes: of its array.
      compute_s, collective_s: each in a program of its own.
      together_s: both in one program.

    >>> Overlap(2, 1024, compute_s=4.0, collective_s=2.0, together_s=5.0).hidden
    0.5
    """

    group_size: int
    num_bytes: int
    compute_s: float
    collective_s: float
    together_s: float

    def __post_init__(self) -> None:
        _require_positive(
            "overlap",
            group_size=self.group_size,
            num_bytes=self.num_bytes,
            compute_s=self.compute_s,
            collective_s=self.collective_s,
            together_s=self.together_s,
        )

    @property
    def slowdown(self) -> float:
        """Seconds together over those of the longer one alone: 1 where the other is hidden."""
        return self.together_s / max(self.compute_s, self.collective_s)

    @property
    def hidden(self) -> float:
        """Share of the shorter one that took no time of its own, 0 to 1."""
        saved_s = self.compute_s + self.collective_s - self.together_s
        return min(1.0, max(0.0, saved_s / min(self.compute_s, self.collective_s)))


@dataclass(frozen=True)
class HardwareProfile:
    """What was measured of the devices of one machine.

    Attributes:
      cluster: name of the cluster that was derived from it.
      device: what jax calls the kind of device.
      platform: "cpu", "gpu" or "tpu".
      devices: how many there were.
      command: what measured it.
      jax: jax's version.
      matmuls, memory, collectives: the curves.
      overlap: None where there is one device only.
    """

    cluster: str
    device: str
    platform: str
    devices: int
    command: str
    jax: str
    matmuls: tuple[MatmulTime, ...]
    memory: tuple[MemoryTime, ...]
    collectives: tuple[CollectiveCurve, ...] = ()
    overlap: Overlap | None = None

    def __post_init__(self) -> None:
        _require_positive(f'hardware profile of "{self.cluster}"', devices=self.devices)
        for what in ("matmuls", "memory"):
            if not getattr(self, what):
                raise SpecError(f'hardware profile of "{self.cluster}": {what} is empty')

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those whose products were timed."""
        return tuple(dict.fromkeys(m.dtype for m in self.matmuls))

    def best_flops(self, dtype: str) -> float:
        """The highest rate any size reached."""
        return max(m.flops for m in self.matmuls if m.dtype == dtype)

    def usual_flops(self, dtype: str) -> float:
        """What middling sizes reach: the median from a quarter of the largest size up."""
        found = [m for m in self.matmuls if m.dtype == dtype]
        largest = max(m.size for m in found)
        return statistics.median(m.flops for m in found if m.size >= largest / 4)

    @property
    def memory_bandwidth(self) -> float:
        """Bytes per second on the largest arrays, which no cache holds."""
        largest = max(m.num_bytes for m in self.memory)
        return max(m.bandwidth for m in self.memory if m.num_bytes == largest)


def measured_cluster(described: Cluster, profile: HardwareProfile) -> Cluster:
    """Puts measured rates in the place of a description's.

    A peak from a datasheet stays, as MFU is measured against it, and `efficiency` is
    the share of it that the best product reached. Without a datasheet the best rate is
    the peak, and `efficiency` what products of middling size reach of it.

    Args:
      described: the devices at hand, all of one kind, with datasheet or assumed rates.
      profile: what was measured of them.
    """
    (kind,) = described.kinds
    known = kind.source == "datasheet"
    if known:
        flops = kind.matmul_flops
        # The dtype that accelerators are built for: of float32 there is no one peak, as
        # jax lets products of it run on faster, less exact units.
        dtype = max(profile.dtypes, key=kind.flops)
        reached, peak = profile.best_flops(dtype), kind.flops(dtype)
    else:
        flops = tuple((d, _rounded(profile.best_flops(d))) for d in profile.dtypes)
        dtype = max(profile.dtypes, key=profile.best_flops)
        reached, peak = profile.usual_flops(dtype), profile.best_flops(dtype)
    rates = ", ".join(f"{d} {profile.best_flops(d) / 1e12:.3g} TFLOP/s" for d in profile.dtypes)
    share = (
        f"efficiency is the best {dtype} product over the datasheet's peak ({kind.note})"
        if known
        else f"efficiency is what {dtype} products of middling size reach of the best"
    )
    measured = DeviceKind(
        kind.name,
        flops,
        kind.memory_bytes,
        _rounded(profile.memory_bandwidth),
        # A float32 product may beat the peak of exact units; no plan should count on it.
        _rounded(min(1.0, reached / peak)),
        "measured",
        f"{profile.command}: best products {rates}; {share}",
        kind.extra_copies,
        None if profile.overlap is None else _rounded(profile.overlap.hidden),
    )
    return replace(
        described,
        name=profile.cluster,
        kinds=(measured,),
        intra_host=_measured_link(described.intra_host, profile),
    )


def _measured_link(described: Link, profile: HardwareProfile) -> Link:
    curves = [curve for curve in profile.collectives if curve.kind in RING]
    if not curves:
        return described
    bandwidth, latency_s, residual = ring_link(curves)
    groups = sorted({curve.group_size for curve in curves})
    return Link(
        bandwidth,
        latency_s,
        "measured",
        f"{profile.command}: {', '.join(RING)} over {', '.join(map(str, groups))} devices; "
        f"the fit is {residual:.0%} off",
    )


@dataclass(frozen=True)
class LayerFigures:
    """What XLA says of one layer, forward and backward, for the model profile's `batch`."""

    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float
    parameter_bytes: float
    temp_bytes: float
    saved_bytes: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        for what in (
            "forward_flops", "backward_flops", "forward_bytes", "backward_bytes",
            "parameter_bytes", "temp_bytes",
        ):  # fmt: skip
            value = getattr(self, what)
            if not (value >= 0 and math.isfinite(value)):
                raise SpecError(f"captured: {what} is {value}; write a number, 0 or more")
        if [recompute for recompute, _ in self.saved_bytes] != ["none", "selective", "full"]:
            raise SpecError(
                f"captured: saved_bytes is {self.saved_bytes}; give the bytes for none, selective "
                "and full, in this order"
            )


@dataclass(frozen=True)
class LayerTime:
    """One layer on one device: its forward alone, and with its backward."""

    batch: int
    length: int
    forward: Timed
    forward_backward: Timed

    def __post_init__(self) -> None:
        _require_positive("times", batch=self.batch, length=self.length)


@dataclass(frozen=True)
class LayerProfile:
    """A class of equal layers: what was captured of it, and what was measured.

    Attributes:
      name: of the class, as in the layer graph.
      layers: how many the model has.
      captured: from XLA's analysis.
      times: measured; empty where the layer did not fit.
      forward, forward_backward: lines through the times at the model's full length,
        by sequences; None with fewer than two batch sizes.
    """

    name: str
    layers: int
    captured: LayerFigures
    times: tuple[LayerTime, ...]
    forward: Fit | None
    forward_backward: Fit | None

    def __post_init__(self) -> None:
        _require_positive(f"class {self.name}", layers=self.layers)


@dataclass(frozen=True)
class ModelProfile:
    """A model's layers on one device.

    Attributes:
      model: as the layer graph calls it.
      batch: sequences that the captured figures are for.
      length: tokens of a sequence.
      compute_dtype: float dtype inside the model.
      device: what jax calls the kind of device.
      command: what measured it.
      jax: jax's version.
      classes: one for each class of layers.
    """

    model: str
    batch: int
    length: int
    compute_dtype: str
    device: str
    command: str
    jax: str
    classes: tuple[LayerProfile, ...]

    def __post_init__(self) -> None:
        _require_positive(f"profile of {self.model}", batch=self.batch, length=self.length)
        if self.compute_dtype not in DTYPE_BYTES:
            raise SpecError(
                f"profile of {self.model}: compute_dtype is {self.compute_dtype}; write one of "
                f"{', '.join(DTYPE_BYTES)}"
            )
        names = [cls.name for cls in self.classes]
        if len(set(names)) != len(names):
            raise SpecError(f"profile of {self.model}: a class is listed twice: {names}")


def layer_profile(
    name: str, layers: int, captured: LayerFigures, times: Sequence[LayerTime], length: int
) -> LayerProfile:
    """A class's profile, with lines through its times at the model's full length."""
    full = [time for time in times if time.length == length]
    lines: list[Fit | None] = [None, None]
    if len({time.batch for time in full}) > 1:
        lines = [
            fit([(time.batch, time.forward.best_s) for time in full]),
            fit([(time.batch, time.forward_backward.best_s) for time in full]),
        ]
    return LayerProfile(name, layers, captured, tuple(times), *lines)


def _inverse(value: float) -> float | None:
    """1 / value, unless that is no finite number."""
    return _rounded(1 / value) if value > 0 and math.isfinite(1 / value) else None


def _rounded(value: float) -> float:
    """Four digits: timings know no more, and people read the files."""
    return float(f"{value:.4g}")


def _require_positive(where: str, **values: float) -> None:
    for what, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise SpecError(f"{where}: {what} is {value}; write a positive number")
