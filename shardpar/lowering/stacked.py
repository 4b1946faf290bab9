"""The state of equal stages as one tree over all devices: what is alike in each is stacked.

A stage's part of the state is a tree on the stage's own devices. The parts are alike but for
the names of the stages' own parameters, so all of them are one tree: arrays of which each stage
has its own get one more dim, over the stages, and the others are copies. Nothing is sent when
one becomes the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh

from shardpar.lowering.elsewhere import absent, in_order, is_here
from shardpar.lowering.homes import Homes
from shardpar.lowering.shardings import stacked_over
from shardpar.lowering.state import named_by
from shardpar.lowering.union import UnionArray


class Stacked:
    """A tree of stages, stacked.

    Attributes:
      parts: each stage's tree of shapes, with shardings on the stage's devices.
      shapes: the stacked tree's, with shardings on all devices; its names are those of the
        first stage.
      own: the same tree of whether each stage has its own.
    """

    def __init__(
        self, parts: Sequence[Any], names: Mapping[str, tuple[str, ...]], mesh: Mesh, axis: str
    ) -> None:
        """Nothing is moved yet.

        Args:
          parts: shapes of each stage's tree.
          names: of each parameter of the first stage that is its own, those of all stages.
          mesh: of all stages, whose first axis is `axis`.
          axis: over the stages.
        """
        self.parts = tuple(parts)
        self._here = [is_here(list(row)) for row in mesh.devices.reshape(len(parts), -1)]
        flat, self._structure = jax.tree_util.tree_flatten_with_path(parts[0])
        self._own = [bool(named_by(path, names)) for path, _ in flat]
        # A dictionary sorts its keys, and "blocks.10" comes before "blocks.9": by name, then.
        self._places = []
        for s, part in enumerate(parts):
            place = {path: n for n, path in enumerate(_paths(part))}
            self._places.append([place[_renamed(path, names, s)] for path, _ in flat])
        leaves = [
            jax.ShapeDtypeStruct(
                (len(parts), *leaf.shape) if own else leaf.shape,
                leaf.dtype,
                sharding=stacked_over(mesh, leaf.sharding, axis if own else None),
            )
            for (_, leaf), own in zip(flat, self._own, strict=True)
        ]
        self.shapes = self._structure.unflatten(leaves)
        self.own = self._structure.unflatten(self._own)

    def split(self, whole: Any) -> list[Any]:
        """Each stage's tree, from the stacked one; what is not stacked shares its memory."""
        leaves = self._structure.flatten_up_to(whole)
        out = []
        for s, (part, places) in enumerate(zip(self.parts, self._places, strict=True)):
            if not self._here[s]:
                out.append(absent(part))
                continue
            shapes, structure = jax.tree.flatten(part)
            mine = {
                place: _on(leaf, shapes[place], own)
                for leaf, own, place in zip(leaves, self._own, places, strict=True)
            }
            stacked = self._stacked_places(s)
            firsts = self._first[s]([mine[place] for place in stacked])
            mine.update(zip(stacked, firsts, strict=True))
            out.append(structure.unflatten([mine[n] for n in range(len(shapes))]))
        return out

    def join(self, parts: Sequence[Any]) -> Any:
        """The stacked tree, from each stage's."""
        pieces: list[list[jax.Array]] = [[] for _ in self._own]
        for s, (part, places) in enumerate(zip(parts, self._places, strict=True)):
            if not self._here[s]:
                continue
            mine = dict(enumerate(jax.tree.leaves(part)))
            stacked = self._stacked_places(s)
            slices = self._slice[s]([mine[place] for place in stacked])
            mine.update(zip(stacked, slices, strict=True))
            for of_leaf, place in zip(pieces, places, strict=True):
                of_leaf.append(mine[place])
        return self._structure.unflatten(
            [
                _together(of_leaf, shape)
                for of_leaf, shape in zip(pieces, jax.tree.leaves(self.shapes), strict=True)
            ]
        )

    def _stacked_places(self, s: int) -> list[int]:
        return [place for own, place in zip(self._own, self._places[s], strict=True) if own]

    @cached_property
    def _first(self) -> list[Callable[[list[Any]], list[Any]]]:
        """By stage, from slices of stacked arrays to the arrays."""
        out = []
        for s, part in enumerate(self.parts):
            leaves = jax.tree.leaves(part)
            to = [leaves[place].sharding for place in self._stacked_places(s)]
            out.append(in_order(jax.jit(lambda arrays: [x[0] for x in arrays], out_shardings=to)))
        return out

    @cached_property
    def _slice(self) -> list[Callable[[list[Any]], list[Any]]]:
        """By stage, from arrays to slices of stacked arrays."""
        out = []
        for s, part in enumerate(self.parts):
            leaves = jax.tree.leaves(part)
            to = [leaves[place].sharding for place in self._stacked_places(s)]
            to = [stacked_over(sharding.mesh, sharding, None, 1) for sharding in to]
            out.append(
                in_order(jax.jit(lambda arrays: [x[None] for x in arrays], out_shardings=to))
            )
        return out


class StackedHomes(Homes):
    """Homes of a tree that is stacked over equal stages: each stage is a group."""

    def __init__(self, whole: Any, stacked: Stacked, devices: Sequence[jax.Device]) -> None:
        """Finds out who holds what.

        Args:
          whole: the shapes of the whole tree, under the model's own names.
          stacked: how it is stacked.
          devices: of the cluster, in order.
        """
        super().__init__(whole, stacked.parts, devices)
        self.stacked = stacked

    def unions(self, whole: Any) -> dict[str, UnionArray]:
        """The leaves by path, each over the stages that hold it, from the stacked tree."""
        return super().unions(self.joined(self.stacked.split(whole)))

    def settled(self, unions: Mapping[str, UnionArray]) -> Any:
        """The stacked tree, from unions that lie here already."""
        return self.stacked.join(self.split(super().settled(unions)))


def _paths(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _renamed(path: Any, names: Mapping[str, tuple[str, ...]], s: int) -> str:
    """A leaf's path in the tree of stage s, from that in the first stage's."""
    key = jax.tree_util.DictKey
    return jax.tree_util.keystr(
        tuple(key(names[k.key][s]) if isinstance(k, key) and k.key in names else k for k in path)
    )


def _is_key(x: Any) -> bool:
    return bool(jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key))


def _on(leaf: jax.Array, shape: jax.ShapeDtypeStruct, own: bool) -> jax.Array:
    """What a stage's devices hold of an array of all devices, as an array of the stage's."""
    sharding = shape.sharding
    if _is_key(leaf):
        bits = jax.random.key_data(leaf)
        bare = jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=sharding)
        return jax.random.wrap_key_data(_on(bits, bare, own), impl=leaf.dtype)
    at = {shard.device: shard.data for shard in leaf.addressable_shards}
    dims = shape.shape
    if own:
        sharding, dims = stacked_over(sharding.mesh, sharding, None, 1), (1, *dims)
    mine = [at[d] for d in sharding.mesh.devices.flat if d in at]
    return jax.make_array_from_single_device_arrays(dims, sharding, mine)


def _together(pieces: list[jax.Array], shape: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of all devices, from those of the stages."""
    if _is_key(pieces[0]):
        bits = [jax.random.key_data(x) for x in pieces]
        bare = jax.ShapeDtypeStruct(bits[0].shape, bits[0].dtype, sharding=shape.sharding)
        return jax.random.wrap_key_data(_together(bits, bare), impl=pieces[0].dtype)
    held = [shard.data for piece in pieces for shard in piece.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape.shape, shape.sharding, held)
