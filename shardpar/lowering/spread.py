"""How several processes save an array together: cut as finely as it goes over all their devices.

Checkpoints of several processes hold arrays that all of them have a part in. A plan's own
arrays may lie on the devices of some only, so they are brought into this layout first; each
process then writes about the same number of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from shardpar.lowering.shardings import axes_sharding
from shardpar.spec.mesh import GroupLayout, Mesh


def spread(leaf: Any, devices: Sequence[jax.Device]) -> jax.ShapeDtypeStruct:
    """The shape of a leaf with its sharding; what no dim can be cut into is kept in copies.

    Args:
      leaf: anything with shape and dtype.
      devices: all that take part.

    >>> shape = spread(jax.ShapeDtypeStruct((3, 4), "float32"), jax.devices()[:1])
    >>> shape.shape, shape.sharding.is_fully_replicated
    ((3, 4), True)
    """
    mesh = Mesh.factored(len(devices))
    layout = GroupLayout(mesh, cut_finely(tuple(leaf.shape), mesh), ())
    sharding = axes_sharding(layout, list(devices))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def spread_once(leaf: Any, devices: Sequence[jax.Device]) -> jax.ShapeDtypeStruct:
    """The shape of a leaf with a sharding that has no copies, over as many devices as it can.

    Args:
      leaf: anything with shape and dtype.
      devices: of one process; the first of them are taken.

    >>> spread_once(jax.ShapeDtypeStruct((3,), "float32"), jax.devices()[:2]).sharding.num_devices
    1
    """
    for count in range(len(devices), 0, -1):
        mesh = Mesh.factored(count)
        if sum(map(len, cut_finely(tuple(leaf.shape), mesh))) == len(mesh.names):
            break
    return spread(leaf, devices[:count])


def cut_finely(shape: tuple[int, ...], mesh: Mesh) -> tuple[tuple[str, ...], ...]:
    """The axes of each dim: each axis cuts the longest pieces that it can cut evenly.

    >>> cut_finely((6, 8), Mesh.factored(8)), cut_finely((3,), Mesh.factored(2))
    ((('b',), ('a', 'c')), ((),))
    """
    left = list(shape)
    dims: list[list[str]] = [[] for _ in shape]
    for axis in mesh.names:
        size = mesh.size_of((axis,))
        able = [d for d, extent in enumerate(left) if extent and extent % size == 0]
        if able:
            dim = max(able, key=lambda d: left[d])
            dims[dim].append(axis)
            left[dim] //= size
    return tuple(tuple(axes) for axes in dims)
