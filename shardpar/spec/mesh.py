"""Where every piece of an array is, inside one group of devices.

A group is a small mesh with named axes, last axis on the fastest links. A layout
gives each dim of an array the axes it is split over, major first, and names the
axes it is a partial sum over; axes not named hold copies. That is what
`jax.sharding.NamedSharding` says with `unreduced`, as a plain value
(HSPMD's bottom tier, arXiv 2504.20490).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shardpar.errors import SpecError

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Mesh:
    """Named axes with sizes; the product is the number of devices, the last axis varies fastest.

    >>> Mesh.factored(8)
    Mesh(axes=(('a', 2), ('b', 2), ('c', 2)))
    >>> Mesh.factored(12).size_of(("a", "c"))
    6
    """

    axes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        names = self.names
        if len(set(names)) != len(names):
            raise SpecError(f"mesh {self}: an axis is named twice")
        for name, size in self.axes:
            if not name.isidentifier():
                raise SpecError(f"mesh: {name!r} is not an axis name; write a letter or a word")
            if size < 1:
                raise SpecError(f"mesh: axis {name} has size {size}; write 1 or more")

    @classmethod
    def factored(cls, devices: int) -> Mesh:
        """A mesh of prime factors, largest first, named a, b, c, …

        A layer's degrees are sets of these axes, so layers with different degrees
        live on one mesh.
        """
        if devices < 1:
            raise SpecError(f"a mesh needs at least one device; got {devices}")
        factors, rest, prime = [], devices, 2
        while rest > 1:
            while rest % prime == 0:
                factors.append(prime)
                rest //= prime
            prime += 1
        return cls.of_sizes(sorted(factors, reverse=True))

    @classmethod
    def of_sizes(cls, sizes: Iterable[int]) -> Mesh:
        """A mesh whose axes are named a, b, c, … in order.

        >>> Mesh.of_sizes((4, 2))
        Mesh(axes=(('a', 4), ('b', 2)))
        """
        names = (
            "".join(letters)
            for length in itertools.count(1)
            for letters in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=length)
        )
        return cls(tuple(zip(names, sizes, strict=False)))

    @property
    def names(self) -> Axes:
        """The axes' names, slowest links first."""
        return self._names

    @property
    def sizes(self) -> tuple[int, ...]:
        """The axes' sizes, slowest links first."""
        return tuple(size for _, size in self.axes)

    @functools.cached_property
    def _names(self) -> Axes:
        return tuple(name for name, _ in self.axes)

    @functools.cached_property
    def _size_of_axis(self) -> dict[str, int]:
        return dict(self.axes)

    # Of all strategies on a mesh, only so many sets of axes: the planner asks millions of times.
    @functools.cached_property
    def _sizes_known(self) -> dict[Axes, int]:
        return {}

    @functools.cached_property
    def _rests_known(self) -> dict[Axes, Axes]:
        return {}

    @property
    def num_devices(self) -> int:
        """How many devices the mesh holds."""
        return math.prod(self.sizes)

    def size_of(self, axes: Axes) -> int:
        """The product of some axes' sizes.

        Raises:
          SpecError: if an axis is not of this mesh.
        """
        known = self._sizes_known.get(axes)
        if known is not None:
            return known
        sizes = self._size_of_axis
        for axis in axes:
            if axis not in sizes:
                raise SpecError(
                    f'the mesh has no axis "{axis}"; its axes are {", ".join(self.names) or "none"}'
                )
        size = self._sizes_known[axes] = math.prod(sizes[axis] for axis in axes)
        return size

    def without(self, axes: Axes) -> Axes:
        """The axes that are not among these, in mesh order."""
        known = self._rests_known.get(axes)
        if known is None:
            known = tuple(name for name in self.names if name not in axes)
            self._rests_known[axes] = known
        return known

    def __str__(self) -> str:
        return "{" + ", ".join(f"{name}: {size}" for name, size in self.axes) + "}"


@dataclass(frozen=True)
class GroupLayout:
    """How an array lies over one mesh: per dim the axes that split it, and the partial axes.

    >>> layout = GroupLayout(Mesh.factored(8), (("a",), ("b", "c")))
    >>> layout.shard_shape((4, 12))
    (2, 3)
    >>> layout.replicas
    1
    >>> str(layout)
    'dim0/a dim1/b,c'
    """

    mesh: Mesh
    dims: tuple[Axes, ...]
    partial: Axes = ()

    def __post_init__(self) -> None:
        used = [axis for axes in (*self.dims, self.partial) for axis in axes]
        self.mesh.size_of(tuple(used))
        if len(set(used)) != len(used):
            twice = sorted({axis for axis in used if used.count(axis) > 1})
            raise SpecError(
                f"a layout uses axis {', '.join(twice)} twice: {self.dims}; "
                "an axis may split one dim, or be partial, once"
            )

    @property
    def replicated(self) -> Axes:
        """The axes whose devices hold the same bytes."""
        return self.mesh.without((*itertools.chain.from_iterable(self.dims), *self.partial))

    @property
    def replicas(self) -> int:
        """How many devices hold each piece."""
        return self.mesh.size_of(self.replicated)

    @property
    def shards(self) -> int:
        """Into how many different pieces the array is cut."""
        return self.mesh.size_of(tuple(itertools.chain.from_iterable(self.dims)))

    def shard_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one device's piece.

        Raises:
          SpecError: on a wrong rank or a dim its axes do not divide.
        """
        if len(shape) != len(self.dims):
            raise SpecError(
                f"layout {self} has {len(self.dims)} dims; the array's shape is {shape}"
            )
        out = []
        for dim, (size, axes) in enumerate(zip(shape, self.dims, strict=True)):
            parts = self.mesh.size_of(axes)
            if size % parts:
                raise SpecError(
                    f"dim {dim} ({size}) is not divisible by axes {','.join(axes)} ({parts})"
                )
            out.append(size // parts)
        return tuple(out)

    def slices(self, shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
        """Each device's piece of an array, in the mesh's device order.

        >>> [s[0].start for s in GroupLayout(Mesh.factored(4), (("b",),)).slices((8,))]
        [0, 4, 0, 4]
        """
        shard = self.shard_shape(shape)
        for place in itertools.product(*(range(size) for size in self.mesh.sizes)):
            at = dict(zip(self.mesh.names, place, strict=True))
            piece = []
            for size, axes in zip(shard, self.dims, strict=True):
                index = 0
                for axis in axes:
                    index = index * self.mesh.size_of((axis,)) + at[axis]
                piece.append(slice(index * size, (index + 1) * size))
            yield tuple(piece)

    def __str__(self) -> str:
        parts = [f"dim{d}/{','.join(axes)}" for d, axes in enumerate(self.dims) if axes]
        if self.partial:
            parts.append(f"partial/{','.join(self.partial)}")
        return " ".join(parts) or "replicated"
