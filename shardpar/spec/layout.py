"""Where every piece of an array is, over groups of devices that need not be alike (HSPMD).

A layout has two tiers. Inside a group (bottom) a small mesh splits dims, keeps copies, or
holds partial sums. Across groups (top) each group holds a copy of the whole, an addend of
it, or its own part of one dim, and the parts may be unequal (arXiv 2504.20490).

    [0,1,2,3]{split0:2, dup:2} + [4,5]{split1:2} across partial

says: devices 0 to 3 form a 2 x 2 mesh, of which the first axis splits dim 0 and the second
keeps copies; devices 4 and 5 split dim 1; the array is the sum of what the two groups hold.
`spec/layout_text.py` reads and prints this text.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from shardpar.errors import SpecError
from shardpar.spec.mesh import Axes, GroupLayout, Mesh

Span = tuple[int, int]
"""Consecutive indices of one dim: (first, one past the last)."""

Spans = tuple[Span, ...]
"""Indices of one dim, in order; neighbours neither touch nor overlap."""


def _require_parts(parts: int, what: str) -> None:
    if parts < 2:
        raise SpecError(f"{what}:{parts} has {parts} part; write 2 or more, or leave it out")


@dataclass(frozen=True)
class Split:
    """A mesh axis that cuts one dim into equal parts."""

    dim: int
    parts: int

    def __post_init__(self) -> None:
        if self.dim < 0:
            raise SpecError(f"split{self.dim}: dims are counted from 0")
        _require_parts(self.parts, f"split{self.dim}")

    def __str__(self) -> str:
        return f"split{self.dim}:{self.parts}"


@dataclass(frozen=True)
class Replicate:
    """A mesh axis whose devices hold copies."""

    parts: int

    def __post_init__(self) -> None:
        _require_parts(self.parts, "dup")

    def __str__(self) -> str:
        return f"dup:{self.parts}"


@dataclass(frozen=True)
class Partial:
    """A mesh axis whose devices hold addends: the array is their sum."""

    parts: int

    def __post_init__(self) -> None:
        _require_parts(self.parts, "partial")

    def __str__(self) -> str:
        return f"partial:{self.parts}"


Entry = Split | Replicate | Partial


@dataclass(frozen=True)
class Group:
    """Devices in mesh order, and what each axis of their mesh does to the array.

    Attributes:
      devices: device numbers; the last axis varies fastest.
      entries: the axes, slowest links first. Dims that no entry splits are whole.

    >>> group = Group((0, 1, 2, 3), (Split(0, 2), Replicate(2)))
    >>> [piece.spans for piece in group.pieces((8, 4))]
    [(((0, 4),), ((0, 4),)), (((0, 4),), ((0, 4),)), (((4, 8),), ((0, 4),)), (((4, 8),), ((0, 4),))]
    """

    devices: tuple[int, ...]
    entries: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        if not self.devices:
            raise SpecError("a group has no devices; name at least one, such as [0]")
        twice = sorted(device for device, n in Counter(self.devices).items() if n > 1)
        if twice:
            raise SpecError(f"group {self} lists device {twice[0]} twice")
        if min(self.devices) < 0:
            raise SpecError(f"group {self} lists device {min(self.devices)}; the first is 0")
        parts = math.prod(entry.parts for entry in self.entries)
        if parts != len(self.devices):
            raise SpecError(
                f"group {self} has {len(self.devices)} devices, but its entries make {parts} "
                "places; their product must be the number of devices (dup:n keeps n copies)"
            )

    @classmethod
    def of(cls, devices: tuple[int, ...], layout: GroupLayout) -> Group:
        """The group in which a layout over a named mesh lies on these devices.

        Where a dim is split by axes in another order than the mesh has them, the devices
        are put in the order of the splits.

        >>> named = GroupLayout(Mesh.factored(4), (("b", "a"),))
        >>> str(Group.of((0, 1, 2, 3), named))
        '[0,2,1,3]{split0:2, split0:2}'
        """
        if len(devices) != layout.mesh.num_devices:
            raise SpecError(
                f"mesh {layout.mesh} holds {layout.mesh.num_devices} devices; got {len(devices)}"
            )
        role: dict[str, Entry] = {}
        for dim, axes in enumerate(layout.dims):
            role |= {
                axis: Split(dim, n) for axis in axes if (n := layout.mesh.size_of((axis,))) > 1
            }
        for name, size in layout.mesh.axes:
            if size > 1:
                role.setdefault(name, Partial(size) if name in layout.partial else Replicate(size))
        names = [name for name in layout.mesh.names if name in role]
        # Axes that share a dim trade places until they stand in the order in which they split it.
        order = list(names)
        for axes in layout.dims:
            split = [axis for axis in axes if axis in role]
            for place, axis in zip(sorted(map(order.index, split)), split, strict=True):
                names[place] = axis
        sizes = [role[name].parts for name in order]
        strides = {n: math.prod(sizes[i + 1 :]) for i, n in enumerate(order)}
        arranged = tuple(
            devices[sum(i * strides[n] for i, n in zip(place, names, strict=True))]
            for place in itertools.product(*(range(role[name].parts) for name in names))
        )
        return cls(arranged, tuple(role[name] for name in names))

    def named(self, rank: int) -> GroupLayout:
        """The same over a mesh with named axes a, b, c, … for an array of some rank.

        Raises:
          SpecError: an entry splits a dim the array does not have.
        """
        self._require_rank(rank)
        mesh = Mesh.of_sizes(tuple(entry.parts for entry in self.entries))
        dims: list[Axes] = [()] * rank
        partial: Axes = ()
        for name, entry in zip(mesh.names, self.entries, strict=True):
            if isinstance(entry, Split):
                dims[entry.dim] = (*dims[entry.dim], name)
            elif isinstance(entry, Partial):
                partial = (*partial, name)
        return GroupLayout(mesh, tuple(dims), partial)

    @property
    def terms(self) -> int:
        """How many addends the group's array is the sum of; 1 where it is no sum."""
        return math.prod(e.parts for e in self.entries if isinstance(e, Partial))

    def parts_of(self, dim: int) -> int:
        """Into how many parts the group cuts a dim."""
        return math.prod(e.parts for e in self.entries if isinstance(e, Split) and e.dim == dim)

    def pieces(
        self, shape: tuple[int, ...], region: tuple[Spans, ...] | None = None
    ) -> tuple[Piece, ...]:
        """What each device holds, in device order.

        Args:
          shape: of the whole array.
          region: the indices of each dim that the group has; None is all of them.

        Raises:
          SpecError: an entry splits a dim the array does not have, or does not divide it.
        """
        self._require_rank(len(shape))
        have = region or tuple(((0, size),) for size in shape)
        for dim, spans in enumerate(have):
            size, parts = _length(spans), self.parts_of(dim)
            if size % parts:
                raise SpecError(
                    f"group {self} cuts dim {dim} into {parts} parts, which do not divide its "
                    f"{size} indices of shape {shape}; {_instead(size, parts)}"
                )
        pieces = []
        for device, place in zip(
            self.devices, itertools.product(*(range(e.parts) for e in self.entries)), strict=True
        ):
            at, term = [0] * len(shape), 0
            for index, entry in zip(place, self.entries, strict=True):
                if isinstance(entry, Split):
                    at[entry.dim] = at[entry.dim] * entry.parts + index
                elif isinstance(entry, Partial):
                    term = term * entry.parts + index
            mine = tuple(_cut(of, at[dim], self.parts_of(dim)) for dim, of in enumerate(have))
            pieces.append(Piece(device, term, mine))
        return tuple(pieces)

    def _require_rank(self, rank: int) -> None:
        for entry in self.entries:
            if isinstance(entry, Split) and entry.dim >= rank:
                raise SpecError(
                    f"group {self} splits dim {entry.dim}, but the array has {rank} dims, "
                    f"counted from 0; use a smaller dim"
                )

    def __str__(self) -> str:
        return f"[{','.join(map(str, self.devices))}]{{{', '.join(map(str, self.entries))}}}"


@dataclass(frozen=True)
class Piece:
    """What one device holds of an array.

    Attributes:
      device: its number.
      term: which addend, counted inside its group.
      spans: the indices of each dim that it has, joined in this order in its memory.
    """

    device: int
    term: int
    spans: tuple[Spans, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array in the device's memory."""
        return tuple(map(_length, self.spans))


@dataclass(frozen=True)
class Block:
    """Consecutive indices of the dim that is split across groups, and the group that has them."""

    group: int
    extent: int


@dataclass(frozen=True)
class SplitAcross:
    """The top tier cuts one dim into blocks, one after the other, each held by one group.

    Extents are in indices and add up to the dim. A group may have several blocks: that is
    how a reduced gradient stays where it was summed.
    """

    dim: int
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if self.dim < 0:
            raise SpecError(f"across split{self.dim}: dims are counted from 0")
        for block in self.blocks:
            if block.extent < 1:
                raise SpecError(f"across {self}: an extent is {block.extent}; write 1 or more")
        for one, next_ in itertools.pairwise(self.blocks):
            if one.group == next_.group:
                raise SpecError(
                    f"across {self}: group {one.group} has two blocks in a row; write their sum"
                )

    @property
    def extent(self) -> int:
        """Indices of all blocks together: what the dim must have."""
        return sum(block.extent for block in self.blocks)

    def spans_of(self, group: int) -> Spans:
        """The indices a group has."""
        spans, start = [], 0
        for block in self.blocks:
            if block.group == group:
                spans.append((start, start + block.extent))
            start += block.extent
        return tuple(spans)

    def __str__(self) -> str:
        if [block.group for block in self.blocks] == list(range(len(self.blocks))):
            inside = ",".join(str(block.extent) for block in self.blocks)
        else:
            inside = ",".join(f"{block.group}:{block.extent}" for block in self.blocks)
        return f"split{self.dim}({inside})"


Across = Literal["dup", "partial"] | SplitAcross


@dataclass(frozen=True)
class Layout:
    """An array over one group of devices, or over several with a top tier across them.

    Attributes:
      groups: disjoint.
      across: "dup", every group has the whole; "partial", the array is the sum of the
        groups' arrays; or a SplitAcross. One group has "dup".

    >>> layout = Layout((Group((0, 1), (Split(0, 2),)), Group((2,))), "partial")
    >>> str(layout), layout.terms
    ('[0,1]{split0:2} + [2]{} across partial', 2)
    """

    groups: tuple[Group, ...]
    across: Across = "dup"

    def __post_init__(self) -> None:
        if not self.groups:
            raise SpecError("a layout has no groups; give it at least one, such as [0]{}")
        owner: dict[int, int] = {}
        for number, group in enumerate(self.groups):
            for device in group.devices:
                if device in owner:
                    raise SpecError(
                        f"device {device} is in group {owner[device]} and in group {number} of "
                        f"{self}; groups must be disjoint"
                    )
                owner[device] = number
        if self.across not in ("dup", "partial") and not isinstance(self.across, SplitAcross):
            raise SpecError(
                f"a layout is across {self.across!r}; write dup, partial or a SplitAcross"
            )
        if len(self.groups) == 1 and self.across != "dup":
            raise SpecError(
                f"{self.groups[0]} across {self.across}: one group has nothing to be across; "
                "leave `across` out, or add a group with +"
            )
        if isinstance(self.across, SplitAcross):
            named = {block.group for block in self.across.blocks}
            if named != set(range(len(self.groups))):
                raise SpecError(
                    f"across {self.across} gives blocks to groups "
                    f"{', '.join(map(str, sorted(named)))}, but the layout has groups 0 to "
                    f"{len(self.groups) - 1}; give each group its extent"
                )

    @property
    def devices(self) -> tuple[int, ...]:
        """All devices, group by group."""
        return tuple(device for group in self.groups for device in group.devices)

    @property
    def terms(self) -> int:
        """Addends of the sum that the layout is; 1 where it is no sum anywhere."""
        counts = [group.terms for group in self.groups]
        return sum(counts) if self.across == "partial" else max(counts)

    def region(self, group: int, shape: tuple[int, ...]) -> tuple[Spans, ...]:
        """The indices of each dim that a group has.

        Raises:
          SpecError: the extents across groups do not add up to the dim.
        """
        whole = tuple(((0, size),) for size in shape)
        across = self.across
        if not isinstance(across, SplitAcross):
            return whole
        if across.dim >= len(shape):
            raise SpecError(
                f"across {across} splits dim {across.dim}, but shape {shape} has {len(shape)} "
                "dims, counted from 0"
            )
        if across.extent != shape[across.dim]:
            raise SpecError(
                f"the extents of `across {across}` add up to {across.extent}, but dim "
                f"{across.dim} of shape {shape} has {shape[across.dim]} indices; make them equal"
            )
        return (*whole[: across.dim], across.spans_of(group), *whole[across.dim + 1 :])

    def pieces(self, shape: tuple[int, ...]) -> tuple[tuple[Piece, ...], ...]:
        """What each device holds, group by group.

        Raises:
          SpecError: the layout does not fit this shape.

        >>> layout = Layout((Group((0,)), Group((1,))), SplitAcross(0, (Block(0, 5), Block(1, 3))))
        >>> [piece.spans for group in layout.pieces((8,)) for piece in group]
        [(((0, 5),),), (((5, 8),),)]
        """
        return _pieces(self, tuple(shape))

    def with_group(self, number: int, group: Group) -> Layout:
        """The layout with another group in one place."""
        groups = (*self.groups[:number], group, *self.groups[number + 1 :])
        return replace(self, groups=groups)

    def __str__(self) -> str:
        text = " + ".join(map(str, self.groups))
        return text if len(self.groups) == 1 else f"{text} across {self.across}"


@lru_cache(maxsize=4096)
def _pieces(layout: Layout, shape: tuple[int, ...]) -> tuple[tuple[Piece, ...], ...]:
    if any(size < 1 for size in shape):
        raise SpecError(f"shape {shape} has a dim without indices; write sizes of 1 or more")
    return tuple(
        group.pieces(shape, layout.region(number, shape))
        for number, group in enumerate(layout.groups)
    )


def _length(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)


def _cut(spans: Spans, part: int, parts: int) -> Spans:
    """One of some equal parts of a dim's indices, taken in order."""
    if parts == 1:
        return spans
    size = _length(spans) // parts
    low, high = part * size, (part + 1) * size
    out, seen = [], 0
    for start, stop in spans:
        first, last = max(low - seen, 0), min(high - seen, stop - start)
        if first < last:
            out.append((start + first, start + last))
        seen += stop - start
    return tuple(out)


def _instead(size: int, parts: int) -> str:
    fewer = [d for d in range(2, parts) if size % d == 0]
    advice = f"split it {fewer[-1]} ways, or " if fewer else ""
    return f"{advice}give it {-(-size // parts) * parts} indices"
