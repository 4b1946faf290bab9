"""Random layouts of small arrays, and what NumPy says that a layout holds."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace

import numpy as np

from shardpar.errors import SpecError
from shardpar.lowering.union import UnionArray, take
from shardpar.spec.layout import (
    Block,
    Entry,
    Group,
    Layout,
    Partial,
    Piece,
    Replicate,
    Split,
    SplitAcross,
)

SHAPES = ((24,), (12, 8), (16, 6), (4, 6, 8), (8, 12), (12, 4, 4))


def random_layout(draw: random.Random, shape: tuple[int, ...], devices: int = 8) -> Layout:
    """Any layout that fits the shape: all tiers, unequal extents, copies and addends."""
    while True:
        try:
            layout = _attempt(draw, shape, devices)
            layout.pieces(shape)
        except SpecError:
            continue
        return layout


def _attempt(draw: random.Random, shape: tuple[int, ...], devices: int) -> Layout:
    pool = list(range(devices))
    draw.shuffle(pool)
    groups = []
    for _ in range(draw.choice((1, 1, 2, 2, 3))):
        size = draw.choice((1, 2, 2, 3, 4, 4, 6, 8))
        if size > len(pool):
            break
        members, pool = pool[:size], pool[size:]
        if draw.random() < 0.7:
            members.sort()
        groups.append(Group(tuple(members), _entries(draw, size, len(shape))))
    if len(groups) < 2:
        return Layout(tuple(groups or [Group((pool[0],))]))
    tier = draw.choice(("dup", "partial", "split"))
    if tier != "split":
        return Layout(tuple(groups), tier)
    return Layout(tuple(groups), _across(draw, shape, len(groups)))


def _entries(draw: random.Random, size: int, rank: int) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    while size > 1:
        parts = draw.choice([p for p in range(2, size + 1) if size % p == 0])
        size //= parts
        kind = draw.choice(("split", "split", "split", "dup", "partial"))
        if kind == "split":
            entries.append(Split(draw.randrange(rank), parts))
        else:
            entries.append(Replicate(parts) if kind == "dup" else Partial(parts))
    return tuple(entries)


def _across(draw: random.Random, shape: tuple[int, ...], groups: int) -> SplitAcross:
    dim = draw.randrange(len(shape))
    count = draw.choice((groups, groups, 2 * groups))
    if shape[dim] < count:
        count = groups
    cuts = sorted(draw.sample(range(1, shape[dim]), count - 1))
    extents = [b - a for a, b in zip([0, *cuts], [*cuts, shape[dim]], strict=True)]
    return SplitAcross(dim, tuple(Block(i % groups, n) for i, n in enumerate(extents)))


def twin(draw: random.Random, layout: Layout, shape: tuple[int, ...]) -> Layout:
    """A layout on the same groups, now and then the very same."""
    if draw.random() < 0.3:
        return layout
    for _ in range(400):
        other = random_layout(draw, shape)
        if [len(g.devices) for g in other.groups] == [len(g.devices) for g in layout.groups]:
            groups = tuple(
                Group(mine.devices, theirs.entries)
                for mine, theirs in zip(layout.groups, other.groups, strict=True)
            )
            return Layout(groups, other.across)
    return layout


def random_pair(draw: random.Random) -> tuple[Layout, Layout, tuple[int, ...]]:
    """Two layouts and a shape that both fit; often on the same groups, as collectives are."""
    shape = draw.choice(SHAPES)
    src = random_layout(draw, shape)
    how = draw.random()
    if how < 0.4:
        return src, twin(draw, src, shape), shape
    if how < 0.7 and len(src.groups) > 1:
        # Only what holds across the groups changes.
        for _ in range(50):
            dst = replace(
                src, across=draw.choice(("dup", "partial", _across(draw, shape, len(src.groups))))
            )
            with contextlib.suppress(SpecError):
                dst.pieces(shape)
                return src, dst, shape
    return src, random_layout(draw, shape), shape


def addends(layout: Layout, value: np.ndarray, seed: int = 0) -> list[list[np.ndarray]]:
    """Arrays of the whole's shape, per group and term, whose sum is the value."""
    rng = np.random.default_rng(seed)

    def parts(total: np.ndarray, count: int) -> list[np.ndarray]:
        some = [rng.integers(-9, 9, value.shape).astype(value.dtype) for _ in range(count - 1)]
        return [*some, (total - sum(some)).astype(value.dtype)]

    if layout.across == "partial":
        totals = parts(value, len(layout.groups))
    else:
        totals = [value] * len(layout.groups)
    return [parts(t, g.terms) for t, g in zip(totals, layout.groups, strict=True)]


def numpy_pieces(layout: Layout, value: np.ndarray, seed: int = 0) -> dict[int, np.ndarray]:
    """What each device holds."""
    terms = addends(layout, value, seed)
    return {
        piece.device: take(terms[number][piece.term], piece)
        for number, pieces in enumerate(layout.pieces(value.shape))
        for piece in pieces
    }


def whole(layout: Layout, shape: tuple[int, ...], held: dict[int, np.ndarray]) -> np.ndarray:
    """The array that some pieces are; fails where copies differ or something is missing."""
    dtype = next(iter(held.values())).dtype
    totals = []
    for pieces in layout.pieces(shape):
        terms: dict[int, list[Piece]] = {}
        for piece in pieces:
            terms.setdefault(piece.term, []).append(piece)
        total = np.zeros(shape, dtype)
        covered = np.zeros(shape, bool)
        for of_term in terms.values():
            addend, seen = np.zeros(shape, dtype), np.zeros(shape, bool)
            for piece in of_term:
                index = np.ix_(*[np.concatenate([np.arange(*s) for s in d]) for d in piece.spans])
                part = held[piece.device]
                assert part.shape == tuple(len(i.ravel()) for i in index)
                again = seen[index]
                assert np.array_equal(addend[index][again], part[again]), "copies differ"
                addend[index], seen[index] = part, True
            total, covered = total + addend, seen
        totals.append((total, covered))
    if layout.across == "partial":
        assert all(covered.all() for _, covered in totals)
        return sum(total for total, _ in totals)
    out, seen = np.zeros(shape, dtype), np.zeros(shape, bool)
    for total, covered in totals:
        both = covered & seen
        assert np.array_equal(out[both], total[both]), "groups differ"
        out[covered], seen = total[covered], seen | covered
    assert seen.all()
    return out


def held_by(union: UnionArray, devices) -> dict[int, np.ndarray]:
    return {d: np.asarray(b) for d, b in union.buffers(devices).items()}
