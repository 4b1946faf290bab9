"""Layouts become PartitionSpecs and NamedShardings; nothing else in shardpar builds them."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardpar.spec.layout import Axes, GroupLayout


def partition_spec(dims: tuple[Axes, ...], stacked: int = 0) -> PartitionSpec:
    """The spec of a layout's dims, behind `stacked` leading dims that nothing splits.

    >>> tuple(partition_spec((("a",), (), ("b", "c"))))
    ('a', None, ('b', 'c'))
    """
    entries = [axes[0] if len(axes) == 1 else axes or None for axes in dims]
    return PartitionSpec(*([None] * stacked), *entries)


def named_sharding(mesh: Mesh, layout: GroupLayout, stacked: int = 0) -> NamedSharding:
    """The NamedSharding that lays an array out this way."""
    return NamedSharding(mesh, partition_spec(layout.dims, stacked))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axes: Axes, stacked: int = 0) -> NamedSharding:
    """Sequences split over `axes`; `stacked` leading dims (micro-batches) are not."""
    return NamedSharding(mesh, partition_spec((axes,), stacked))


def constrain(x: jax.Array, sharding: NamedSharding | None) -> Any:
    """Asks XLA to lay a value out this way; None leaves it free."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
