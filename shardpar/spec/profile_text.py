"""Hardware and model profiles as YAML that people read and compare; each one round-trips."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from msgspec import Meta

from shardpar.errors import SpecError
from shardpar.spec.profile import (
    CollectiveCurve,
    Fit,
    HardwareProfile,
    LayerFigures,
    LayerProfile,
    LayerTime,
    MatmulTime,
    MemoryTime,
    ModelProfile,
    Overlap,
    Timed,
)
from shardpar.spec.text import File, Steps, _Dumper, _Flow, _read, _Strict

HARDWARE_FORMAT = "shardpar-hardware-profile/1"
MODEL_FORMAT = "shardpar-model-profile/1"

_Count = Annotated[int, Meta(gt=0)]
_Seconds = Annotated[float, Meta(gt=0)]
_Figure = Annotated[float, Meta(ge=0)]

_HARDWARE_HEAD = """\
# Seconds are the best and the median of several runs, on all devices at once. A matmul of size n
# is 2 n^3 FLOP. `scale` reads an array of num_bytes and writes one, `add` reads two.
# A collective of n bytes takes latency_s + n / bandwidth; residual 0.1 says that this is 10% off.
"""
_MODEL_HEAD = """\
# `captured` is XLA's analysis of one layer for the whole batch. `measured` are seconds of one
# layer on one device, and lines through them: fixed_s + sequences * per_sequence_s.
"""


class _Matmul(_Strict):
    dtype: str
    size: _Count
    best_s: _Seconds
    median_s: _Seconds


class _Memory(_Strict):
    op: Literal["scale", "add"]
    num_bytes: _Count
    best_s: _Seconds
    median_s: _Seconds


class _Message(_Strict):
    num_bytes: _Count
    best_s: _Seconds
    median_s: _Seconds


class _Collective(_Strict):
    kind: Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]
    group_size: Annotated[int, Meta(ge=2)]
    latency_s: _Figure
    bandwidth: _Seconds
    residual: _Figure
    times: list[_Message]


class _Overlap(_Strict):
    group_size: _Count
    num_bytes: _Count
    compute_s: _Seconds
    collective_s: _Seconds
    together_s: _Seconds


class _Hardware(_Strict):
    format: str
    cluster: str
    device: str
    platform: str
    devices: _Count
    source: Literal["measured"]
    command: str
    jax: str
    matmuls: list[_Matmul]
    memory: list[_Memory]
    collectives: tuple[_Collective, ...] = ()
    overlap: _Overlap | None = None


class _Line(_Strict):
    fixed_s: _Figure
    per_sequence_s: _Figure
    residual: _Figure


class _LayerTime(_Strict):
    batch: _Count
    length: _Count
    forward_s: _Seconds
    forward_median_s: _Seconds
    forward_backward_s: _Seconds
    forward_backward_median_s: _Seconds


class _Saved(_Strict):
    none: _Figure
    selective: _Figure
    full: _Figure


class _Captured(_Strict):
    forward_flops: _Figure
    backward_flops: _Figure
    forward_bytes: _Figure
    backward_bytes: _Figure
    parameter_bytes: _Figure
    temp_bytes: _Figure
    saved_bytes: _Saved


class _Measured(_Strict):
    forward: _Line | None
    forward_backward: _Line | None
    times: list[_LayerTime]


class _Class(_Strict):
    name: str
    layers: _Count
    captured: _Captured
    measured: _Measured


class _Model(_Strict):
    format: str
    model: str
    batch: _Count
    length: _Count
    compute_dtype: str
    device: str
    command: str
    jax: str
    classes: list[_Class]


def hardware_to_text(profile: HardwareProfile) -> str:
    """The hardware profile as YAML; `hardware_from_text` reads it back equal."""
    overlap = profile.overlap
    document = {
        "format": HARDWARE_FORMAT,
        "cluster": profile.cluster,
        "device": profile.device,
        "platform": profile.platform,
        "devices": profile.devices,
        "source": "measured",
        "command": profile.command,
        "jax": profile.jax,
        "matmuls": [_Flow(dtype=m.dtype, size=m.size, **_timed(m.time)) for m in profile.matmuls],
        "memory": [_Flow(op=m.op, num_bytes=m.num_bytes, **_timed(m.time)) for m in profile.memory],
        "collectives": [
            {
                "kind": curve.kind,
                "group_size": curve.group_size,
                "latency_s": curve.latency_s,
                "bandwidth": curve.bandwidth,
                "residual": curve.residual,
                "times": [_Flow(num_bytes=n, **_timed(time)) for n, time in curve.times],
            }
            for curve in profile.collectives
        ],
        "overlap": None if overlap is None else _Flow(vars(overlap)),
    }
    return _HARDWARE_HEAD + _dumped(document)


def hardware_from_text(text: str, where: str = "hardware profile") -> HardwareProfile:
    """Reads a hardware profile.

    Args:
      text: YAML, as `hardware_to_text` writes.
      where: what to call the text in errors, usually its file.

    Raises:
      SpecError: with the line, the key, what was got and what to write instead.
    """
    document, file = _read(text, _Hardware, HARDWARE_FORMAT, where, SpecError)
    matmuls, memory, curves = [], [], []
    for i, m in enumerate(document.matmuls):
        with file.at("matmuls", i, instead_of="timing"):
            time = Timed(m.best_s, m.median_s)
        with file.at("matmuls", i, instead_of="matmuls"):
            matmuls.append(MatmulTime(m.dtype, m.size, time))
    for i, a in enumerate(document.memory):
        with file.at("memory", i, instead_of="timing"):
            memory.append(MemoryTime(a.op, a.num_bytes, Timed(a.best_s, a.median_s)))
    for i, curve in enumerate(document.collectives):
        times = []
        for k, message in enumerate(curve.times):
            with file.at("collectives", i, "times", k, instead_of="timing"):
                times.append((message.num_bytes, Timed(message.best_s, message.median_s)))
        with file.at("collectives", i, instead_of="collectives"):
            curves.append(
                CollectiveCurve(
                    curve.kind,
                    curve.group_size,
                    tuple(times),
                    curve.latency_s,
                    curve.bandwidth,
                    curve.residual,
                )
            )
    overlap = None
    if document.overlap is not None:
        with file.at("overlap", instead_of="overlap"):
            overlap = Overlap(
                document.overlap.group_size,
                document.overlap.num_bytes,
                document.overlap.compute_s,
                document.overlap.collective_s,
                document.overlap.together_s,
            )
    with file.at():
        profile = HardwareProfile(
            document.cluster,
            document.device,
            document.platform,
            document.devices,
            document.command,
            document.jax,
            tuple(matmuls),
            tuple(memory),
            tuple(curves),
            overlap,
        )
    return profile


def model_to_text(profile: ModelProfile) -> str:
    """The model profile as YAML; `model_from_text` reads it back equal."""
    document = {
        "format": MODEL_FORMAT,
        **{k: v for k, v in vars(profile).items() if k != "classes"},
        "classes": [
            {
                "name": cls.name,
                "layers": cls.layers,
                "captured": {
                    **{k: v for k, v in vars(cls.captured).items() if k != "saved_bytes"},
                    "saved_bytes": _Flow(cls.captured.saved_bytes),
                },
                "measured": {
                    "forward": _line_document(cls.forward),
                    "forward_backward": _line_document(cls.forward_backward),
                    "times": [
                        _Flow(
                            batch=time.batch,
                            length=time.length,
                            forward_s=time.forward.best_s,
                            forward_median_s=time.forward.median_s,
                            forward_backward_s=time.forward_backward.best_s,
                            forward_backward_median_s=time.forward_backward.median_s,
                        )
                        for time in cls.times
                    ],
                },
            }
            for cls in profile.classes
        ],
    }
    return _MODEL_HEAD + _dumped(document)


def model_from_text(text: str, where: str = "model profile") -> ModelProfile:
    """Reads a model profile.

    Args:
      text: YAML, as `model_to_text` writes.
      where: what to call the text in errors, usually its file.

    Raises:
      SpecError: with the line, the key, what was got and what to write instead.
    """
    document, file = _read(text, _Model, MODEL_FORMAT, where, SpecError)
    classes = tuple(_class(cls, file, ("classes", i)) for i, cls in enumerate(document.classes))
    with file.at():
        profile = ModelProfile(
            document.model,
            document.batch,
            document.length,
            document.compute_dtype,
            document.device,
            document.command,
            document.jax,
            classes,
        )
    return profile


def _class(cls: _Class, file: File, at: Steps) -> LayerProfile:
    captured, measured = cls.captured, cls.measured
    with file.at(*at, "captured", instead_of="captured"):
        figures = LayerFigures(
            captured.forward_flops,
            captured.backward_flops,
            captured.forward_bytes,
            captured.backward_bytes,
            captured.parameter_bytes,
            captured.temp_bytes,
            (
                ("none", captured.saved_bytes.none),
                ("selective", captured.saved_bytes.selective),
                ("full", captured.saved_bytes.full),
            ),
        )
    times = []
    for i, time in enumerate(measured.times):
        with file.at(*at, "measured", "times", i, instead_of="timing"):
            times.append(
                LayerTime(
                    time.batch,
                    time.length,
                    Timed(time.forward_s, time.forward_median_s),
                    Timed(time.forward_backward_s, time.forward_backward_median_s),
                )
            )
    lines = []
    for key in ("forward", "forward_backward"):
        with file.at(*at, "measured", key, instead_of="fit"):
            lines.append(_line(getattr(measured, key)))
    with file.at(*at):
        profile = LayerProfile(cls.name, cls.layers, figures, tuple(times), *lines)
    return profile


def _line(line: _Line | None) -> Fit | None:
    return None if line is None else Fit(line.fixed_s, line.per_sequence_s, line.residual)


def _line_document(line: Fit | None) -> _Flow | None:
    if line is None:
        return None
    return _Flow(fixed_s=line.fixed_s, per_sequence_s=line.per_unit_s, residual=line.residual)


def _timed(time: Timed) -> dict[str, float]:
    return {"best_s": time.best_s, "median_s": time.median_s}


def _dumped(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
