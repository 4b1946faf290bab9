"""Measures devices and layers, writes the profiles and shows them: the heavy half of profile."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import msgspec
from rich.table import Table

from shardpar.capture.timing_programs import layer_programs
from shardpar.capture.trace import Captured
from shardpar.cli.planning import capture, use_devices, write_text
from shardpar.cli.tables import byte_text, console, print_json
from shardpar.config.schema import RunConfig
from shardpar.errors import CaptureError, UserError
from shardpar.lowering.devices import local_cluster
from shardpar.lowering.measure import (
    FULL,
    QUICK,
    Effort,
    layer_seconds,
    measure_hardware,
    phase_count,
)
from shardpar.planner.prices import LayerCost, layer_cost
from shardpar.planner.setting import Setting, Workload
from shardpar.run.progress import Progress
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import LayerClass, LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy
from shardpar.spec.profile import (
    Fit,
    HardwareProfile,
    LayerFigures,
    LayerProfile,
    LayerTime,
    ModelProfile,
    layer_profile,
    measured_cluster,
)
from shardpar.spec.profile_text import hardware_to_text, model_to_text
from shardpar.spec.text import cluster_to_text

_MEMORY_SHARE = 0.5
"""Share of the device's memory that a layer may be predicted to need, to be measured."""

_LONGEST_RUNS = 10
"""A layer predicted to take longer than so many of an effort's longest runs is left out."""

Phase = Callable[[str], AbstractContextManager[None]]


def profile_hardware(
    command: str, *, out: str | None, devices: int | None, quick: bool, json: bool
) -> None:
    """`shardpar profile hardware`."""
    files = _hardware_files(out)
    use_devices(devices)
    described = local_cluster()
    with Progress() as progress:
        measured = measure_hardware(
            jax.devices(),
            cluster=described.name,
            memory_bytes=min(kind.memory_bytes for kind in described.kinds),
            command=command,
            effort=QUICK if quick else FULL,
            phase=_counted(progress, phase_count(len(jax.devices()))),
        )
    cluster = measured_cluster(described, measured)
    for path, text in zip(
        files, (cluster_to_text(cluster), hardware_to_text(measured)), strict=False
    ):
        write_text(path, text)
    if json:
        print_json({"cluster": cluster_to_text(cluster), "profile": msgspec.to_builtins(measured)})
        return
    _show_hardware(measured, cluster)
    told = console(stderr=True)
    if files:
        told.print(f"written to {files[0]}, the curves to {files[1]}", highlight=False)
    else:
        told.print("nothing was written; to plan with these rates, add --out FILE", highlight=False)


def profile_model(
    config: RunConfig,
    cluster: Cluster | None,
    command: str,
    *,
    out: str | None,
    quick: bool,
    json: bool,
) -> None:
    """`shardpar profile model`."""
    if out:
        _require_writable(Path(out))
    use_devices(None)
    device = jax.devices()[0]
    here = local_cluster([device])
    effort = QUICK if quick else FULL
    with Progress() as progress:
        with progress.phase("capturing the model"):
            captured = capture(config)
            for warning in captured.warnings:
                progress.say(f"note: {warning}")
        work = Workload(captured.graph.batch, captured.graph.compute_dtype)
        prices = _Prices(captured.graph, cluster or here, work)
        shapes = _shapes(captured.graph.batch, config.data.sequence_length, quick)
        times = _layer_times(
            captured, shapes, _Budget(prices, effort, here.kinds[0].memory_bytes), progress
        )
    profile = ModelProfile(
        captured.graph.model,
        captured.graph.batch,
        config.data.sequence_length,
        captured.graph.compute_dtype,
        device.device_kind,
        command,
        jax.__version__,
        tuple(
            layer_profile(
                cls.name,
                sum(layer.class_name == cls.name for layer in captured.graph.layers),
                _figures(cls),
                times[cls.name],
                config.data.sequence_length,
            )
            for cls in captured.graph.classes
        ),
    )
    if out:
        write_text(Path(out), model_to_text(profile))
    if json:
        print_json(
            {"profile": msgspec.to_builtins(profile), "predicted": _predictions(profile, prices)}
        )
        return
    _show_model(profile, prices)
    if out:
        console(stderr=True).print(f"written to {out}", highlight=False)


def _hardware_files(out: str | None) -> tuple[Path, ...]:
    """The cluster's file and, beside it, the curves'."""
    if out is None:
        return ()
    path = Path(out)
    _require_writable(path)
    beside = path.with_suffix(".profile.yaml")
    _require_writable(beside)
    return path, beside


def _require_writable(path: Path) -> None:
    """Finds out before the measuring, not after it.

    Raises:
      UserError: naming what is in the way.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file in it, such as {path}/here.yaml")
    if not folder.is_dir():
        raise UserError(f"--out {path}: {folder} is not a folder; write another path")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"--out {path} cannot be written; write another path")


def _counted(progress: Progress, total: int) -> Phase:
    numbers = itertools.count(1)
    return lambda what: progress.phase(f"{next(numbers)}/{total} {what}")


@dataclass(frozen=True)
class _Prices:
    """What the cost model says of one layer on one device."""

    graph: LayerGraph
    cluster: Cluster
    workload: Workload

    def of(self, cls: LayerClass, batch: int) -> LayerCost:
        setting = Setting(self.cluster, (0,), Mesh(), self.graph.batch, batch, 1, self.workload)
        return layer_cost(cls, LayerStrategy(cls.name), setting)


@dataclass(frozen=True)
class _Budget:
    """Which layers are small enough to be measured here."""

    prices: _Prices
    effort: Effort
    memory_bytes: float

    def refusal(self, cls: LayerClass, batch: int, share: float) -> str | None:
        """Why a layer is not measured at a batch size and a share of the full length, or None."""
        price = self.prices.of(cls, batch)
        needs = 2 * price.parameter_bytes + share * (price.saved_bytes + price.scratch_bytes)
        if needs > _MEMORY_SHARE * self.memory_bytes:
            return f"it would need about {byte_text(needs)}"
        seconds = share * (price.forward_s + price.backward_s)
        if seconds > _LONGEST_RUNS * self.effort.longest_s:
            return f"one run would take about {seconds:.0f} s"
        return None


def _shapes(batch: int, length: int, quick: bool) -> tuple[tuple[int, int], ...]:
    """(batch, length) pairs: a few batch sizes at full length, then shorter sequences.

    >>> _shapes(16, 128, quick=False)
    ((1, 128), (2, 128), (4, 128), (8, 128), (2, 64), (2, 32))
    """
    batches = [b for b in ((1, 2) if quick else (1, 2, 4, 8)) if b <= batch]
    shorter = [length // part for part in ((2,) if quick else (2, 4)) if length % part == 0]
    return (*((b, length) for b in batches), *((min(2, batch), n) for n in shorter))


def _layer_times(
    captured: Captured, shapes: Sequence[tuple[int, int]], budget: _Budget, progress: Progress
) -> dict[str, list[LayerTime]]:
    found: dict[str, list[LayerTime]] = {cls.name: [] for cls in captured.graph.classes}
    classes = {cls.name: cls for cls in captured.graph.classes}
    full = max(length for _, length in shapes)
    phase = _counted(progress, len(shapes))
    for batch, length in shapes:
        with phase(f"layers of {batch} x {length}"):
            try:
                programs = layer_programs(captured, batch, length)
            except CaptureError as error:
                progress.say(f"note: {batch} x {length} is left out: {error}")
                continue
            for program in programs:
                name = program.class_name
                reason = budget.refusal(classes[name], batch, length / full)
                if reason is not None:
                    progress.say(f"note: {name} of {batch} x {length} is left out: {reason}")
                    continue
                forward, both = layer_seconds(program, budget.effort)
                found[name].append(LayerTime(batch, length, forward, both))
    return found


def _figures(cls: LayerClass) -> LayerFigures:
    return LayerFigures(
        cls.forward_flops,
        cls.backward_flops,
        cls.forward_bytes,
        cls.backward_bytes,
        float(sum(parameter.num_bytes for parameter in cls.parameters)),
        cls.temp_bytes,
        tuple((recompute, float(cls.saved(recompute))) for recompute in _RECOMPUTE),
    )


_RECOMPUTE = ("none", "selective", "full")


def _predictions(profile: ModelProfile, prices: _Prices) -> list[dict[str, Any]]:
    classes = {cls.name: cls for cls in prices.graph.classes}
    return [
        {
            "class": cls.name,
            "batch": time.batch,
            "forward_s": price.forward_s,
            "forward_backward_s": price.forward_s + price.backward_s,
        }
        for cls in profile.classes
        for time in cls.times
        if time.length == profile.length
        for price in [prices.of(classes[cls.name], time.batch)]
    ]


def _show_hardware(profile: HardwareProfile, cluster: Cluster) -> None:
    screen = console()
    screen.print(_matmul_table(profile))
    screen.print(_memory_table(profile))
    if profile.collectives:
        screen.print(_collective_table(profile))
    overlap, (kind,) = profile.overlap, cluster.kinds
    if overlap is None:
        lines = ["overlap: not measured, as there is one device"]
    else:
        lines = [
            f"overlap: products take {overlap.compute_s * 1e3:.2f} ms, an all-reduce of "
            f"{byte_text(overlap.num_bytes)} {overlap.collective_s * 1e3:.2f} ms, both together "
            f"{overlap.together_s * 1e3:.2f} ms: {overlap.slowdown:.2f} times the longer one, "
            f"{overlap.hidden:.0%} of the shorter one hidden"
        ]
    if profile.platform == "cpu" and profile.devices > 1:
        lines.append("virtual devices share the machine's cores: this says nothing about real ones")
    peaks = ", ".join(f"{dtype} {_rate(flops)}" for dtype, flops in kind.matmul_flops)
    lines.append(
        f"cluster {cluster.name}: peak {peaks}; efficiency {kind.efficiency:.2f}; memory "
        f"{kind.memory_bandwidth / 1e9:,.1f} GB/s; link {cluster.intra_host.bandwidth / 1e9:,.1f} "
        f"GB/s and {cluster.intra_host.latency_s * 1e6:.1f} µs ({cluster.intra_host.source})"
    )
    for line in lines:
        screen.print(line, highlight=False)


def _matmul_table(profile: HardwareProfile) -> Table:
    sizes = sorted({m.size for m in profile.matmuls})
    table = _table(
        f"matrix products on {profile.devices} x {profile.device}, each",
        ("dtype", *map(str, sizes), "best"),
    )
    for dtype in profile.dtypes:
        rates = {m.size: m.flops for m in profile.matmuls if m.dtype == dtype}
        table.add_row(
            dtype,
            *(_rate(rates[size]) if size in rates else "" for size in sizes),
            _rate(profile.best_flops(dtype)),
        )
    return table


def _memory_table(profile: HardwareProfile) -> Table:
    sizes = sorted({m.num_bytes for m in profile.memory})
    table = _table("memory", ("GB/s", *map(_size, sizes)))
    for op in dict.fromkeys(m.op for m in profile.memory):
        rates = {m.num_bytes: m.bandwidth for m in profile.memory if m.op == op}
        table.add_row(op, *(f"{rates[size] / 1e9:,.1f}" if size in rates else "" for size in sizes))
    return table


def _collective_table(profile: HardwareProfile) -> Table:
    table = _table(
        "collectives, fitted to latency + bytes / bandwidth",
        ("collective", "devices", "latency µs", "GB/s", "off", "smallest µs", "largest", "ms"),
    )
    for curve in profile.collectives:
        (_, first), (num_bytes, last) = curve.times[0], curve.times[-1]
        table.add_row(
            curve.kind,
            str(curve.group_size),
            f"{curve.latency_s * 1e6:,.1f}",
            f"{curve.bandwidth / 1e9:,.2f}",
            f"{curve.residual:.0%}",
            f"{first.best_s * 1e6:,.1f}",
            _size(num_bytes),
            f"{last.best_s * 1e3:,.2f}",
        )
    return table


def _show_model(profile: ModelProfile, prices: _Prices) -> None:
    screen = console()
    classes = {cls.name: cls for cls in prices.graph.classes}
    table = _table(
        f"{profile.model} in {profile.compute_dtype}: one layer on one {profile.device}",
        (
            "class", "batch x length", "forward ms", "and backward", "forward FLOP/s",
            "and backward", "predicted ms", "and backward", "predicted/measured",
        ),
    )  # fmt: skip
    for cls in profile.classes:
        for i, time in enumerate(cls.times):
            table.add_row(
                cls.name if i == 0 else "",
                f"{time.batch} x {time.length}",
                _ms(time.forward.best_s),
                _ms(time.forward_backward.best_s),
                *_compared(cls, time, profile, prices.of(classes[cls.name], time.batch)),
            )
    screen.print(table)
    lines = _table(
        "lines through the full lengths: fixed + sequences x each",
        ("class", "layers", "forward ms", "off", "and backward ms", "off"),
    )
    for cls in profile.classes:
        lines.add_row(
            cls.name, str(cls.layers), *_line_cells(cls.forward), *_line_cells(cls.forward_backward)
        )
    screen.print(lines)
    screen.print(
        f"predictions are for {prices.cluster.kind_of(0).name} of {prices.cluster.name}, whose "
        f"rates are {prices.cluster.kind_of(0).source}",
        style="dim",
        highlight=False,
    )


def _compared(
    cls: LayerProfile, time: LayerTime, profile: ModelProfile, price: LayerCost
) -> tuple[str, ...]:
    # What is captured and predicted is for full lengths; attention does not scale with them.
    if time.length != profile.length:
        return ("",) * 5
    share = time.batch / profile.batch
    both_flops = cls.captured.forward_flops + cls.captured.backward_flops
    both_s = price.forward_s + price.backward_s
    return (
        _rate(cls.captured.forward_flops * share / time.forward.best_s),
        _rate(both_flops * share / time.forward_backward.best_s),
        _ms(price.forward_s),
        _ms(both_s),
        f"{both_s / time.forward_backward.best_s:.2f}",
    )


def _line_cells(line: Fit | None) -> tuple[str, str]:
    if line is None:
        return "", ""
    return f"{_ms(line.fixed_s)} + n x {_ms(line.per_unit_s)}", f"{line.residual:.0%}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}"


def _rate(flops: float) -> str:
    """FLOP/s as people say them.

    >>> _rate(2.5e9), _rate(989e12)
    ('2.5 GFLOP/s', '989.0 TFLOP/s')
    """
    unit, size = ("TFLOP/s", 1e12) if flops >= 1e12 else ("GFLOP/s", 1e9)
    return f"{flops / size:,.1f} {unit}"


def _size(num_bytes: int) -> str:
    return byte_text(num_bytes).replace(".00", "")
