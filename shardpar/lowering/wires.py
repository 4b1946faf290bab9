"""Activations and their gradients on their way from one stage's devices to another's.

Where every piece that the receiver wants lies on some device of the sender as it is, JAX
copies it from device to device. Otherwise `device_put` would gather the array on the host,
unseen, and the pieces are cut and sent by `lowering.transfer` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import jax
from jax.sharding import NamedSharding

from shardpar.lowering.elsewhere import absent, is_here
from shardpar.lowering.shardings import group_of
from shardpar.lowering.transfer import Transfer
from shardpar.lowering.union import UnionArray
from shardpar.spec.layout import Layout
from shardpar.spec.reshard import Tensor, fuse


class Wire:
    """Moves some arrays from the mesh of one stage to that of another.

    Attributes:
      come: shapes and shardings of the arrays at the sender.
      go: of the same arrays at the receiver.
      arrives_here: whether any of the receiver's devices is this process's.
    """

    def __init__(
        self,
        come: Sequence[jax.ShapeDtypeStruct],
        go: Sequence[jax.ShapeDtypeStruct],
        devices: Sequence[jax.Device],
    ) -> None:
        self.come, self.go, self.devices = tuple(come), tuple(go), tuple(devices)
        here = jax.process_index()
        involved = [d for s in (*come, *go) for d in s.sharding.device_set]
        self._copies = all(d.process_index == here for d in involved) and all(
            pieces_are_there(a.sharding, b.sharding, a.shape)
            for a, b in zip(self.come, self.go, strict=True)
        )
        self._targets = [b.sharding for b in self.go]
        ends = [[d for s in side for d in s.sharding.device_set] for side in (self.come, self.go)]
        self.arrives_here = is_here(ends[1])
        self._passes_here = self.arrives_here or is_here(ends[0])

    def __call__(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """The arrays at the receiver; the copies run while the host goes on."""
        if not self._passes_here:
            return absent(self.go)  # type: ignore[no-any-return]
        if self._copies:
            return jax.device_put(list(arrays), self._targets)  # type: ignore[no-any-return]
        unions = [
            UnionArray((array,), tensor.src, tensor.shape)
            for array, tensor in zip(arrays, self._transfer.resolved.tensors, strict=True)
        ]
        moved = self._transfer(unions)
        return [
            rehomed(union.arrays[0], b.sharding) for union, b in zip(moved, self.go, strict=True)
        ]

    @cached_property
    def _transfer(self) -> Transfer:
        tensors = [
            Tensor(
                Layout((group_of(a.sharding, self.devices),)),
                Layout((group_of(b.sharding, self.devices),)),
                a.shape,
                a.dtype.itemsize,
            )
            for a, b in zip(self.come, self.go, strict=True)
        ]
        return Transfer(fuse(tensors), [a.dtype for a in self.come], self.devices)


def pieces_are_there(come: NamedSharding, go: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether each piece of the second sharding is a whole piece of the first."""
    have = set(map(_hashable, come.devices_indices_map(shape).values()))
    return all(_hashable(i) in have for i in go.devices_indices_map(shape).values())


def _hashable(index: tuple[slice, ...]) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((s.start, s.stop) for s in index)


def rehomed(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The same pieces on the same devices under an equal sharding of another mesh object."""
    if array.sharding == sharding:
        return array
    return jax.make_array_from_single_device_arrays(
        array.shape, sharding, [s.data for s in array.addressable_shards], dtype=array.dtype
    )
