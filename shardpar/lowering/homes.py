"""Which groups of devices hold each array of a state, and how: a layout for every leaf.

An array that several groups hold, because pipelines are copies of one another or a layer
reads another stage's parameter, is one array over a union of groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from shardpar.lowering.shardings import group_of
from shardpar.lowering.state import TrainState
from shardpar.lowering.transfer import Transfer
from shardpar.lowering.union import UnionArray
from shardpar.lowering.wires import rehomed
from shardpar.spec.layout import Across, Layout
from shardpar.spec.reshard import Tensor, fuse


@dataclass(frozen=True, eq=False)
class Home:
    """Where one array of the state lives.

    Attributes:
      groups: numbers of the groups that hold it, the first counts as the original.
      shapes: one for each of them, with its sharding.
      layout: of the whole, a copy in each group.
    """

    groups: tuple[int, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    layout: Layout

    @classmethod
    def of(
        cls,
        groups: tuple[int, ...],
        shapes: tuple[jax.ShapeDtypeStruct, ...],
        devices: Sequence[jax.Device],
    ) -> Home:
        """From the shardings in the groups."""
        return cls(groups, shapes, Layout(tuple(group_of(s.sharding, devices) for s in shapes)))

    def across(self, what: Across) -> Layout:
        """The same groups with another top tier; one group has none."""
        return self.layout if len(self.groups) == 1 else Layout(self.layout.groups, what)

    def union(self, arrays: Sequence[jax.Array], across: Across = "dup") -> UnionArray:
        """The groups' arrays as one."""
        return UnionArray(tuple(arrays), self.across(across), tuple(self.shapes[0].shape))

    def settled(self, union: UnionArray) -> UnionArray:
        """The same pieces under the shardings that the groups' programs are compiled for."""
        arrays = [
            rehomed(array, shape.sharding)
            for array, shape in zip(union.arrays, self.shapes, strict=True)
        ]
        return UnionArray(tuple(arrays), union.layout, union.shape)


class Homes:
    """The state of a plan of several groups: one tree of unions, or one tree for each group.

    Attributes:
      parts: what each group holds.
      leaves: the home of each leaf of the whole state, by its path.
    """

    def __init__(
        self, whole: TrainState, parts: Sequence[TrainState], devices: Sequence[jax.Device]
    ) -> None:
        """Finds out who holds what.

        Args:
          whole: the shapes of the whole state.
          parts: what each group holds of it, with shardings.
          devices: of the cluster, in order.
        """
        self.parts = tuple(parts)
        self._paths, self._whole = _flatten(whole)
        self._part_paths, self._structures = [], []
        held: dict[str, list[tuple[int, Any]]] = {path: [] for path in self._paths}
        for number, part in enumerate(parts):
            leaves, structure = _flatten(part)
            self._part_paths.append(list(leaves))
            self._structures.append(structure)
            for path, leaf in leaves.items():
                held[path].append((number, leaf))
        self.leaves: dict[str, Home] = {}
        for path, owners in held.items():
            numbers, shapes = zip(*owners, strict=True)
            self.leaves[path] = Home.of(numbers, shapes, devices)

    def joined(self, parts: Sequence[TrainState]) -> TrainState:
        """One tree of unions, from the arrays of each group."""
        arrays: dict[str, list[jax.Array]] = {path: [] for path in self._paths}
        for part in parts:
            for path, leaf in _flatten(part)[0].items():
                arrays[path].append(leaf)
        return self.tree({path: home.union(arrays[path]) for path, home in self.leaves.items()})

    def split(self, state: TrainState) -> list[TrainState]:
        """The arrays of each group, from one tree of unions."""
        held: list[dict[str, Any]] = [{} for _ in self.parts]
        for path, union in self.named(state).items():
            for number, array in zip(self.leaves[path].groups, union.arrays, strict=True):
                held[number][path] = array
        return [
            structure.unflatten([mine[path] for path in paths])
            for mine, paths, structure in zip(held, self._part_paths, self._structures, strict=True)
        ]

    def moved(self, arrays: Mapping[str, UnionArray], devices: Sequence[jax.Device]) -> TrainState:
        """A whole state brought home from wherever its arrays lie, in one fused reshard.

        Args:
          arrays: by the path of the leaf; their memory is given back.
          devices: of the cluster, in order.
        """
        layouts = {path: self.leaves[path].layout for path in arrays}
        moved = move(arrays, layouts, devices)
        settled = {path: self.leaves[path].settled(union) for path, union in moved.items()}
        return self.tree(settled)  # type: ignore[no-any-return]

    def tree(self, leaves: Mapping[str, Any]) -> Any:
        """Leaves by path as a state."""
        return self._whole.unflatten([leaves[path] for path in self._paths])

    def named(self, state: TrainState) -> dict[str, Any]:
        """The leaves of a state by path."""
        leaves = self._whole.flatten_up_to(state)
        return dict(zip(self._paths, leaves, strict=True))


def move(
    arrays: Mapping[str, UnionArray],
    layouts: Mapping[str, Layout],
    devices: Sequence[jax.Device],
    *,
    donate: bool = True,
) -> dict[str, UnionArray]:
    """Brings arrays into layouts in one fused reshard; random keys travel as their bits."""
    bits = {path: _bits_of(a) if _is_key(a) else a for path, a in arrays.items()}
    tensors = [
        Tensor(a.layout, layouts[path], tuple(a.shape), a.dtype.itemsize)
        for path, a in bits.items()
    ]
    transfer = Transfer(fuse(tensors), [a.dtype for a in bits.values()], devices)
    moved = dict(zip(bits, transfer(list(bits.values()), donate=donate), strict=True))
    for path, array in arrays.items():
        if _is_key(array):
            wrapped = tuple(
                jax.random.wrap_key_data(x, impl=array.dtype) for x in moved[path].arrays
            )
            moved[path] = UnionArray(wrapped, layouts[path], array.shape)
    return moved


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
