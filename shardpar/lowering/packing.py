"""What a device does alone in a transfer: packs slices into flat parcels, and puts pieces together.

Both are jitted programs of one device, which XLA fuses into plain copies. Addends are added in
the order of their labels: the result does not depend on who sent what when.
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
    """Slices that travel together.

    Attributes:
      slices: in order.
      dtype: of the elements on the way: of the numbers where they are added, otherwise
        unsigned integers of the same width, so that nothing touches their bits.
      pad: elements to fill up to; 0 is as long as they are.
      is_bare: the one slice travels as it is, in its own shape and dtype; otherwise the slices
        are flat, one after the other.
    """

    slices: tuple[Slice, ...]
    dtype: str
    pad: int = 0
    is_bare: bool = False

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
    # Complex numbers and those of less than a byte have no unsigned integer of their width.
    if kind.kind == "c" or kind.name.startswith(("int2", "int4", "uint2", "uint4", "float4")):
        return str(kind)
    return f"uint{8 * kind.itemsize}"


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


@dataclass(frozen=True)
class Packer:
    """What one device packs.

    Attributes:
      tensors: whose pieces it takes, in this order.
      run: from these pieces to one array per parcel: [1, 1, length], or bare.
    """

    tensors: tuple[int, ...]
    run: Callable[[list[jax.Array]], list[jax.Array]]


def packer(parcels: Sequence[Parcel], have: Mapping[int, Have]) -> Packer:
    """Prepares the packing of a device's parcels.

    Args:
      parcels: what to pack, all from this device.
      have: what the device has, by tensor.
    """
    tensors = tuple(sorted({s.tensor for parcel in parcels for s in parcel.slices}))
    place = {tensor: i for i, tensor in enumerate(tensors)}
    recipe = tuple(
        (
            tuple((place[s.tensor], box_of(have[s.tensor].spans, s.cell)) for s in parcel.slices),
            parcel.dtype,
            parcel.pad,
            parcel.is_bare,
        )
        for parcel in parcels
    )
    # A piece that goes whole needs no program: it goes from where it lies.
    whole = [
        parcel.is_bare and is_whole(have[parcel.slices[0].tensor].spans, parcel.slices[0].cell)
        for parcel in parcels
    ]
    joined = tuple(r for r in recipe if not r[3])
    join = _packer(joined) if joined else None

    def run(pieces: list[jax.Array]) -> list[jax.Array]:
        made = iter(join(pieces) if join else ())
        out = []
        for (slices, _, _, is_bare), is_all in zip(recipe, whole, strict=True):
            if not is_bare:
                out.append(next(made))
                continue
            ((number, box),) = slices
            # Slices that travel alone share programs, as pieces do: see `_assembler`.
            out.append(pieces[number] if is_all else _cutter(box)(pieces[number]))
        return out

    return Packer(tensors, run)


def is_whole(spans: tuple[Spans, ...], cell: Cell) -> bool:
    """Whether a cell is all that a device has."""
    return all(
        of_dim == ((start, stop),) for of_dim, (start, stop) in zip(spans, cell, strict=True)
    )


@lru_cache(maxsize=4096)
def _packer(recipe: Any) -> Callable[[list[jax.Array]], list[jax.Array]]:
    def run(pieces: list[jax.Array]) -> list[jax.Array]:
        out = []
        for slices, dtype, pad, _ in recipe:
            flat = [_bits(_cut(pieces[i], box), dtype).reshape(-1) for i, box in slices]
            joined = jnp.concatenate(flat) if len(flat) > 1 else flat[0]
            if pad > joined.size:
                joined = jnp.pad(joined, (0, pad - joined.size))
            out.append(joined[None, None])
        return out

    return jax.jit(run)


@lru_cache(maxsize=4096)
def _cutter(box: Box) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda piece: _cut(piece, box))


@dataclass(frozen=True)
class Assembly:
    """How one device comes to its new pieces.

    Attributes:
      kept: tensors whose piece stays what it is.
      adopted: (tensor, parcel) where a bare parcel is the whole new piece.
      made: tensors that `run` makes, in this order.
      own, parcels: whose old pieces and which parcels `run` takes, in this order.
      run: from these arrays to the pieces made; None where nothing is made.
    """

    kept: tuple[int, ...]
    adopted: tuple[tuple[int, int], ...]
    made: tuple[int, ...]
    own: tuple[int, ...]
    parcels: tuple[int, ...]
    run: Callable[[list[jax.Array]], list[jax.Array]] | None


def assembly(
    wants: Mapping[int, Want],
    have: Mapping[int, Have],
    arriving: Sequence[Parcel],
    dtypes: Sequence[Any],
    device: jax.Device,
) -> Assembly:
    """Prepares how a device puts its new pieces together from what it had and what arrives.

    Args:
      wants: what it shall have, by tensor.
      have: what it has, by tensor; may lack some.
      arriving: parcels, in the order in which they will be given.
      dtypes: of the tensors.
      device: where the pieces shall be.
    """
    kept, adopted, made, recipe = [], [], [], []
    inputs: dict[tuple[str, int], int] = {}

    def place(kind: str, number: int) -> int:
        return inputs.setdefault((kind, number), len(inputs))

    offers: dict[tuple[int, int], list[tuple[int, int, Slice]]] = {}
    for number, parcel in enumerate(arriving):
        offset = 0
        for part in parcel.slices:
            offers.setdefault((part.tensor, part.label), []).append((number, offset, part))
            offset += math.prod(part.shape)
    for tensor, want in wants.items():
        held = have.get(tensor)
        if held and want.labels == (held.label,) and held.spans == want.spans:
            kept.append(tensor)
            continue
        if len(want.labels) == 1:
            mine = offers.get((tensor, want.labels[0]), [])
            bare = [
                n for n, _, part in mine if arriving[n].is_bare and is_whole(want.spans, part.cell)
            ]
            if bare:
                adopted.append((tensor, bare[0]))
                continue
        addends = []
        for label in want.labels:
            sources: list[Any] = []
            if held and held.label == label:
                for cell in overlaps(held.spans, want.spans):
                    where = box_of(held.spans, cell)
                    sources.append((place("own", tensor), where, box_of(want.spans, cell)))
            for number, offset, part in offers.get((tensor, label), []):
                at: Any = offset
                if arriving[number].is_bare:
                    at = tuple((0, n) for n in part.shape)
                sources.append((place("parcel", number), at, box_of(want.spans, part.cell)))
            addends.append(tuple(sources))
        shape = tuple(sum(b - a for a, b in spans) for spans in want.spans)
        made.append(tensor)
        recipe.append((shape, str(np.dtype(dtypes[tensor])), tuple(addends)))
    order = list(inputs)
    # The jitted program takes its inputs grouped: own pieces first, then parcels.
    own = tuple(n for kind, n in order if kind == "own")
    parcels = tuple(n for kind, n in order if kind == "parcel")
    turned = {inputs["own", n]: i for i, n in enumerate(own)}
    turned |= {inputs["parcel", n]: len(own) + i for i, n in enumerate(parcels)}
    final = tuple(
        (shape, dtype, tuple(tuple((turned[i], at, box) for i, at, box in a) for a in addends))
        for shape, dtype, addends in recipe
    )
    run = _assembler(final, device) if final else None
    return Assembly(tuple(kept), tuple(adopted), tuple(made), own, parcels, run)


@dataclass(frozen=True)
class _At:
    """That a slice begins in its parcel where the so-manieth of the program's numbers says."""

    number: int


def _assembler(recipe: Any, device: jax.Device) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """Pieces one by one, by programs that pieces share.

    A program of all pieces would be no faster, for each piece is a kernel of its own in it too,
    but would compile thousands of kernels. Layers are alike: apart from where their slices are in
    parcels, which the shared programs are told, they need a few dozen.
    """
    steps = []
    for shape, dtype, addends in recipe:
        which: dict[int, int] = {}
        starts: list[int] = []
        alike = tuple(
            tuple(
                (which.setdefault(number, len(which)), _as_told(at, box, starts), box)
                for number, at, box in sources
            )
            for sources in addends
        )
        program = _piece_program(shape, dtype, alike, None if which else device)
        steps.append((program, tuple(which), np.array(starts, np.int32)))
    told = jax.device_put([starts for _, _, starts in steps], device)

    def run(inputs: list[jax.Array]) -> list[jax.Array]:
        return [
            program([inputs[i] for i in which], starts)
            for (program, which, _), starts in zip(steps, told, strict=True)
        ]

    return run


def _as_told(at: Any, box: Box, starts: list[int]) -> Any:
    """Where a slice is: by a number that the program is told, if it fits into one."""
    if not isinstance(at, int) or at + math.prod(size for _, size in box) >= 1 << 31:
        return at
    starts.append(at)
    return _At(len(starts) - 1)


@lru_cache(maxsize=4096)
def _piece_program(
    shape: tuple[int, ...], dtype: str, addends: Any, device: jax.Device | None
) -> Callable[[list[jax.Array], jax.Array], jax.Array]:
    def run(inputs: list[jax.Array], starts: jax.Array) -> jax.Array:
        return _piece(inputs, starts, shape, dtype, addends)

    if device is None:
        return jax.jit(run)
    return jax.jit(run, out_shardings=jax.sharding.SingleDeviceSharding(device))


def _piece(
    inputs: list[jax.Array],
    starts: jax.Array,
    shape: tuple[int, ...],
    dtype: str,
    addends: Any,
) -> jax.Array:
    total: jax.Array | None = None
    for sources in addends:
        part = jnp.zeros(shape, dtype)
        for number, where, box in sources:
            sizes = tuple(size for _, size in box)
            if isinstance(where, int | _At):
                flat = inputs[number].reshape(-1)
                length = math.prod(sizes)
                if isinstance(where, _At):
                    flat = jax.lax.dynamic_slice_in_dim(flat, starts[where.number], length)
                else:
                    flat = flat[where : where + length]
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
