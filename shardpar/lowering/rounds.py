"""Transfers in rounds, each one jitted collective in which a device takes part at most once.

Rounds are what several processes can do together: all of them derive the same rounds from
the plan and run, in the same order, those that their devices are in.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from shardpar.lowering.elsewhere import in_order
from shardpar.lowering.shardings import partition_spec

Member = TypeVar("Member", bound=Hashable)


def rounds_of(members: Iterable[tuple[Member, Sequence[int]]]) -> list[list[Member]]:
    """Deals members, each with its devices, into rounds in which no device comes twice.

    >>> rounds_of([("a", (0, 1)), ("b", (1, 2)), ("c", (3, 2))])
    [['a', 'c'], ['b']]
    """
    rounds: list[tuple[set[int], list[Member]]] = []
    for member, devices in members:
        fitting = next((r for r in rounds if r[0].isdisjoint(devices)), None)
        if fitting is None:
            fitting = (set(), [])
            rounds.append(fitting)
        fitting[0].update(devices)
        fitting[1].append(member)
    return [dealt for _, dealt in rounds]


def sum_round(
    rows: Sequence[Sequence[int]],
    parcels: Mapping[int, jax.Array],
    length: int,
    dtype: str,
    devices: Sequence[jax.Device],
) -> dict[int, jax.Array]:
    """Adds up the parcels of each row of devices; every device of a row gets the sum.

    Args:
      rows: disjoint, equally many devices each.
      parcels: the arrays [1, 1, length] on this process's devices, by device number.
      length: of every parcel.
      dtype: of every parcel.
      devices: all devices of the cluster.
    """
    return _round("sum", rows, parcels, length, dtype, devices)


def exchange_round(
    pairs: Sequence[tuple[int, int]],
    parcels: Mapping[int, jax.Array],
    length: int,
    dtype: str,
    devices: Sequence[jax.Device],
) -> dict[int, jax.Array]:
    """Sends each pair's parcel from its first device to its second.

    Args:
      pairs: disjoint (sender, receiver) pairs.
      parcels: the senders' arrays [1, 1, length] on this process's devices, by device number.
      length: of every parcel.
      dtype: of every parcel.
      devices: all devices of the cluster.
    """
    process = jax.process_index()
    empty = [r for _, r in pairs if r not in parcels and devices[r].process_index == process]
    zeros = jax.device_put(
        [np.zeros((1, 1, length), dtype)] * len(empty), [devices[r] for r in empty]
    )
    full = {**parcels, **dict(zip(empty, zeros, strict=True))}
    got = _round("send", pairs, full, length, dtype, devices)
    receivers = {r for _, r in pairs}
    return {device: array for device, array in got.items() if device in receivers}


def _round(
    what: str,
    rows: Sequence[Sequence[int]],
    parcels: Mapping[int, jax.Array],
    length: int,
    dtype: str,
    devices: Sequence[jax.Device],
) -> dict[int, jax.Array]:
    members = [d for row in rows for d in row]
    mine = [d for d in members if d in parcels]
    if not mine:
        return {}
    grid = np.empty((len(rows), len(rows[0])), dtype=object)
    for i, row in enumerate(rows):
        grid[i] = [devices[d] for d in row]
    mesh = Mesh(grid, ("row", "end"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, partition_spec((("row",), ("end",))))
    joined = jax.make_array_from_single_device_arrays(
        (len(rows), len(rows[0]), length), sharding, [parcels[d] for d in mine], dtype=dtype
    )
    out = _program(what, mesh)(joined)
    number = {devices[d]: d for d in members}
    return {number[shard.device]: shard.data for shard in out.addressable_shards}


@lru_cache(maxsize=1024)
def _program(what: str, mesh: Mesh) -> Any:
    spec = partition_spec((("row",), ("end",)))

    def run(x: jax.Array) -> jax.Array:
        if what == "sum":
            return jax.lax.psum(x, "end")
        return jax.lax.ppermute(x, "end", [(0, 1)])

    # The sum is the same on a whole row, but each device of it keeps its own copy.
    jitted = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return in_order(jitted)
