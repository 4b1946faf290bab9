"""How the processes of one run find each other: flags, the environment of a launcher, or alone.

A process that finds nothing trains alone. Launchers that jax knows by itself (Open MPI, TPU
hosts) are left to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from shardpar.errors import UserError

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
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
        return _checked(coordinator, count, index, "flags", "--coordinator, --processes, --process")
    if COORDINATOR in environment and COUNT in environment:
        return _checked(
            environment[COORDINATOR],
            _integer(environment, COUNT),
            _integer(environment, INDEX),
            "JAX_* variables",
            f"{COORDINATOR}, {COUNT}, {INDEX}",
        )
    if all(name in environment for name in _SLURM) and _integer(environment, "SLURM_NTASKS") != 1:
        return _of_slurm(environment)
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        count, index = (
            _integer(environment, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK")
        )
        return Rendezvous(None, count or 1, index or 0, found="Open MPI")
    hosts = [h for h in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]
    if len(hosts) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return Rendezvous(
            None, len(hosts), int(environment.get("TPU_WORKER_ID") or 0), found="TPU hosts"
        )
    return None


def _checked(
    coordinator: str | None, count: int | None, index: int | None, found: str, names: str
) -> Rendezvous:
    if coordinator is None or count is None or index is None:
        given = f"{coordinator}, {count}, {index}"
        raise UserError(f"{names} belong together, and are {given}; give all three, or none")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(
            f"the coordinator is {coordinator!r}; write the host and a free port of process 0, "
            "such as node1:12345"
        )
    if not 0 <= index < count:
        raise UserError(
            f"process {index} of {count} ({names}): processes count from 0 to {count - 1}"
        )
    return Rendezvous(coordinator, count, index, found=found)


def _of_slurm(environment: Mapping[str, str]) -> Rendezvous:
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}, without a node; give --coordinator")
    port = _FIRST_PORT + (_integer(environment, "SLURM_JOB_ID") or 0) % _PORTS
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_NTASKS_PER_NODE"))
    # jax gives each task one device. One task on each node is one process for all its devices.
    alone = re.fullmatch(r"1(\(x\d+\))?", tasks or "") is not None
    return Rendezvous(
        f"{first[1]}{first[2] or ''}:{port}",
        _integer(environment, "SLURM_NTASKS") or 1,
        _integer(environment, "SLURM_PROCID") or 0,
        None if alone else (int(environment["SLURM_LOCALID"]),),
        "SLURM",
    )


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name} is {value!r} in the environment; it must be a number") from None
