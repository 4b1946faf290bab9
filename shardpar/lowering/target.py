"""Ahead-of-time compiles for machines that are not here: what their compiler says of a plan.

TPU programs are compiled through the `libtpu` wheel and NVIDIA ones through the CUDA plugin
wheels with a textual description of the device; neither needs the device itself.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from shardpar.errors import TargetError
from shardpar.lowering.collectives import Collective, collectives
from shardpar.lowering.gpu_descriptions import GPUS, description
from shardpar.spec.cluster import Cluster

_TPUS = {"v5e": ("v5e", 2), "v5p": ("v5p", 3), "v6e": ("v6e", 2)}
"""Name in a cluster's kind -> (name of the topology, dims of its torus)."""


@dataclass(frozen=True)
class Target:
    """Machines to compile for.

    Attributes:
      platform: "tpu" or "cuda".
      name: of the topology or the GPU, as the compiler knows it.
      shape: of the torus of chips, or (hosts, GPUs per host).
    """

    platform: str
    name: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> list[Any]:
        """Described devices, to build meshes and shardings of; they hold no arrays.

        Raises:
          TargetError: the compiler's wheel is not installed; says which extra brings it.
        """
        _require_wheel(self.platform)
        sizes = "x".join(map(str, self.shape))
        try:
            if self.platform == "tpu":
                found = topologies.get_topology_desc(f"{self.name}:{sizes}", "tpu")
            else:
                found = topologies.get_topology_desc(
                    self.name, "cuda", topology=f"1x{sizes}", target_config=description(self.name)
                )
        except Exception as error:  # what a plugin raises here is not documented
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise TargetError(f"{self}: the compiler does not know this target: {reason}") from None
        return list(found.devices)


@dataclass(frozen=True)
class Compiled:
    """What the target's compiler says of a program.

    Attributes:
      target: which.
      argument_bytes: state and batch on one device.
      temp_bytes: everything else at its peak.
      collectives: kinds, group sizes, counts and bytes.
      fits: False where the compiler itself refused for lack of memory.
      needed_bytes: in all, as far as the compiler said.
    """

    target: str
    argument_bytes: int
    temp_bytes: int
    collectives: tuple[Collective, ...]
    fits: bool
    needed_bytes: int


def target_of(cluster: Cluster) -> Target:
    """The target that a cluster of one kind of device stands for.

    Raises:
      TargetError: the cluster is mixed, or no compiler for its kind of device is known.

    >>> from shardpar.spec.cluster import DeviceKind, Hosts, Link
    >>> kind = DeviceKind("h100", (("bfloat16", 989e12),), 80e9, 3.35e12)
    >>> links = Link(450e9), Link(50e9)
    >>> print(target_of(Cluster("c", (kind,), (Hosts("h100", 8, 2),), *links)))
    h100:2x8
    """
    kinds = {hosts.kind for hosts in cluster.hosts}
    if len(kinds) > 1:
        raise TargetError(
            f'cluster "{cluster.name}" has devices of kinds {", ".join(sorted(kinds))}; one '
            "program is compiled for one kind: verify a cluster file of each kind alone"
        )
    (kind,) = kinds
    for pattern, (name, dims) in _TPUS.items():
        if re.search(pattern, kind, re.IGNORECASE):
            return Target("tpu", name, torus(cluster.num_devices, dims))
    for name in GPUS:
        if name in re.sub(r"[^a-z0-9]", "", kind.lower()):
            sizes = {hosts.devices for hosts in cluster.hosts}
            if len(sizes) > 1:
                raise TargetError(
                    f'cluster "{cluster.name}" has hosts with {sorted(sizes)} devices; '
                    "the GPU compiler wants equal hosts"
                )
            return Target("cuda", name, (cluster.num_devices // max(sizes), max(sizes)))
    known = ", ".join((*(f"tpu-{name}" for name in _TPUS), *GPUS))
    raise TargetError(
        f'no compiler is known for devices of kind "{kind}"; known are {known}: name the kind '
        "after one of them in the cluster file"
    )


def torus(devices: int, dims: int) -> tuple[int, ...]:
    """The squarest torus of so many chips, longest side last; sides are powers of two.

    >>> torus(16, 2), torus(8, 2), torus(64, 3)
    ((4, 4), (2, 4), (4, 4, 4))
    """
    if devices < 1 or devices & (devices - 1):
        raise TargetError(f"a TPU slice has a power of two of chips; the cluster has {devices}")
    left = int(math.log2(devices))
    sides = []
    for i in range(dims):
        power = left // (dims - i)
        sides.append(2**power)
        left -= power
    if dims == 3:
        sides.sort()
    return tuple(sides)


def single(target: Target) -> Any:
    """One described device of a target, to price layers with."""
    return target.devices()[0]


def compile_for(target: Target, lowered: Any) -> Compiled:
    """Compiles a program lowered for a target's devices.

    Args:
      target: where its shardings' devices came from.
      lowered: from `Program.lower_step`.

    Raises:
      TargetError: the compiler fails for another reason than memory.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _exhausted(str(error))
        if needed is None:
            reason = next(iter(str(error).splitlines()), "")
            raise TargetError(f"{target}: the compiler failed: {reason}") from None
        return Compiled(str(target), 0, 0, (), False, needed)
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return Compiled(
        str(target),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        collectives(compiled.as_text()),
        True,
        total,
    )


def _exhausted(message: str) -> int | None:
    """Bytes a program needs, from the compiler's refusal; None if it is about something else."""
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    found = re.search(r"Used ([\d.]+)([KMGT])i?B?\b", message)
    if not found:
        return 0
    return int(float(found[1]) * 1024 ** (" KMGT".index(found[2])))


def prepare_environment() -> None:
    """Lets the compilers be loaded on a machine without their devices; call it before jax starts.

    Values that are set already are kept.
    """
    if "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        # jax read the variable when it was imported.
        jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:
        # Autotuning runs candidates on the device, and there is none.
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()


def _require_wheel(platform: str) -> None:
    module, extra = {"tpu": ("libtpu", "tpu-aot"), "cuda": ("jax_cuda12_plugin", "cuda-aot")}[
        platform
    ]
    if importlib.util.find_spec(module) is None:
        raise TargetError(
            f"compiling for {'TPUs' if platform == 'tpu' else 'NVIDIA GPUs'} needs the wheel "
            f"{module}, which is not installed; run: pip install 'shardpar[{extra}]'"
        )
