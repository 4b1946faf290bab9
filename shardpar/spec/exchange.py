"""Who lacks what: the slices a change of layout needs, who has them, and who sends each.

Each dim is cut where either layout cuts it, so every device has or needs whole cells of
one grid. A byte crosses only if its receiver lacks it, once per receiver; among the
devices that have a cell, the sender is chosen so that the most loaded link is least loaded.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardpar.spec.layout import Span, Spans

Cell = tuple[Span, ...]
"""A box of the array: one span per dim, in the array's own indices."""


@dataclass(frozen=True)
class Have:
    """What a device has before: one addend of the indices in `spans`."""

    device: int
    label: int
    spans: tuple[Spans, ...]


@dataclass(frozen=True)
class Want:
    """What a device shall have after: the sum of these addends, over the indices in `spans`.

    No labels means zeros.
    """

    device: int
    labels: tuple[int, ...]
    spans: tuple[Spans, ...]


@dataclass(frozen=True)
class Demand:
    """A cell of one addend, the devices that have it, and those that want it and lack it."""

    cell: Cell
    label: int
    owners: tuple[int, ...]
    receivers: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements of the cell."""
        return math.prod(stop - start for start, stop in self.cell)


def demands(have: Iterable[Have], want: Iterable[Want]) -> tuple[Demand, ...]:
    """All cells that must cross, in order of their place in the array.

    >>> before = [Have(0, 0, (((0, 4),),)), Have(1, 0, (((4, 8),),))]
    >>> [(d.cell, d.owners, d.receivers) for d in demands(before, [Want(2, (0,), (((2, 6),),))])]
    [(((2, 4),), (0,), (2,)), (((4, 6),), (1,), (2,))]
    """
    sources: dict[tuple[int, tuple[Spans, ...]], list[int]] = defaultdict(list)
    for holding in have:
        sources[holding.label, holding.spans].append(holding.device)
    targets: dict[tuple[tuple[int, ...], tuple[Spans, ...]], list[int]] = defaultdict(list)
    for wanted in want:
        if wanted.labels:
            targets[wanted.labels, wanted.spans].append(wanted.device)
    cuts = _cuts([spans for _, spans in (*sources, *targets)])
    owners: dict[tuple[int, Cell], list[int]] = defaultdict(list)
    for (label, spans), devices in sources.items():
        for cell in cells(spans, cuts):
            owners[label, cell] += devices
    lacking: dict[tuple[Cell, int], list[int]] = defaultdict(list)
    for (labels, spans), devices in targets.items():
        for cell in cells(spans, cuts):
            for label in labels:
                has = set(owners[label, cell])
                lacks = [device for device in devices if device not in has]
                if lacks:
                    lacking[cell, label] += lacks
    return tuple(
        Demand(cell, label, tuple(sorted(owners[label, cell])), tuple(receivers))
        for (cell, label), receivers in sorted(lacking.items())
    )


def _cuts(every: Sequence[tuple[Spans, ...]]) -> list[list[int]]:
    rank = len(every[0]) if every else 0
    return [
        sorted({edge for spans in every for span in spans[dim] for edge in span})
        for dim in range(rank)
    ]


def cells(spans: tuple[Spans, ...], cuts: Sequence[Sequence[int]]) -> list[Cell]:
    """The grid's cells inside some indices, given where each dim is cut."""
    per_dim = []
    for of_dim, edges in zip(spans, cuts, strict=True):
        at = {edge: i for i, edge in enumerate(edges)}
        per_dim.append(
            [
                pair
                for start, stop in of_dim
                for pair in itertools.pairwise(edges[at[start] : at[stop] + 1])
            ]
        )
    return list(itertools.product(*per_dim))


def grid(every: Sequence[tuple[Spans, ...]]) -> list[list[int]]:
    """Where each dim is cut so that all of these indices are whole cells."""
    return _cuts(every)


@dataclass(frozen=True)
class Move:
    """A slice that one device sends to another: a cell, or part of one, of one addend."""

    sender: int
    receiver: int
    cell: Cell
    label: int

    @property
    def size(self) -> int:
        """Elements of the slice."""
        return math.prod(stop - start for start, stop in self.cell)


def moves_of(demand: Demand, shares: Mapping[int, Sequence[tuple[int, int]]]) -> list[Move]:
    """The moves that meet a demand.

    Args:
      demand: the cell and its receivers.
      shares: for each receiver, (sender, elements) pairs that add up to the cell's; a cell that
        has several senders is cut, along its longest dim first.
    """
    out = []
    for receiver in demand.receivers:
        done = 0
        for sender, elements in shares[receiver]:
            for part in portion(demand.cell, done, done + elements):
                out.append(Move(sender, receiver, part, demand.label))
            done += elements
    return out


def portion(cell: Cell, start: int, stop: int) -> Iterator[Cell]:
    """Boxes that are some consecutive elements of a cell, its longest dim counted first.

    >>> list(portion(((0, 4), (0, 2)), 0, 3))
    [((0, 1), (0, 2)), ((1, 2), (0, 1))]
    """
    order = sorted(range(len(cell)), key=lambda d: cell[d][0] - cell[d][1])
    yield from _portion(cell, order, start, stop)


def _portion(cell: Cell, order: Sequence[int], start: int, stop: int) -> Iterator[Cell]:
    if start >= stop:
        return
    if stop - start == math.prod(b - a for a, b in cell):
        yield cell
        return
    dim, rest = order[0], order[1:]
    low = cell[dim][0]
    each = math.prod(cell[d][1] - cell[d][0] for d in rest)

    def row(first: int, last: int) -> Cell:
        return (*cell[:dim], (low + first, low + last), *cell[dim + 1 :])

    first, last = -(-start // each), stop // each
    if first > last:
        index = start // each
        yield from _portion(row(index, index + 1), rest, start - index * each, stop - index * each)
        return
    if start < first * each:
        yield from _portion(row(first - 1, first), rest, start - (first - 1) * each, each)
    if first < last:
        yield row(first, last)
    if last * each < stop:
        yield from _portion(row(last, last + 1), rest, 0, stop - last * each)
