"""The machines at hand, as a Cluster the planner can price."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax
import psutil

from shardpar.errors import UserError
from shardpar.spec.cluster import Cluster, DeviceKind, Hosts, Link
from shardpar.spec.datasheet import lookup

_CPU_FLOPS_PER_CORE = 5e10
_CPU_BANDWIDTH = 2e10
CPU_EXTRA_COPIES = 1.0
"""Of the optimizer's arrays, in XLA:CPU's programs.

Adam's moments are donated, and read by two kernels: their own update and the weights'. XLA
decides on copies before it orders kernels, so it copies both, at the start of the step, and
the copies live until the update (buffer assignment of a step dumped with --xla_dump_to).
"""
_UNKNOWN_FLOPS = 1e13
_UNKNOWN_BANDWIDTH = 5e11


def use_virtual_devices(count: int) -> None:
    """Makes jax offer this many CPU devices; call it before anything else touches jax.

    Virtual devices share the machine's cores. They show that a plan is right and
    what it moves, never how fast it is.

    Args:
      count: how many devices.

    Raises:
      UserError: jax has started its backend already.

    Example:
      >>> use_virtual_devices(0)
      Traceback (most recent call last):
      ...
      shardpar.errors.UserError: use_virtual_devices(0): write 1 or more
    """
    if count < 1:
        raise UserError(f"use_virtual_devices({count}): write 1 or more")
    if count > 1:
        roomy_thread_pool(count)
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise UserError(
            f"use_virtual_devices({count}) comes too late: jax has started already; "
            "call it before any other use of jax"
        ) from error


def only_cpus(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether jax can find nothing but CPUs here, without starting it.

    Args:
      environment: with JAX_PLATFORMS, if that was chosen.

    Example:
      >>> only_cpus({"JAX_PLATFORMS": "cpu"}), only_cpus({"JAX_PLATFORMS": "cuda,cpu"})
      (True, False)
    """
    chosen = environment.get("JAX_PLATFORMS")
    if chosen:
        return chosen == "cpu"
    return not entry_points(group="jax_plugins") and find_spec("libtpu") is None


def roomy_thread_pool(devices: int = 1) -> None:
    """Gives XLA:CPU more threads than cores; call it before jax starts.

    Each collective that waits for its peers holds a thread of the pool. With as many threads
    as cores, devices that reach two collectives in another order wait for each other forever.

    Args:
      devices: of this process.
    """
    # XLA reads the pool's size from this variable.
    os.environ.setdefault("NPROC", str(max(64, 4 * devices)))


def local_cluster(devices: Sequence[jax.Device] | None = None) -> Cluster:
    """Describes the devices jax sees.

    Known accelerators get their datasheet's rates, and the memory the driver
    reports. CPU devices share the machine's cores and memory between them; their
    rates are assumed, so plans for them are compared but MFU is not computed.

    Args:
      devices: None takes `jax.devices()`.

    Example:
      >>> cluster = local_cluster()
      >>> cluster.num_devices == len(jax.devices())
      True
    """
    found = list(jax.devices() if devices is None else devices)
    count = len(found)
    kind_name = found[0].device_kind
    known = lookup(kind_name)
    mine = next((d for d in found if d.process_index == jax.process_index()), found[0])
    memory = _memory_bytes(mine, count)
    if found[0].platform == "cpu":
        cores = os.cpu_count() or 1
        kind = DeviceKind(
            "cpu",
            (("float32", _CPU_FLOPS_PER_CORE * cores / count),),
            memory,
            _CPU_BANDWIDTH / count,
            source="assumed",
            note=f"{cores} cores shared by {count} devices",
            extra_copies=CPU_EXTRA_COPIES,
        )
        link = Link(_CPU_BANDWIDTH / 4, 1e-4, "assumed", "copies in memory")
    elif known:
        sheet, link = known
        kind = DeviceKind(
            sheet.name,
            sheet.matmul_flops,
            memory or sheet.memory_bytes,
            sheet.memory_bandwidth,
            sheet.efficiency,
            sheet.source,
            sheet.note,
        )
    else:
        rate = (("float32", _UNKNOWN_FLOPS),)
        kind = DeviceKind(
            kind_name, rate, memory or 16e9, _UNKNOWN_BANDWIDTH, source="assumed",
            note="unknown device",
        )  # fmt: skip
        link = Link(2e10, 1e-5, "assumed", "unknown device")
    hosts = tuple(
        Hosts(kind.name, len(list(group)))
        for _, group in itertools.groupby(found, key=lambda device: device.process_index)
    )
    inter = Link(1.25e10, 5e-5, "assumed", "100 Gb/s network")
    return Cluster(f"{kind.name}x{count}", (kind,), hosts, link, inter)


def _memory_bytes(device: jax.Device, count: int) -> float:
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and stats.get("bytes_limit"):
        return float(stats["bytes_limit"])
    return psutil.virtual_memory().total / count if device.platform == "cpu" else 0.0


def peak_bytes_in_use(devices: Sequence[jax.Device]) -> float:
    """Most bytes any of these that are here has held.

    On CPUs it is this process's resident memory, freed memory that stays with it included.
    """
    here = [device for device in devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() for device in here if device.platform != "cpu"]
    known = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return float(max(known) if known else psutil.Process().memory_info().rss)
