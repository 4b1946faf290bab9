"""How the processes of one run find each other: flags, the environment of a launcher, or alone.

A process that finds nothing trains alone. Launchers that jax knows by itself (Open MPI, TPU
hosts) are left to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardpar.errors import UserError

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_FIRST_PORT, _PORTS = 61440, 4096


@dataclass(frozen=True)
class Rendezvous:
    """Where processes meet.

    Attributes:
      coordinator: host:port of process 0; None where jax finds everything by itself.
      count: processes in all.
      index: which of them this one is.
      local_devices: the devices this one may use; None for all of its host.
      found: where this comes from, in words.
    """

    coordinator: str | None
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None
    found: str = "flags"


def find(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> Rendezvous | None:
    """What flags and environment say; None for a process that trains alone.

    Args:
      environment: such as `os.environ`.
      coordinator: the flag; all three are given or none.
      count: another.
      index: another.

    Raises:
      UserError: some of what is needed is missing, or contradicts itself.

    >>> find({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    Rendezvous(coordinator='a:1', count=2, index=1, local_devices=None, found='JAX_* variables')
    >>> find({}) is None
    True
    """
    if (coordinator, count, index) != (None, None, None):
        given = {"--coordinator": coordinator, "--processes": count, "--process": index}
        return _checked(given, "flags")
    if any(environment.get(name) for name in (COORDINATOR, COUNT, INDEX)):
        given = {
            COORDINATOR: environment.get(COORDINATOR) or None,
            COUNT: _integer(environment, COUNT),
            INDEX: _integer(environment, INDEX),
        }
        return _checked(given, "JAX_* variables")
    return _of_slurm(environment) or _of_open_mpi(environment) or _of_tpu_hosts(environment)


def _checked(
    given: Mapping[str, Any], found: str, local_devices: tuple[int, ...] | None = None
) -> Rendezvous | None:
    """What three names were given; None for one process, which needs no other."""
    names = ", ".join(given)
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise UserError(
            f"{names} belong together, and there is no {' and no '.join(missing)}; "
            "give all three, or none"
        )
    coordinator, count, index = given.values()
    port = re.fullmatch(r"[^:\s]\S*:(\d+)", coordinator)
    if port is None or not 0 < int(port[1]) < 2**16:
        raise UserError(
            f"the coordinator is {coordinator!r} ({next(iter(given))}); write the host and a free "
            "port of process 0, such as node1:12345"
        )
    if count < 1:
        raise UserError(f"there cannot be {count} processes ({names}); give 1 or more")
    if not 0 <= index < count:
        raise UserError(
            f"process {index} of {count} ({names}): processes count from 0 to {count - 1}"
        )
    if count == 1:
        return None
    return Rendezvous(coordinator, count, index, local_devices, found)


def _of_slurm(environment: Mapping[str, str]) -> Rendezvous | None:
    if not all(name in environment for name in _SLURM):
        return None
    # A shell that salloc opened is a step of one task in a job of many.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    count = _integer(environment, tasks)
    if count == 1:
        return None
    port = _FIRST_PORT + (_integer(environment, "SLURM_JOB_ID") or 0) % _PORTS
    return _checked(
        {
            "SLURM_STEP_NODELIST": f"{_first_node(environment['SLURM_STEP_NODELIST'])}:{port}",
            tasks: count,
            "SLURM_PROCID": _integer(environment, "SLURM_PROCID"),
        },
        "SLURM",
        None if _has_its_own_devices(environment, count) else _local(environment),
    )


def _first_node(nodes: str) -> str:
    """The first of SLURM's list of nodes, where process 0 is.

    >>> [_first_node(nodes) for nodes in ("a,b", "n[001-004,009]", "r[1-2]n[07,09]-ib,x")]
    ['a', 'n001', 'r1n07-ib']
    """
    name = re.match(r"((?:[^,\[\]\s]|\[\w[^\[\]]*\])+)(?:,|$)", nodes)
    if name is None:
        raise UserError(
            f"SLURM_STEP_NODELIST is {nodes!r}, in which no first node can be found; "
            "give --coordinator, --processes and --process"
        )
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", name[1])


def _has_its_own_devices(environment: Mapping[str, str], count: int | None) -> bool:
    """Whether a task may use all devices it sees: it is alone on its node, or bound to one."""
    visible = [environment[name] for name in _VISIBLE if environment.get(name)]
    if any("," not in devices for devices in visible):
        return True
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_NTASKS_PER_NODE"))
    if tasks is None:
        return _integer(environment, "SLURM_STEP_NUM_NODES") == count
    return re.fullmatch(r"1(\(x\d+\))?", tasks) is not None


def _local(environment: Mapping[str, str]) -> tuple[int, ...]:
    """The one device of a task that shares its node with others, as jax deals them."""
    return (_integer(environment, "SLURM_LOCALID") or 0,)


def _of_open_mpi(environment: Mapping[str, str]) -> Rendezvous | None:
    size = "OMPI_COMM_WORLD_SIZE"
    if _integer(environment, size) in (None, 1):
        return None
    if "OMPI_MCA_orte_hnp_uri" not in environment:
        raise UserError(
            "this Open MPI does not say where process 0 is (version 5 no longer does); set "
            f"{COORDINATOR} to its host and a free port of it, {COUNT} to ${size} and {INDEX} to "
            "$OMPI_COMM_WORLD_RANK"
        )
    where = _checked(
        {
            "OMPI_MCA_orte_hnp_uri": "found-by-jax:1",
            size: _integer(environment, size),
            "OMPI_COMM_WORLD_RANK": _integer(environment, "OMPI_COMM_WORLD_RANK"),
        },
        "Open MPI",
    )
    return where and replace(where, coordinator=None)


def _of_tpu_hosts(environment: Mapping[str, str]) -> Rendezvous | None:
    listed = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    hosts = len([host for host in (listed or "").split(",") if host])
    slices = _integer(environment, "MEGASCALE_NUM_SLICES") or 1
    if hosts * slices <= 1 and "MEGASCALE_COORDINATOR_ADDRESS" not in environment:
        return None
    index = _integer(environment, "TPU_WORKER_ID") or 0
    index += (_integer(environment, "MEGASCALE_SLICE_ID") or 0) * hosts
    return Rendezvous(None, max(1, hosts) * slices, index, found="TPU hosts")


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if not value:
        return None
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name} is {value!r} in the environment; it must be a number") from None
