"""From one layout to another: which steps, which communications, how many bytes.

A reshard is a chain of steps, each from a layout to a layout, so that what a step means
is said by its two ends. Partial sums are added up first, inside the groups, then across
them; what is left only moves. Of the chains that do it the one that moves least is taken.
(HSPMD, arXiv 2504.20490, resolves pairs case by case; it cannot move partial sums to other
devices, and splits top-tier communication on dim 0 only.)
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from shardpar.errors import SpecError
from shardpar.spec.axes import along, reduces_to, reductions, ring_all_reduce
from shardpar.spec.exchange import Cell, Demand, Have, Want, cells, demands, grid
from shardpar.spec.layout import (
    Block,
    Group,
    Layout,
    Partial,
    Replicate,
    Spans,
    Split,
    SplitAcross,
)

Shape = tuple[int, ...]

Adds = Literal["nothing", "terms", "groups", "all", "zeros"]
"""What a step does to addends: keeps them; adds up each group's own inside the group; adds up
the groups', for all of them; adds up all addends where the sum is wanted; or makes addends
of a whole array by putting zeros beside it."""


@dataclass(frozen=True)
class Step:
    """One change of layout, of one kind.

    Attributes:
      before, after: its two ends.
      adds: what happens to addends on the way.
    """

    before: Layout
    after: Layout
    adds: Adds = "nothing"

    @property
    def is_in_groups(self) -> bool:
        """Whether each group changes alone, on its own devices in their order."""
        return (
            self.adds in ("nothing", "terms")
            and self.before.across == self.after.across
            and [g.devices for g in self.before.groups] == [g.devices for g in self.after.groups]
        )

    def have(self, shape: Shape) -> list[list[Have]]:
        """What each device has before, group by group."""
        return [
            [Have(p.device, label, p.spans) for p, label in zip(pieces, labels, strict=True)]
            for pieces, labels in zip(
                self.before.pieces(shape), labels_of(self.before), strict=True
            )
        ]

    def want(self, shape: Shape) -> list[list[Want]]:
        """What each device shall have after, group by group."""
        before, out = labels_of(self.before), []
        every = tuple(sorted({label for labels in before for label in labels}))
        for number, (pieces, labels) in enumerate(
            zip(self.after.pieces(shape), labels_of(self.after), strict=True)
        ):
            first = _first_labels(self.after, number)
            wants = []
            for piece, label in zip(pieces, labels, strict=True):
                needed: tuple[int, ...] = (label,)
                if self.adds == "terms":
                    terms = self.after.groups[number].terms
                    needed = _added(before[number], label - min(labels), terms)
                elif self.adds in ("groups", "all"):
                    needed = every
                elif self.adds == "zeros":
                    needed = (0,) if label in first else ()
                wants.append(Want(piece.device, needed, piece.spans))
            out.append(wants)
        return out

    def demands(self, shape: Shape) -> tuple[Demand, ...]:
        """The cells that must cross; each group's alone where it changes alone."""
        have, want = self.have(shape), self.want(shape)
        if self.is_in_groups:
            return tuple(d for h, w in zip(have, want, strict=True) for d in demands(h, w))
        return demands(itertools.chain(*have), itertools.chain(*want))


def labels_of(layout: Layout) -> list[list[int]]:
    """For each device the addend it holds, as a number that is the same for copies of it.

    Copies of the whole are 0, whichever group holds them; addends count from 1.
    """
    out, start = [], 1
    for group in layout.groups:
        if group.terms == 1 and layout.across != "partial":
            out.append([0] * len(group.devices))
            continue
        out.append([start + term for term in _terms(group)])
        start += group.terms
    return out


def _terms(group: Group) -> list[int]:
    terms = []
    for place in itertools.product(*(range(e.parts) for e in group.entries)):
        term = 0
        for index, entry in zip(place, group.entries, strict=True):
            if isinstance(entry, Partial):
                term = term * entry.parts + index
        terms.append(term)
    return terms


def _first_labels(layout: Layout, group: int) -> set[int]:
    """The addends of a group that hold the value when the others are zeros."""
    if layout.across == "partial" and group > 0:
        return set()
    return {min(labels_of(layout)[group])}


def _added(before: Sequence[int], index: int, terms_after: int) -> tuple[int, ...]:
    """The addends of a group that make up one of the fewer that it has after."""
    every = sorted(set(before))
    each = len(every) // terms_after
    return tuple(every[index * each : (index + 1) * each])


def check_pair(src: Layout, dst: Layout, shape: Shape) -> None:
    """Refuses a pair of layouts that do not fit the array.

    Raises:
      SpecError: saying which of the two, and why.
    """
    for what, layout in (("source", src), ("destination", dst)):
        try:
            layout.pieces(shape)
        except SpecError as error:
            raise SpecError(f"the {what}, {layout}: {error}") from None


@lru_cache(maxsize=4096)
def chain(src: Layout, dst: Layout, shape: Shape) -> tuple[Step, ...]:
    """The steps from one layout to another; none if every device has what it shall have.

    Raises:
      SpecError: a layout does not fit the shape.
    """
    check_pair(src, dst, shape)
    return _best(_chains(src, dst, shape), shape)


_MOST_UNEVEN = 1.5
"""How much more the busiest device may receive for the sake of fewer bytes in all."""


def _best(chains: Iterable[tuple[Step, ...]], shape: Shape) -> tuple[Step, ...]:
    """The chain in which the fewest elements cross, then with fewest steps, then best spread.

    Adding up where the sum is wanted puts the work on few devices: such a chain must save
    elements, and no device may receive much more than in the best of the others.
    """
    found = [(*_cost(steps, shape), steps) for steps in chains]

    def key(one: tuple[int, int, bool, tuple[Step, ...]]) -> tuple[int, int, int]:
        return one[0], len(one[3]), one[1]

    spread = [one for one in found if not one[2]]
    best = min(spread or found, key=key)
    most = _MOST_UNEVEN * best[1]
    lumped = [one for one in found if one[2] and one[0] < best[0] and one[1] <= most]
    return min([best, *lumped], key=key)[3]


def _cost(steps: Sequence[Step], shape: Shape) -> tuple[int, int, bool]:
    """Elements that cross, those the busiest device receives, and whether sums are lumped."""
    total: Counter[int] = Counter()
    for step in steps:
        total.update(received(step, shape))
    lumped = any(step.adds == "all" and step.before.devices != step.after.devices for step in steps)
    return total.total(), max(total.values(), default=0), lumped


def received(step: Step, shape: Shape) -> Counter[int]:
    """Elements each device receives in a step."""
    out: Counter[int] = Counter()
    if step.adds == "groups":
        for cell, groups in meeting(step, shape):
            for devices in groups:
                out.update(_by_device(devices, ring_all_reduce(_size(cell), len(devices))[1]))
    elif step.adds == "terms":
        for before, after, size in _group_changes(step, shape):
            for _, devices, taken in reductions(before, after, size):
                out.update(_by_device(devices, taken))
    else:
        for demand in step.demands(shape):
            for receiver in demand.receivers:
                out[receiver] += demand.size
    return out


def _by_device(devices: Sequence[int], amounts: Sequence[int]) -> dict[int, int]:
    return dict(zip(devices, amounts, strict=True))


def _group_changes(step: Step, shape: Shape) -> Iterator[tuple[Group, Group, int]]:
    for number, (before, after) in enumerate(
        zip(step.before.groups, step.after.groups, strict=True)
    ):
        if before != after:
            piece = step.before.pieces(shape)[number][0]
            yield before, after, math.prod(piece.shape)


def _chains(src: Layout, dst: Layout, shape: Shape) -> Iterator[tuple[Step, ...]]:
    if is_same(src, dst, shape):
        yield ()
    elif (src.terms == 1 and dst.terms == 1) or carries(src, dst):
        yield (Step(src, dst),)
    elif src.terms == 1:
        first = first_term(dst)
        for rest in _chains(src, first, shape):
            yield (*rest, Step(first, dst, "zeros"))
    else:
        for steps in _reductions(src, dst, shape):
            for rest in _chains(steps[-1].after, dst, shape):
                yield (*steps, *rest)


def is_same(src: Layout, dst: Layout, shape: Shape) -> bool:
    """Whether every device has in one layout just what it has in the other."""

    def all_of(layout: Layout) -> set[tuple[int, int, tuple[Spans, ...]]]:
        return {
            (p.device, label, p.spans)
            for pieces, labels in zip(layout.pieces(shape), labels_of(layout), strict=True)
            for p, label in zip(pieces, labels, strict=True)
        }

    # The same addends mean something else where the groups' sums are added up too.
    alike = (src.across == "partial") == (dst.across == "partial")
    return alike and all_of(src) == all_of(dst)


def carries(src: Layout, dst: Layout) -> bool:
    """Whether the addends of one layout can be those of the other, each where it is wanted."""
    if len(src.groups) != len(dst.groups):
        return False
    if [g.terms for g in src.groups] != [g.terms for g in dst.groups]:
        return False
    if "partial" in (src.across, dst.across):
        return src.across == dst.across
    # A group's addends are of its own region only.
    return src.across == dst.across


def first_term(layout: Layout) -> Layout:
    """Where the value lies if all addends but the first are zeros."""
    groups = []
    for group in layout.groups[:1] if layout.across == "partial" else layout.groups:
        devices = tuple(d for d, t in zip(group.devices, _terms(group), strict=True) if t == 0)
        entries = tuple(e for e in group.entries if not isinstance(e, Partial))
        groups.append(Group(devices, entries))
    return Layout(tuple(groups), "dup" if layout.across == "partial" else layout.across)


def _reductions(src: Layout, dst: Layout, shape: Shape) -> Iterator[tuple[Step, ...]]:
    """Ways to add something up; of equally good ones, those that are collectives come first."""
    if any(group.terms > 1 for group in src.groups):
        yield from _bottom_reductions(src, dst, shape)
    else:
        yield from _top_reductions(src, dst, shape)
    if src.across == "dup" and len(src.groups) > 1:
        for group in src.groups:
            yield (Step(src, Layout((group,))),)
    lean = replace(src, groups=tuple(next(_single(group)) for group in src.groups))
    if lean != src:
        # Copies of an addend need not all take part.
        yield (Step(src, lean),)
    if len(src.groups) == 1 or src.across == "partial":
        if dst.terms > 1:
            return
        for one in single_copies(dst):
            yield (Step(src, one, "all"),)


def _top_reductions(src: Layout, dst: Layout, shape: Shape) -> Iterator[tuple[Step, ...]]:
    same_devices = [g.devices for g in src.groups] == [g.devices for g in dst.groups]
    if same_devices and dst.terms == 1 and dst.across == "dup":
        aligned = Layout(dst.groups, "partial")
        first = () if aligned == src else (Step(src, aligned),)
        yield (*first, Step(aligned, dst, "groups"))
    for dim in range(len(shape)):
        spread = scattered(src, dim, shape)
        if spread is not None:
            yield (Step(src, spread, "all"),)
    yield (Step(src, Layout(src.groups, "dup"), "groups"),)


def _bottom_reductions(src: Layout, dst: Layout, shape: Shape) -> Iterator[tuple[Step, ...]]:
    whole = tuple(group for group in src.groups if group.terms == 1)
    if len(whole) > 1 and src.across == "dup":
        yield (Step(src, Layout(whole)),)
    # What a group becomes at its destination is of use only in the same part of the array.
    same = len(src.groups) == len(dst.groups) and all(
        src.region(number, shape) == dst.region(number, shape) for number in range(len(src.groups))
    )
    regions = [
        tuple(sum(b - a for a, b in spans) for spans in src.region(number, shape))
        for number in range(len(src.groups))
    ]
    ends: list[Layout] = []
    if same:
        wanted = [
            after if reduces_to(before, after) else _scattered_group(before, 0, region)
            for before, after, region in zip(src.groups, dst.groups, regions, strict=True)
        ]
        ends.append(replace(src, groups=tuple(wanted)))
    for dim in range(len(shape)):
        spread = [_scattered_group(g, dim, r) for g, r in zip(src.groups, regions, strict=True)]
        ends.append(replace(src, groups=tuple(spread)))
    ends.append(replace(src, groups=tuple(_copied(group) for group in src.groups)))
    for after in dict.fromkeys(ends):
        yield (Step(src, after, "terms"),)


def _scattered_group(group: Group, dim: int, region: Shape) -> Group:
    """The group with its addends added up and left split, over `dim` if that divides."""
    for candidate in (*range(dim, len(region)), *range(dim)):
        if region[candidate] % (group.parts_of(candidate) * group.terms) == 0:
            entries = tuple(
                Split(candidate, e.parts) if isinstance(e, Partial) else e for e in group.entries
            )
            after = Group(group.devices, entries)
            if reduces_to(group, after):
                return after
    return _copied(group)


def _copied(group: Group) -> Group:
    """The group with its addends added up on every device."""
    entries = tuple(Replicate(e.parts) if isinstance(e, Partial) else e for e in group.entries)
    return Group(group.devices, entries)


_MOST_COPIES = 16


def single_copies(layout: Layout) -> Iterator[Layout]:
    """Parts of a layout that have the whole array once, where its sum may be made first.

    >>> from shardpar.spec.layout_text import layout_from_text
    >>> for one in single_copies(layout_from_text("[0,1]{dup:2} + [2]{} across dup")):
    ...     print(one)
    [0]{}
    [1]{}
    [2]{}
    """
    if layout.across != "dup":
        groups = tuple(next(_single(group)) for group in layout.groups)
        yield Layout(groups, layout.across)
        return
    every = (Layout((one,)) for group in layout.groups for one in _single(group))
    yield from itertools.islice(every, _MOST_COPIES)


def _single(group: Group) -> Iterator[Group]:
    """A group without its copies, for each of the copies."""
    kept = [i for i, e in enumerate(group.entries) if not isinstance(e, Replicate)]
    entries = tuple(group.entries[i] for i in kept)
    for devices in zip(
        *along(
            group.devices,
            [e.parts for e in group.entries],
            [i for i in range(len(group.entries)) if i not in kept],
        ),
        strict=True,
    ):
        yield Group(devices, entries)


def scattered(layout: Layout, dim: int, shape: Shape) -> Layout | None:
    """The sum of a layout's groups, left where it costs least: each slice shared by its holders.

    Where the groups cut `dim` apart, each interval is given out in equal parts, one per
    group, so a device may end with several. None where the intervals do not divide.

    >>> from shardpar.spec.layout_text import layout_from_text
    >>> partial = layout_from_text("[0,1]{split0:2} + [2]{} across partial")
    >>> str(scattered(partial, 0, (8, 4)))
    '[0,1]{split0:2} + [2]{} across split0(0:2,1:2,0:2,1:2)'
    """
    every = [piece.spans for pieces in layout.pieces(shape) for piece in pieces]
    edges = grid(every)[dim]
    count = len(layout.groups)
    blocks: list[Block] = []
    for start, stop in itertools.pairwise(edges):
        if (stop - start) % count:
            return None
        blocks += [Block(number, (stop - start) // count) for number in range(count)]
    return Layout(layout.groups, SplitAcross(dim, tuple(blocks)))


def meeting(step: Step, shape: Shape) -> list[tuple[Cell, list[tuple[int, ...]]]]:
    """The finest slices that the groups of a layout share, and who adds up each.

    A collective has one device of every group. Where a group has several copies of a
    slice there are several collectives, dealt round-robin (HSPMD).
    """
    groups = step.before.pieces(shape)
    cuts = grid([piece.spans for pieces in groups for piece in pieces])
    holders: dict[Cell, list[list[int]]] = defaultdict(lambda: [[] for _ in groups])
    for number, pieces in enumerate(groups):
        for piece in pieces:
            for cell in cells(piece.spans, cuts):
                holders[cell][number].append(piece.device)
    return [
        (
            cell,
            [
                tuple(devices[k % len(devices)] for devices in of_cell)
                for k in range(max(map(len, of_cell)))
            ],
        )
        for cell, of_cell in sorted(holders.items())
    ]


def _size(cell: Cell) -> int:
    return math.prod(stop - start for start, stop in cell)
