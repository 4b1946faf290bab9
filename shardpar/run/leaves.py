"""Decides what the arrays of a state are called on disk, and whether two states agree.

Names come from the path to a leaf (`params/blocks/0/kernel`, `optimizer/0/mu/embed`), not
from the classes around it, so a state can be restored into other containers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import jax

from shardpar.errors import CheckpointError
from shardpar.run.manifest import ArrayRecord

# A tree of arrays, or of anything that has their shape and dtype.
Tree: TypeAlias = Any

_SHOWN_DIFFERENCES = 4


class Leaf(Protocol):
    """What an array and a `jax.ShapeDtypeStruct` have in common."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dims."""
        ...

    @property
    def dtype(self) -> Any:
        """Its element type; `key<...>` for random keys."""
        ...


def named_leaves(tree: Tree) -> tuple[dict[str, Any], jax.tree_util.PyTreeDef]:
    """Flattens a state into arrays by name.

    Args:
      tree: dicts, registered dataclasses and NamedTuples with arrays as leaves.

    Returns:
      The leaves by name, in the tree's own order, and what rebuilds the tree from them.

    Raises:
      CheckpointError: a leaf is no array, or two leaves would share a name.

    >>> import numpy as np
    >>> list(named_leaves({"params": {"w": np.ones(2)}, "moments": (np.ones(2),)})[0])
    ['moments/0', 'params/w']
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves: dict[str, Any] = {}
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "state"
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise CheckpointError(
                f"the state's leaf {name} is a {type(leaf).__name__}, not an array; "
                "wrap it in jax.numpy.asarray or keep it out of the state"
            )
        if name in leaves:
            raise CheckpointError(
                f"two leaves of the state are both called {name}; rename a key that contains '/'"
            )
        leaves[name] = leaf
    return leaves, structure


def record(leaf: Leaf) -> ArrayRecord:
    """Says what a leaf is, in the words of the manifest.

    Args:
      leaf: an array, or its shape and dtype.

    Returns:
      Its entry in the manifest.

    >>> import jax.numpy as jnp
    >>> print(record(jnp.zeros((2, 3), jnp.bfloat16)), record(jax.random.key(0)))
    bfloat16[2,3] key<fry>[]
    """
    return ArrayRecord(tuple(leaf.shape), str(leaf.dtype))


def is_key(leaf: Leaf) -> bool:
    """Whether a leaf holds typed random keys, whose bits are reached by `jax.random.key_data`.

    Args:
      leaf: an array, or its shape and dtype.

    Returns:
      True for what `jax.random.key` makes, False for anything else.
    """
    return bool(jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def require_equal(
    stored: Mapping[str, ArrayRecord],
    wanted: Mapping[str, ArrayRecord],
    *,
    where: str,
    partial: bool,
) -> None:
    """Refuses to restore a state into one of another shape.

    Args:
      stored: what the checkpoint holds.
      wanted: what the target asks for.
      where: names the checkpoint in the error.
      partial: whether the target may leave out arrays that are stored.

    Raises:
      CheckpointError: they differ; the first few differences are named.
    """
    found = list(_differences(stored, wanted, partial=partial))
    if not found:
        return
    rest = len(found) - _SHOWN_DIFFERENCES
    shown = "; ".join(found[:_SHOWN_DIFFERENCES]) + (f"; and {rest} more" if rest > 0 else "")
    raise CheckpointError(
        f"{where} holds another model or optimizer than this run wants: {shown}. "
        "Train with the config stored beside it, or start a new run."
    )


def _differences(
    stored: Mapping[str, ArrayRecord], wanted: Mapping[str, ArrayRecord], *, partial: bool
) -> Iterator[str]:
    for name, want in wanted.items():
        have = stored.get(name)
        if have is None:
            yield f"{name} is not stored (wanted {want})"
        elif have != want:
            yield f"{name} is {have}, wanted {want}"
    if not partial:
        for name, have in stored.items():
            if name not in wanted:
                yield f"{name} is stored ({have}) but not wanted"
