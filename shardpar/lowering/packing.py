"""What a device does alone in a transfer: packs slices into flat parcels, and puts pieces together.

Both are jitted programs of one device with every index known, so XLA fuses them into plain
copies. Addends are added in the order of their labels: the result does not depend on who
sent what when.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardpar.spec.exchange import Cell, Have, Want
from shardpar.spec.layout import Spans

Box = tuple[tuple[int, int], ...]
"""Where a slice is in a device's own memory: (start, size) per dim."""


@dataclass(frozen=True)
class Slice:
    """Part of one addend of one tensor."""

    tensor: int
    label: int
    cell: Cell

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dims."""
        return tuple(stop - start for start, stop in self.cell)


@dataclass(frozen=True)
class Parcel:
    """Slices that travel together, flat, one after the other.

    Attributes:
      slices: in order.
      dtype: of the elements on the way: of the numbers where they are added, otherwise
        unsigned integers of the same width, so that nothing touches their bits.
      pad: elements to fill up to; 0 is as long as they are.
    """

    slices: tuple[Slice, ...]
    dtype: str
    pad: int = 0

    @property
    def size(self) -> int:
        """Elements of all slices."""
        return sum(math.prod(s.shape) for s in self.slices)


def wire_dtype(dtype: Any) -> str:
    """The dtype in which a tensor's bits travel.

    >>> wire_dtype(jnp.bfloat16), wire_dtype(np.float32), wire_dtype(np.complex64)
    ('uint16', 'uint32', 'complex64')
    """
    kind = np.dtype(dtype)
    return str(kind) if kind.kind == "c" else f"uint{8 * kind.itemsize}"


def box_of(spans: tuple[Spans, ...], cell: Cell) -> Box:
    """Where a cell lies in the memory of a device that has these indices."""
    out = []
    for of_dim, (start, stop) in zip(spans, cell, strict=True):
        offset = 0
        for low, high in of_dim:
            if low <= start < high:
                out.append((offset + start - low, stop - start))
                break
            offset += high - low
    return tuple(out)


def overlaps(a: tuple[Spans, ...], b: tuple[Spans, ...]) -> Iterator[Cell]:
    """The cells that two devices' indices have in common."""
    per_dim = [
        [
            (max(x[0], y[0]), min(x[1], y[1]))
            for x in of_a
            for y in of_b
            if max(x[0], y[0]) < min(x[1], y[1])
        ]
        for of_a, of_b in zip(a, b, strict=True)
    ]
    return itertools.product(*per_dim)


def pack(
    parcels: Sequence[Parcel], have: Mapping[int, Have], pieces: Mapping[int, jax.Array]
) -> list[jax.Array]:
    """Packs a device's parcels.

    Args:
      parcels: what to pack, all from this device.
      have: what the device has, by tensor.
      pieces: its arrays, by tensor, all on one device.

    Returns:
      One array [1, 1, length] per parcel.
    """
    tensors = sorted({s.tensor for parcel in parcels for s in parcel.slices})
    place = {tensor: i for i, tensor in enumerate(tensors)}
    recipe = tuple(
        (
            tuple((place[s.tensor], box_of(have[s.tensor].spans, s.cell)) for s in parcel.slices),
            parcel.dtype,
            parcel.pad,
        )
        for parcel in parcels
    )
    return _packer(recipe)([pieces[tensor] for tensor in tensors])


@lru_cache(maxsize=4096)
def _packer(recipe: Any) -> Callable[[list[jax.Array]], list[jax.Array]]:
    def run(pieces: list[jax.Array]) -> list[jax.Array]:
        out = []
        for slices, dtype, pad in recipe:
            flat = [_bits(_cut(pieces[i], box), dtype).reshape(-1) for i, box in slices]
            joined = jnp.concatenate(flat) if len(flat) > 1 else flat[0]
            if pad > joined.size:
                joined = jnp.pad(joined, (0, pad - joined.size))
            out.append(joined[None, None])
        return out

    return jax.jit(run)


def assemble(
    wants: Mapping[int, Want],
    have: Mapping[int, Have],
    pieces: Mapping[int, jax.Array],
    arrived: Sequence[tuple[Parcel, jax.Array]],
    dtypes: Mapping[int, Any],
    device: jax.Device,
) -> dict[int, jax.Array]:
    """Puts a device's new pieces together from what it had and what arrived.

    Args:
      wants: what it shall have, by tensor.
      have: what it has, by tensor; may lack some.
      pieces: the arrays of what it has.
      arrived: parcels with their contents, on this device. A slice with a label that the
        tensor's want does not name is of the sum of all.
      dtypes: of the tensors.
      device: where the pieces shall be.
    """
    inputs: list[jax.Array] = [array for _, array in arrived]
    index: dict[int, int] = {}
    recipe = []
    out: dict[int, jax.Array] = {}
    for tensor, want in wants.items():
        shape = tuple(sum(b - a for a, b in spans) for spans in want.spans)
        held = have.get(tensor)
        if held and want.labels == (held.label,) and held.spans == want.spans:
            out[tensor] = pieces[tensor]
            continue
        addends = []
        for label in want.labels:
            sources: list[Any] = []
            if held and held.label == label:
                index.setdefault(tensor, len(inputs))
                if index[tensor] == len(inputs):
                    inputs.append(pieces[tensor])
                sources += [
                    (index[tensor], box_of(held.spans, cell), box_of(want.spans, cell))
                    for cell in overlaps(held.spans, want.spans)
                ]
            for number, (parcel, _) in enumerate(arrived):
                offset = 0
                for part in parcel.slices:
                    size = math.prod(part.shape)
                    if part.tensor == tensor and part.label == label:
                        sources.append((number, offset, box_of(want.spans, part.cell)))
                    offset += size
            addends.append(tuple(sources))
        recipe.append((tensor, shape, str(np.dtype(dtypes[tensor])), tuple(addends)))
    if recipe:
        made = _assembler(tuple(r[1:] for r in recipe), None if inputs else device)(inputs)
        out.update((r[0], array) for r, array in zip(recipe, made, strict=True))
    return out


@lru_cache(maxsize=4096)
def _assembler(recipe: Any, device: jax.Device | None) -> Callable[[list[jax.Array]], Any]:
    def run(inputs: list[jax.Array]) -> list[jax.Array]:
        return [_piece(inputs, *of_tensor) for of_tensor in recipe]

    if device is None:
        return jax.jit(run)
    return jax.jit(run, out_shardings=jax.sharding.SingleDeviceSharding(device))


def _piece(inputs: list[jax.Array], shape: tuple[int, ...], dtype: str, addends: Any) -> jax.Array:
    total: jax.Array | None = None
    for sources in addends:
        part = jnp.zeros(shape, dtype)
        for number, where, box in sources:
            sizes = tuple(size for _, size in box)
            if isinstance(where, int):
                flat = inputs[number].reshape(-1)[where : where + math.prod(sizes)]
                value = _unbits(flat, dtype).reshape(sizes)
            else:
                value = _cut(inputs[number], where)
            if sizes == shape:
                part = value
            else:
                part = jax.lax.dynamic_update_slice(part, value, [start for start, _ in box])
        total = part if total is None else total + part
    return jnp.zeros(shape, dtype) if total is None else total


def _cut(array: jax.Array, box: Box) -> jax.Array:
    if all(start == 0 and size == n for (start, size), n in zip(box, array.shape, strict=True)):
        return array
    return array[tuple(slice(start, start + size) for start, size in box)]


def _bits(array: jax.Array, dtype: str) -> jax.Array:
    if array.dtype == dtype:
        return array
    if array.dtype == bool:
        return array.astype(dtype)
    return jax.lax.bitcast_convert_type(array, dtype)


def _unbits(array: jax.Array, dtype: str) -> jax.Array:
    if array.dtype == dtype:
        return array
    if dtype == "bool":
        return array.astype(bool)
    return jax.lax.bitcast_convert_type(array, dtype)
