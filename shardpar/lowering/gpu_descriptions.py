"""Descriptions of NVIDIA GPUs in the text form that XLA's ahead-of-time compiler reads.

Figures are those of NVIDIA's architecture white papers and the CUDA programming guide's
table of compute capabilities.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What the compiler must know of a GPU.

    Attributes:
      cores: streaming multiprocessors.
      capability: CUDA compute capability (major, minor).
      memory_bytes, bandwidth: of its memory.
      l2_bytes: second-level cache.
      shared_bytes: shared memory of a multiprocessor; a block may take `block_bytes`.
      threads: resident threads of a multiprocessor.
      clock_ghz: boost clock.
      name: as the driver reports it.
    """

    cores: int
    capability: tuple[int, int]
    memory_bytes: int
    bandwidth: int
    l2_bytes: int
    shared_bytes: int
    block_bytes: int
    threads: int
    clock_ghz: float
    name: str


_HOPPER = (52428800, 233472, 232448, 2048)
_ADA = (102400, 101376, 1536)

GPUS: dict[str, Gpu] = {
    "h100": Gpu(
        132, (9, 0), 84929347584, 3352320000000, *_HOPPER, 1.98, "NVIDIA H100 80GB HBM3"
    ),
    "h200": Gpu(132, (9, 0), 150754820096, 4800000000000, *_HOPPER, 1.98, "NVIDIA H200"),
    "h800": Gpu(
        132, (9, 0), 84929347584, 3352320000000, *_HOPPER, 1.98, "NVIDIA H800 80GB HBM3"
    ),
    "h20": Gpu(78, (9, 0), 102010716160, 4000000000000, 62914560, *_HOPPER[1:], 1.98, "NVIDIA H20"),
    "a100": Gpu(
        108, (8, 0), 85094825984, 2039000000000, 41943040, 167936, 166912, 2048, 1.41,
        "NVIDIA A100-SXM4-80GB",
    ),
    "l40s": Gpu(142, (8, 9), 47697362944, 864000000000, 100663296, *_ADA, 2.52, "NVIDIA L40S"),
    "rtx4090": Gpu(
        128, (8, 9), 25393692672, 1008000000000, 75497472, *_ADA, 2.52, "NVIDIA GeForce RTX 4090"
    ),
}  # fmt: skip


def description(name: str) -> str:
    """The target config of a GPU, a text proto.

    >>> "core_count: 132" in description("h100")
    True
    """
    gpu = GPUS[name]
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_bytes}
  threads_per_core_limit: {gpu.threads} core_count: {gpu.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz} device_memory_size: {gpu.memory_bytes}
  shared_memory_per_block_optin: {gpu.block_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{gpu.name}"
"""
