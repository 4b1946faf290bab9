"""An array over groups of devices: one jax.Array per group, and the layout they are in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from shardpar.errors import SpecError
from shardpar.lowering.shardings import group_of, group_sharding
from shardpar.spec.layout import Group, Layout, Piece, Spans

Shape = tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class UnionArray:
    """An array in any layout: what JAX cannot say with one sharding.

    Attributes:
      arrays: one per group of the layout; a group's array has its region of the whole, its
        addends are `unreduced`.
      layout: where the pieces are.
      shape: of the whole array.
    """

    arrays: tuple[jax.Array, ...]
    layout: Layout = field(metadata={"static": True})
    shape: Shape = field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        """Element type of all pieces."""
        return self.arrays[0].dtype

    def buffers(self, devices: Sequence[jax.Device]) -> dict[int, jax.Array]:
        """The pieces that this process can reach, by device number."""
        number = {device: i for i, device in enumerate(devices)}
        shards = [shard for array in self.arrays for shard in array.addressable_shards]
        held = {number.get(shard.device, -1): shard.data for shard in shards}
        wanted = {d for d in self.layout.devices if d < len(devices)}
        if not held.keys() <= wanted:
            raise SpecError(
                f"an array in layout {self.layout} is not on those devices; give the devices in "
                "the order in which it was placed"
            )
        return held


def union_array(array: jax.Array, devices: Sequence[jax.Device] | None = None) -> UnionArray:
    """A sharded jax.Array as a union of one group.

    Raises:
      SpecError: its devices are not among `devices`, or its sharding has no mesh.
    """
    here = jax.devices() if devices is None else devices
    number = {device: i for i, device in enumerate(here)}
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        group = group_of(sharding, here)
    elif len(sharding.device_set) == 1 and next(iter(sharding.device_set)) in number:
        group = Group((number[next(iter(sharding.device_set))],))
    else:
        raise SpecError(
            f"the array's sharding is {sharding}; put it on a mesh with a NamedSharding first"
        )
    layout = Layout((group,))
    buffers = {number[s.device]: s.data for s in array.addressable_shards}
    return from_buffers(buffers, layout, array.shape, array.dtype, here)


def from_buffers(
    buffers: Mapping[int, jax.Array],
    layout: Layout,
    shape: Shape,
    dtype: Any,
    devices: Sequence[jax.Device],
) -> UnionArray:
    """Puts pieces that lie on their devices together; nothing is copied.

    Args:
      buffers: the piece on each device of this process, by device number.
      layout: what the pieces are.
      shape: of the whole array.
      dtype: of the pieces, for a process that has none of them.
      devices: all devices of the cluster.
    """
    arrays = []
    for number, group in enumerate(layout.groups):
        region = tuple(_length(spans) for spans in layout.region(number, shape))
        sharding = group_sharding(group, len(shape), devices)
        arrays.append(
            jax.make_array_from_single_device_arrays(
                region, sharding, [buffers[d] for d in group.devices if d in buffers], dtype=dtype
            )
        )
    return UnionArray(tuple(arrays), layout, shape)


def place(value: Any, layout: Layout, devices: Sequence[jax.Device] | None = None) -> UnionArray:
    """Puts a host array into a layout; of a sum, the first addend is the value, the others zeros.

    Args:
      value: anything NumPy takes, the same in every process.
      layout: where its pieces shall be.
      devices: all devices of the cluster; None takes `jax.devices()`.

    Raises:
      SpecError: the layout does not fit the array, or names a device that is not there.

    >>> from shardpar.spec.layout_text import layout_from_text
    >>> union = place(np.arange(4.0), layout_from_text("[0]"))
    >>> union.arrays[0].shape, union.shape
    ((4,), (4,))
    """
    here = jax.devices() if devices is None else devices
    try:
        value = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise SpecError(f"this cannot be placed on devices: {error}; give an array") from None
    if value.dtype.kind in "OUSMm":
        raise SpecError(
            f"this cannot be placed on devices: its elements are {value.dtype}; give numbers"
        )
    value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)
    missing = [d for d in layout.devices if d >= len(here)]
    if missing:
        raise SpecError(
            f"layout {layout} is on device {missing[0]}, but there are {len(here)} devices, "
            "counted from 0"
        )
    pieces, targets, numbers = [], [], []
    process = jax.process_index()
    for number, of_group in enumerate(layout.pieces(value.shape)):
        for piece in of_group:
            if here[piece.device].process_index != process:
                continue
            is_value = piece.term == 0 and not (layout.across == "partial" and number > 0)
            part = take(value, piece)
            pieces.append(part if is_value else np.zeros_like(part))
            targets.append(here[piece.device])
            numbers.append(piece.device)
    buffers = dict(zip(numbers, jax.device_put(pieces, targets), strict=True))
    return from_buffers(buffers, layout, value.shape, value.dtype, here)


def take(value: np.ndarray, piece: Piece) -> np.ndarray:
    """A device's piece of a host array.

    >>> take(np.arange(8), Piece(0, 0, (((0, 2), (6, 8)),)))
    array([0, 1, 6, 7])
    """
    index = [_indices(spans) for spans in piece.spans]
    return value[np.ix_(*index)] if index else value


def _indices(spans: Spans) -> np.ndarray:
    return np.concatenate([np.arange(start, stop) for start, stop in spans])


def _length(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)
