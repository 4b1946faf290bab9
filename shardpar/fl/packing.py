"""A client's tree of sums as one vector modulo 2^32, and back: what secure aggregation adds up.

The weight and the loss are in the vector, each with a scale of its own, so that the aggregator
learns their sums alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from shardpar.errors import SpecError
from shardpar.fl.fixed import FixedPoint
from shardpar.fl.secagg_options import SecAggOptions
from shardpar.fl.streams import Randomness

Tree = Any


@dataclass(frozen=True)
class Part:
    """One array of the tree.

    Attributes:
      path: where it is.
      shape: its shape.
      codec: how its values become integers.
    """

    path: str
    shape: tuple[int, ...]
    codec: FixedPoint

    @property
    def words(self) -> int:
        """How many values it has."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Packing:
    """How a tree lies in a vector; the same at all parties, who agree on tree and options.

    >>> tree = {"delta": {"w": np.float32([1, -2])}, "weight": np.float32(2)}
    >>> packing = Packing.of(tree, clients=3, options=SecAggOptions())
    >>> packing.words
    3
    >>> packing.decode(packing.encode(tree) + packing.encode(tree))["delta"]["w"]
    array([ 2., -4.])
    """

    parts: tuple[Part, ...]
    tree: Any

    @classmethod
    def of(cls, tree: Tree, *, clients: int, options: SecAggOptions) -> Packing:
        """The packing of such trees.

        Args:
          tree: what an algorithm's `client` returns, or its shapes: a dict of sums already
            multiplied by the client's weight, among them "weight" and "loss".
          clients: at most so many are added up.
          options: the ranges of values.

        Raises:
          SpecError: too many clients for 32 bits.
        """
        ranges = {
            "weight": options.most_weight,
            "loss": options.most_loss * options.most_weight,
        }
        most = options.clip * options.most_weight
        leaves, structure = jax.tree.flatten_with_path(tree)
        parts = []
        for path, leaf in leaves:
            limit = ranges.get(str(getattr(path[0], "key", "")), most)
            name = jax.tree_util.keystr(path)
            parts.append(Part(name, tuple(leaf.shape), FixedPoint.of(limit, clients, options.bits)))
        return cls(tuple(parts), structure)

    @property
    def words(self) -> int:
        """Of the vector."""
        return sum(part.words for part in self.parts)

    def encode(self, tree: Tree, random: Randomness | None = None) -> np.ndarray:
        """A tree as uint32 [words]; `random` rounds at random, None to the nearest.

        Raises:
          SpecError: another tree than was agreed on, a value that is not finite, or a weight beyond
            the largest, which is not cut in silence.
        """
        leaves, structure = jax.tree.flatten(tree)
        if structure != self.tree:
            raise SpecError(f"an update {structure} where {self.tree} was agreed on")
        vector = np.empty(self.words, np.uint32)
        start = 0
        for part, leaf in zip(self.parts, leaves, strict=True):
            values = np.asarray(leaf)
            if values.shape != part.shape:
                raise SpecError(f"{part.path} is {values.shape} where {part.shape} was agreed on")
            if part.path == "['weight']" and part.codec.cut(values):
                raise SpecError(
                    f"a client's weight is {values}; set secagg most_weight to more than "
                    f"{part.codec.limit:g} at all parties"
                )
            vector[start : start + part.words] = part.codec.encode(values, random).ravel()
            start += part.words
        return vector

    def decode(self, total: np.ndarray) -> Tree:
        """The tree of sums, float64, of a sum of vectors modulo 2^32."""
        leaves, start = [], 0
        for part in self.parts:
            piece = total[start : start + part.words].reshape(part.shape)
            leaves.append(part.codec.decode(piece))
            start += part.words
        return jax.tree.unflatten(self.tree, leaves)

    def rounded(self, tree: Tree) -> Tree:
        """What `encode` keeps of a tree, as int32 from inside a compiled program.

        Added up with wrap-around these are the integers that `decode` reads, so that a simulation
        comes to the very sums that masked clients do.
        """
        leaves = jax.tree.leaves(tree)
        pairs = zip(self.parts, leaves, strict=True)
        return jax.tree.unflatten(self.tree, [part.codec.integers(leaf) for part, leaf in pairs])

    def read(self, integers: Mapping[str, Any]) -> Tree:
        """The tree of sums, float64, of a sum of what `rounded` makes."""
        leaves = [np.asarray(leaf).view(np.uint32) for leaf in jax.tree.leaves(integers)]
        pairs = zip(self.parts, leaves, strict=True)
        return jax.tree.unflatten(self.tree, [part.codec.decode(leaf) for part, leaf in pairs])
