"""Peak rates of known devices, from their vendors' datasheets, by the name jax gives them."""

from __future__ import annotations

import re

from shardpar.spec.cluster import DeviceKind, Link

_NVIDIA = "NVIDIA datasheet, dense rates without sparsity"
_GOOGLE = "Google Cloud TPU documentation"


def _kind(
    name: str, bf16: float, f32: float, gib: float, bandwidth: float, note: str
) -> DeviceKind:
    rates = (("bfloat16", bf16), ("float16", bf16), ("float32", f32))
    return DeviceKind(name, rates, gib * 2**30, bandwidth, note=note)


def _link(bandwidth: float, latency_s: float, note: str) -> Link:
    return Link(bandwidth, latency_s, note=note)


_TPU_F32 = f"{_GOOGLE}; float32 assumed half of bfloat16"
_NVLINK4 = _link(450e9, 5e-6, "NVLink 4, 900 GB/s both ways")
_NVLINK4_H800 = _link(200e9, 5e-6, "NVLink 4 as the H800 has it, 400 GB/s both ways")
_NVLINK3 = _link(300e9, 5e-6, "NVLink 3, 600 GB/s both ways")
_PCIE4 = _link(32e9, 1e-5, "PCIe 4 x16, 64 GB/s both ways; no NVLink")
_H100_BYTES = 80e9 / 2**30

KNOWN: tuple[tuple[str, DeviceKind, Link], ...] = (
    (r"\bH200", _kind("h200", 989e12, 67e12, 141e9 / 2**30, 4.8e12, f"{_NVIDIA}: SXM"), _NVLINK4),
    (
        r"H100 PCIe",
        _kind("h100-pcie", 756e12, 51e12, _H100_BYTES, 2.0e12, f"{_NVIDIA}: PCIe"),
        _link(64e9, 1e-5, "PCIe 5 x16"),
    ),
    (r"H100", _kind("h100", 989e12, 67e12, _H100_BYTES, 3.35e12, f"{_NVIDIA}: SXM"), _NVLINK4),
    (
        r"H800(?! PCIe)",
        _kind("h800", 989e12, 67e12, _H100_BYTES, 3.35e12, f"{_NVIDIA}: SXM"),
        _NVLINK4_H800,
    ),
    # Not the H200, and not the H20-3e, which has other memory.
    (r"H20$", _kind("h20", 148e12, 44e12, 96e9 / 2**30, 4.0e12, f"{_NVIDIA}: SXM"), _NVLINK4),
    (
        r"A100.*80",
        _kind("a100-80g", 312e12, 19.5e12, 80e9 / 2**30, 2.04e12, f"{_NVIDIA}: 80 GB SXM"),
        _NVLINK3,
    ),
    (
        r"A100",
        _kind("a100-40g", 312e12, 19.5e12, 40e9 / 2**30, 1.56e12, f"{_NVIDIA}: 40 GB SXM"),
        _NVLINK3,
    ),
    (
        r"L40S",
        _kind("l40s", 362e12, 91.6e12, 48e9 / 2**30, 864e9, f"{_NVIDIA}: PCIe"),
        _PCIE4,
    ),
    (
        # Not the 4090 D and not the laptop's, which are slower.
        r"RTX 4090$",
        _kind(
            "rtx4090",
            165.2e12,
            82.6e12,
            24e9 / 2**30,
            1.008e12,
            "NVIDIA Ada whitepaper, dense rates without sparsity, sums in float32",
        ),
        _PCIE4,
    ),
    (
        r"TPU v6",
        _kind("tpu-v6e", 918e12, 459e12, 32.0, 1.64e12, _TPU_F32),
        _link(200e9, 2e-6, "ICI, 2D torus"),
    ),
    (
        r"TPU v5p|TPU v5$",
        _kind("tpu-v5p", 459e12, 229e12, 95.0, 2.77e12, _TPU_F32),
        _link(300e9, 2e-6, "ICI, 3D torus"),
    ),
    (
        r"TPU v5 ?lite|TPU v5e",
        _kind("tpu-v5e", 197e12, 98e12, 16.0, 0.82e12, _TPU_F32),
        _link(100e9, 2e-6, "ICI, 2D torus"),
    ),
)


def lookup(device_kind: str) -> tuple[DeviceKind, Link] | None:
    """The datasheet of a device and its links, by the name jax gives its kind; None if unknown.

    >>> lookup("NVIDIA H100 80GB HBM3")[0].name
    'h100'
    >>> lookup("NVIDIA H20")[0].name
    'h20'
    >>> lookup("cpu") is None
    True
    """
    for pattern, kind, link in KNOWN:
        if re.search(pattern, device_kind, re.IGNORECASE):
            return kind, link
    return None
