"""The axes of a group's mesh before and after a change, side by side, and the sums along them."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from shardpar.spec.layout import Entry, Group, Partial, Split


def common_axes(a: Sequence[Entry], b: Sequence[Entry]) -> list[tuple[Entry, Entry]] | None:
    """Two groups' axes cut to one mesh: (before, after) per axis; None if there is no such mesh.

    >>> from shardpar.spec.layout import Replicate
    >>> common_axes((Split(0, 4),), (Split(0, 2), Replicate(2)))
    [(Split(dim=0, parts=2), Split(dim=0, parts=2)), (Split(dim=0, parts=2), Replicate(parts=2))]
    """
    left, right, out = list(a), list(b), []
    while left and right:
        x, y = left.pop(0), right.pop(0)
        size = math.gcd(x.parts, y.parts)
        if size != min(x.parts, y.parts):
            return None
        out.append((replace(x, parts=size), replace(y, parts=size)))
        if x.parts > size:
            left.insert(0, replace(x, parts=x.parts // size))
        if y.parts > size:
            right.insert(0, replace(y, parts=y.parts // size))
    return None if left or right else out


def along(
    devices: Sequence[int], sizes: Sequence[int], axes: Sequence[int]
) -> list[tuple[int, ...]]:
    """Devices in groups that differ only along some axes of their mesh.

    >>> along((0, 1, 2, 3), (2, 2), (0,))
    [(0, 2), (1, 3)]
    """
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for device, place in zip(
        devices, itertools.product(*(range(size) for size in sizes)), strict=True
    ):
        groups[tuple(i for axis, i in enumerate(place) if axis not in axes)].append(device)
    return [tuple(group) for group in groups.values()]


Reduction = tuple[str, tuple[int, ...], tuple[int, ...]]


def reductions(before: Group, after: Group, size: int) -> list[Reduction]:
    """The collectives that add up a group's addends: (kind, devices, elements each receives).

    Args:
      before: the group with its addends.
      after: the group without, as `reduces_to` allows.
      size: elements a device holds before.
    """
    pairs = common_axes(before.entries, after.entries)
    assert pairs is not None
    sizes = [a.parts for a, _ in pairs]
    changed = [i for i, (a, b) in enumerate(pairs) if a != b]
    scatter = [i for i in changed if isinstance(pairs[i][1], Split)]
    gather = [i for i in changed if i not in scatter]
    out: list[Reduction] = []
    if scatter:
        parts = math.prod(sizes[i] for i in scatter)
        for devices in along(before.devices, sizes, scatter):
            out.append(("reduce-scatter", devices, (size - size // parts,) * parts))
        size //= parts
    if gather:
        for devices in along(before.devices, sizes, gather):
            out.append(("all-reduce", devices, ring_all_reduce(size, len(devices))[1]))
    return out


def ring_all_reduce(size: int, members: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Elements each member of a ring sends and receives to sum `size` elements everywhere.

    >>> ring_all_reduce(8, 2)
    ((8, 8), (8, 8))
    """
    chunk = [size // members + (i < size % members) for i in range(members)]
    sent = tuple(
        2 * size - chunk[(i + 1) % members] - chunk[(i + 2) % members] for i in range(members)
    )
    received = tuple(2 * size - chunk[i] - chunk[(i + 1) % members] for i in range(members))
    return sent, received


def reduces_to(before: Group, after: Group) -> bool:
    """Whether a group becomes another by adding up over some of its axes and nothing else."""
    if before.devices != after.devices or before == after:
        return False
    pairs = common_axes(before.entries, after.entries)
    if pairs is None:
        return False
    changed = [(a, b) for a, b in pairs if a != b]
    keeps = [a for a, b in pairs if isinstance(a, Partial) and a == b]
    if not all(isinstance(a, Partial) and not isinstance(b, Partial) for a, b in changed):
        return False
    if keeps and any(isinstance(b, Split) for _, b in changed):
        return False
    # Of the addends, the slow axes' stay apart: that is how they are counted after.
    partial = [(a, b) for a, b in pairs if isinstance(a, Partial)]
    kept = [a == b for a, b in partial]
    return bool(changed) and kept == sorted(kept, reverse=True) and _splits_last(pairs)


def _splits_last(pairs: Sequence[tuple[Entry, Entry]]) -> bool:
    """Whether each new split of a dim is finer than the splits that were there."""
    new: set[int] = set()
    for before, after in pairs:
        if before != after and isinstance(after, Split):
            new.add(after.dim)
        elif isinstance(after, Split) and after.dim in new:
            return False
    return True
