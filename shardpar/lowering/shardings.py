"""Layouts become PartitionSpecs and NamedShardings; nothing else in shardpar builds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shardpar.errors import SpecError
from shardpar.spec.layout import Group
from shardpar.spec.mesh import Axes, GroupLayout
from shardpar.spec.mesh import Mesh as SpecMesh


def partition_spec(dims: tuple[Axes, ...], stacked: int = 0) -> PartitionSpec:
    """The spec of a layout's dims, behind `stacked` leading dims that nothing splits.

    >>> tuple(partition_spec((("a",), (), ("b", "c"))))
    ('a', None, ('b', 'c'))
    """
    entries = [axes[0] if len(axes) == 1 else axes or None for axes in dims]
    return PartitionSpec(*([None] * stacked), *entries)


def named_sharding(mesh: Mesh, layout: GroupLayout, stacked: int = 0) -> NamedSharding:
    """The NamedSharding that lays an array out this way."""
    return NamedSharding(mesh, partition_spec(layout.dims, stacked))


def group_sharding(group: Group, rank: int, devices: Sequence[jax.Device]) -> NamedSharding:
    """The NamedSharding of one group's array; its addends are `unreduced` axes.

    Args:
      group: its devices are positions in `devices`.
      rank: dims of the array.
      devices: all devices of the cluster.

    Raises:
      SpecError: the group names a device that is not there, or a dim the array has not.

    >>> tuple(group_sharding(Group((0,)), 2, jax.devices()).spec)
    (None, None)
    """
    if max(group.devices) >= len(devices):
        raise SpecError(
            f"group {group} is on device {max(group.devices)}, but there are {len(devices)} "
            "devices, counted from 0"
        )
    return axes_sharding(group.named(rank), [devices[d] for d in group.devices])


def axes_sharding(
    layout: GroupLayout, devices: Sequence[jax.Device], *, explicit: bool = False
) -> NamedSharding:
    """The NamedSharding of a layout over named axes, on these devices in mesh order."""
    array = np.empty(len(devices), dtype=object)
    array[:] = devices
    # JAX knows addends on Explicit axes only; models are compiled on Auto ones.
    kind = AxisType.Explicit if layout.partial or explicit else AxisType.Auto
    sizes, names = layout.mesh.sizes, layout.mesh.names
    mesh = Mesh(array.reshape(sizes), names, axis_types=(kind,) * len(names))
    spec = partition_spec(layout.dims)
    if layout.partial:
        spec = PartitionSpec(*spec, unreduced=frozenset(layout.partial))
    return NamedSharding(mesh, spec)


def group_of(sharding: NamedSharding, devices: Sequence[jax.Device]) -> Group:
    """The group layout that a NamedSharding is: the inverse of `group_sharding`.

    Args:
      sharding: over devices that are among `devices`.
      devices: all devices of the cluster.

    Raises:
      SpecError: a device is not among them.
    """
    position = {device: i for i, device in enumerate(devices)}
    there = list(sharding.mesh.devices.flat)
    stray = [device for device in there if device not in position]
    if stray:
        raise SpecError(f"the sharding is on {stray[0]}, which is not among the given devices")
    dims = tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in sharding.spec.partitions
    )
    mesh = SpecMesh(tuple(sharding.mesh.shape.items()))
    partial = tuple(axis for axis in mesh.names if axis in sharding.spec.unreduced)
    return Group.of(tuple(position[d] for d in there), GroupLayout(mesh, dims, partial))


def stacked_over(
    mesh: Mesh, sharding: NamedSharding, axis: str | None, dims: int | None = None
) -> NamedSharding:
    """A sharding of arrays stacked along a new first dim, on a mesh with the same axes and more.

    Args:
      mesh: the mesh to be on.
      sharding: of one of the arrays.
      axis: of the mesh, splits the new dim; None splits nothing.
      dims: how many dims are new; None adds one where there is an axis.
    """
    new = int(axis is not None) if dims is None else dims
    return NamedSharding(mesh, PartitionSpec(*[axis] * new, *sharding.spec))


def over_axis(axis: str, stacked: bool) -> PartitionSpec:
    """What a `shard_map` over one axis is told of an array: split along the axis, or whole."""
    return PartitionSpec(axis) if stacked else PartitionSpec()


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axes: Axes, stacked: int = 0) -> NamedSharding:
    """Sequences split over `axes`; `stacked` leading dims (micro-batches) are not."""
    return NamedSharding(mesh, partition_spec((axes,), stacked))


def partly_sharding(mesh: Mesh, rank: int, dims: Mapping[int, Axes]) -> NamedSharding:
    """A sharding of some dims of an array; how the others lie is left to XLA."""
    entries: list[Any] = [PartitionSpec.UNCONSTRAINED] * rank
    for dim, axes in dims.items():
        entries[dim] = axes or None
    return NamedSharding(mesh, PartitionSpec(*entries))


def constrain(x: jax.Array, sharding: NamedSharding | None) -> Any:
    """Asks XLA to lay a value out this way; None leaves it free."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def grid_sharding(mesh: Mesh, axes: tuple[str, ...], rank: int) -> NamedSharding:
    """Dim i of an array of this rank split over axis i; what is left over is whole everywhere.

    >>> mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("rows", "columns"))
    >>> tuple(grid_sharding(mesh, ("rows",), 2).spec)
    ('rows', None)
    """
    return NamedSharding(mesh, PartitionSpec(*axes, *([None] * (rank - len(axes)))))
