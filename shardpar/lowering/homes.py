"""Which groups of devices hold each array of a state, and how: a layout for every leaf.

An array that several groups hold, because pipelines are copies of one another or a layer
reads another stage's parameter, is one array over a union of groups: a copy in each, or a
slice where they share it out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from shardpar.lowering.shardings import group_of
from shardpar.lowering.transfer import Transfer
from shardpar.lowering.union import UnionArray
from shardpar.lowering.wires import rehomed
from shardpar.spec.layout import Across, Layout, SplitAcross
from shardpar.spec.reshard import Reshard, Tensor, fuse
from shardpar.spec.surviving import survivors


@dataclass(frozen=True, eq=False)
class Home:
    """Where one array of the state lives.

    Attributes:
      groups: numbers of the groups that hold it, the first counts as the original.
      shapes: what each of them holds, with its sharding.
      layout: a copy in each group, or a slice.
      shape: of the whole array.
    """

    groups: tuple[int, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    layout: Layout
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        groups: tuple[int, ...],
        shapes: tuple[jax.ShapeDtypeStruct, ...],
        devices: Sequence[jax.Device],
        across: Across = "dup",
        shape: tuple[int, ...] | None = None,
    ) -> Home:
        """From the shardings in the groups.

        Args:
          groups: their numbers.
          shapes: what each holds.
          devices: of the cluster, in order.
          across: whether they hold copies or slices.
          shape: of the whole; None where they hold copies.
        """
        layout = Layout(tuple(group_of(s.sharding, devices) for s in shapes), across)
        return cls(groups, shapes, layout, tuple(shapes[0].shape if shape is None else shape))

    @property
    def is_sliced(self) -> bool:
        """Whether each group holds a slice and none a copy."""
        return self.layout.across != "dup"

    def across(self, what: Across) -> Layout:
        """The same groups with another top tier; one group has none."""
        return self.layout if len(self.groups) == 1 else Layout(self.layout.groups, what)

    def union(self, arrays: Sequence[jax.Array], across: Across | None = None) -> UnionArray:
        """The groups' arrays as one; `across` says what they are if not what lies here."""
        layout = self.layout if across is None else self.across(across)
        return UnionArray(tuple(arrays), layout, self.shape)

    def settled(self, union: UnionArray) -> UnionArray:
        """The same pieces under the shardings that the groups' programs are compiled for."""
        arrays = [
            rehomed(array, shape.sharding)
            for array, shape in zip(union.arrays, self.shapes, strict=True)
        ]
        return UnionArray(tuple(arrays), union.layout, union.shape)


class Homes:
    """A tree of arrays over several groups: one tree of unions, or one tree for each group.

    Attributes:
      parts: what each group holds.
      leaves: the home of each leaf of the whole tree, by its path.
      single: whether there is one group, and the leaves are its arrays themselves.
    """

    def __init__(
        self,
        whole: Any,
        parts: Sequence[Any],
        devices: Sequence[jax.Device],
        *,
        single: bool = False,
        slices: Mapping[str, SplitAcross] = {},
    ) -> None:
        """Finds out who holds what.

        Args:
          whole: the shapes of the whole tree.
          parts: what each group holds of it, with shardings.
          devices: of the cluster, in order.
          single: leaves are arrays, not unions.
          slices: leaves of which groups hold slices, by path.
        """
        self.parts, self.devices, self.single = tuple(parts), tuple(devices), single
        every, self._whole = _flatten(whole)
        self.paths = list(every)
        place = {path: i for i, path in enumerate(self.paths)}
        self._part_places, self._structures = [], []
        held: list[list[tuple[int, Any]]] = [[] for _ in self.paths]
        for number, part in enumerate(parts):
            leaves, structure = _flatten(part)
            self._part_places.append([place[path] for path in leaves])
            self._structures.append(structure)
            for path, leaf in leaves.items():
                held[place[path]].append((number, leaf))
        self.leaves: dict[str, Home] = {}
        for path, owners in zip(self.paths, held, strict=True):
            numbers, shapes = zip(*owners, strict=True)
            across, shape = slices.get(path, "dup"), tuple(every[path].shape)
            self.leaves[path] = Home.of(numbers, shapes, devices, across, shape)
        self._homes = list(self.leaves.values())

    def joined(self, parts: Sequence[Any]) -> Any:
        """One tree of unions, from the arrays of each group."""
        arrays: list[list[jax.Array]] = [[] for _ in self.paths]
        for part, places in zip(parts, self._part_places, strict=True):
            for place, leaf in zip(places, jax.tree.leaves(part), strict=True):
                arrays[place].append(leaf)
        return self._whole.unflatten(
            [home.union(held) for home, held in zip(self._homes, arrays, strict=True)]
        )

    def split(self, whole: Any) -> list[Any]:
        """The arrays of each group, from one tree of unions."""
        unions = self._whole.flatten_up_to(whole)
        number = [iter(union.arrays) for union in unions]
        return [
            structure.unflatten([next(number[place]) for place in places])
            for places, structure in zip(self._part_places, self._structures, strict=True)
        ]

    def unions(self, whole: Any) -> dict[str, UnionArray]:
        """The leaves of a whole tree by path."""
        leaves = self._whole.flatten_up_to(whole)
        if self.single:
            leaves = [h.union([leaf]) for h, leaf in zip(self._homes, leaves, strict=True)]
        return dict(zip(self.paths, leaves, strict=True))

    def settled(self, unions: Mapping[str, UnionArray]) -> Any:
        """A whole tree from unions that lie here already, under the shardings of the programs."""
        leaves = [home.settled(unions[path]) for path, home in self.leaves.items()]
        return self._whole.unflatten([x.arrays[0] for x in leaves] if self.single else leaves)

    def first_copies(self, whole: Any) -> Any:
        """A whole tree with one array per leaf: its first copy, or the first group's slice."""
        return self._whole.unflatten([union.arrays[0] for union in self.unions(whole).values()])

    def first_shapes(self) -> Any:
        """Where the first copies lie."""
        return self._whole.unflatten([home.shapes[0] for home in self._homes])


class Move:
    """Brings arrays into the layouts of other homes in one fused reshard, any number of times.

    What it does is found out with the first arrays and kept. Random keys travel as their bits.
    """

    def __init__(self, go: Mapping[str, Layout], devices: Sequence[jax.Device]) -> None:
        self.go, self.devices = dict(go), tuple(devices)
        self._transfer: Transfer | None = None

    def __call__(
        self, arrays: Mapping[str, UnionArray], *, donate: bool = True
    ) -> dict[str, UnionArray]:
        """The arrays in their new layouts.

        Args:
          arrays: by path; the same shapes, dtypes and layouts as in the first call.
          donate: give the memory of the old ones back. It is given back when all have
            arrived: if that fails, the old ones are as they were.
        """
        bits = {path: _bits_of(a) if _is_key(a) else a for path, a in arrays.items()}
        if self._transfer is None:
            tensors = [
                Tensor(a.layout, self.go[path], tuple(a.shape), a.dtype.itemsize)
                for path, a in bits.items()
            ]
            dtypes = [a.dtype for a in bits.values()]
            self._transfer = Transfer(fuse(tensors), dtypes, self.devices)
        moved = dict(zip(bits, self._transfer(list(bits.values()), donate=donate), strict=True))
        return self._as_keys(moved, arrays)

    def without(
        self, lost: Collection[int], arrays: Mapping[str, UnionArray]
    ) -> tuple[dict[str, UnionArray], tuple[str, ...]]:
        """The arrays in their new layouts, from the pieces that other devices hold.

        Args:
          lost: devices whose pieces are not read.
          arrays: by path; they are left as they are.

        Returns:
          The arrays that can be had, and the paths of those that cannot.
        """
        bits = {path: _bits_of(a) if _is_key(a) else a for path, a in arrays.items()}
        tensors = [
            Tensor(a.layout, self.go[path], tuple(a.shape), a.dtype.itemsize)
            for path, a in bits.items()
        ]
        found = survivors(tensors, lost)
        paths = list(bits)
        there = [paths[i] for i in found.whole]
        program = Transfer(found.reshard, [bits[p].dtype for p in there], self.devices)
        moved = dict(zip(there, program([bits[p] for p in there]), strict=True))
        return self._as_keys(moved, arrays), tuple(paths[i] for i, _ in found.missing)

    def _as_keys(
        self, moved: dict[str, UnionArray], arrays: Mapping[str, UnionArray]
    ) -> dict[str, UnionArray]:
        for path, bits in list(moved.items()):
            keys = arrays[path]
            if _is_key(keys):
                wrapped = tuple(jax.random.wrap_key_data(x, impl=keys.dtype) for x in bits.arrays)
                moved[path] = UnionArray(wrapped, self.go[path], keys.shape)
        return moved

    @property
    def resolved(self) -> Reshard | None:
        """What it sends, once it has been used."""
        return None if self._transfer is None else self._transfer.resolved


def _bits_of(keys: UnionArray) -> UnionArray:
    bits = tuple(jax.random.key_data(x) for x in keys.arrays)
    return UnionArray(bits, keys.layout, (*keys.shape, *bits[0].shape[keys.arrays[0].ndim :]))


def _is_key(array: UnionArray) -> bool:
    return bool(jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key))


def _flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, UnionArray)
    )
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, structure
