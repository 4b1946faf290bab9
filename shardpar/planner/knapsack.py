"""Which strategy each of many equal layers takes, under one memory limit: exact, with a bound.

Equal layers make a plan a multiset: only how many layers take each strategy
matters, not which. The linear relaxation mixes at most two strategies of one class;
its price of a byte leaves so few other multisets that could be better that they
are simply tried (core enumeration, Pisinger's expanding-core idea for
multiple-choice knapsacks, EJOR 83, 1995).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

MAX_TRIED = 200_000
"""Multisets tried before the search settles for a gap."""


@dataclass(frozen=True)
class Item:
    """One strategy of one layer: seconds to minimise, bytes that count against the limit."""

    seconds: float
    num_bytes: float


@dataclass(frozen=True)
class Kind:
    """`count` equal layers, each of which takes one of `items`."""

    count: int
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Picked:
    """A choice for all layers.

    Attributes:
      counts: per kind, how many layers take each item.
      seconds, num_bytes: their sums.
      lower_bound_s: no choice within the limit is faster; equals `seconds` unless
        the search was told to stop early.
    """

    counts: tuple[tuple[int, ...], ...]
    seconds: float
    num_bytes: float
    lower_bound_s: float


def pick(kinds: Sequence[Kind], limit: float, epsilon: float = 0.0) -> Picked | None:
    """The fastest choice of one item per layer whose bytes stay within a limit.

    Args:
      kinds: the layers, equal ones together.
      limit: bytes.
      epsilon: a choice within this fraction of the bound is good enough.

    Returns:
      The choice; None if even the smallest items do not fit.

    >>> fast, lean = Item(1.0, 10.0), Item(2.0, 4.0)
    >>> pick([Kind(3, (fast, lean))], 25.0)
    Picked(counts=((2, 1),), seconds=4.0, num_bytes=24.0, lower_bound_s=4.0)
    """
    merged = _merged(kinds)
    if len(merged) < len(kinds):
        picked = pick(merged, limit, epsilon)
        return None if picked is None else _parted(picked, kinds, merged)
    useful = [_Useful.of(kind) for kind in kinds]
    relaxed = _relax(useful, limit)
    if relaxed is None:
        return None
    best = _Best(useful, relaxed.counts)
    slack_s = best.seconds - relaxed.bound_s
    tiny = 1e-12 * max(best.seconds, 1e-300)
    if relaxed.price == 0.0 or slack_s <= max(epsilon * best.seconds, tiny):
        exact = relaxed.price == 0.0 or slack_s <= tiny
        return best.picked(best.seconds if exact else relaxed.bound_s)
    finished = _improve(useful, relaxed, limit, best)
    return best.picked(best.seconds if finished else relaxed.bound_s)


def bound(kinds: Sequence[Kind], limit: float) -> float:
    """Seconds that no choice within the limit beats: the linear relaxation; inf if none fits."""
    relaxed = _relax([_Useful.of(kind) for kind in kinds], limit)
    return math.inf if relaxed is None else relaxed.bound_s


def _merged(kinds: Sequence[Kind]) -> list[Kind]:
    """Kinds with equal items as one: to tell them apart would multiply equal choices."""
    counts: dict[tuple[Item, ...], int] = {}
    for kind in kinds:
        counts[kind.items] = counts.get(kind.items, 0) + kind.count
    return [Kind(count, items) for items, count in counts.items()]


def _parted(picked: Picked, kinds: Sequence[Kind], merged: Sequence[Kind]) -> Picked:
    left = {kind.items: list(row) for kind, row in zip(merged, picked.counts, strict=True)}
    rows = []
    for kind in kinds:
        wanted, row = kind.count, []
        for i, there in enumerate(left[kind.items]):
            taken = min(wanted, there)
            wanted -= taken
            left[kind.items][i] -= taken
            row.append(taken)
        rows.append(tuple(row))
    return replace(picked, counts=tuple(rows))


@dataclass(frozen=True)
class _Useful:
    """A kind's items that no other beats in both measures, smallest first, and their hull."""

    count: int
    width: int
    items: tuple[tuple[int, float, float], ...]
    hull: tuple[int, ...]

    @classmethod
    def of(cls, kind: Kind) -> _Useful:
        order = sorted(
            range(len(kind.items)), key=lambda i: (kind.items[i].num_bytes, kind.items[i].seconds)
        )
        kept: list[tuple[int, float, float]] = []
        for i in order:
            item = kind.items[i]
            if not kept or item.seconds < kept[-1][1]:
                kept.append((i, item.seconds, item.num_bytes))
        hull: list[int] = []
        for i, (_, seconds, num_bytes) in enumerate(kept):
            while len(hull) > 1:
                _, s0, b0 = kept[hull[-2]]
                _, s1, b1 = kept[hull[-1]]
                if (s0 - s1) * (num_bytes - b1) > (s1 - seconds) * (b1 - b0):
                    break
                hull.pop()
            hull.append(i)
        return cls(kind.count, len(kind.items), tuple(kept), tuple(hull))


@dataclass(frozen=True)
class _Relaxed:
    """The relaxation: its bound, the price of a byte, and whole counts near it.

    `last` is the kind whose hull edge was cut short, and `edge` that edge's ends.
    """

    bound_s: float
    price: float
    counts: tuple[dict[int, int], ...]
    last: int = -1
    edge: tuple[int, int] = (-1, -1)


def _relax(useful: Sequence[_Useful], limit: float) -> _Relaxed | None:
    room = limit
    seconds = 0.0
    counts: list[dict[int, int]] = []
    edges: list[tuple[float, int, int]] = []
    for g, kind in enumerate(useful):
        if kind.count and not kind.items:
            return None
        counts.append({kind.hull[0]: kind.count} if kind.count else {})
        if not kind.count:
            continue
        _, s, b = kind.items[kind.hull[0]]
        room -= kind.count * b
        seconds += kind.count * s
        for h in range(len(kind.hull) - 1):
            _, s0, b0 = kind.items[kind.hull[h]]
            _, s1, b1 = kind.items[kind.hull[h + 1]]
            edges.append(((s0 - s1) / (b1 - b0), g, h))
    if room < -1e-9 * abs(limit):
        return None
    room = max(room, 0.0)
    edges.sort(key=lambda e: (-e[0], e[1], e[2]))
    cut: tuple[float, float, int, int] | None = None
    for slope, g, h in edges:
        kind = useful[g]
        low, high = kind.hull[h], kind.hull[h + 1]
        step_s = kind.items[low][1] - kind.items[high][1]
        step_bytes = kind.items[high][2] - kind.items[low][2]
        movable = counts[g].get(low, 0)
        moved = min(movable, math.floor(room / step_bytes + 1e-12))
        if cut is None and moved < movable:
            cut = (seconds - slope * room, slope, g, h)
        if moved:
            counts[g][low] = movable - moved
            counts[g][high] = counts[g].get(high, 0) + moved
            room -= moved * step_bytes
            seconds -= moved * step_s
    if cut is None:
        return _Relaxed(seconds, 0.0, tuple(counts))
    bound_s, price, g, h = cut
    return _Relaxed(bound_s, price, tuple(counts), g, (useful[g].hull[h], useful[g].hull[h + 1]))


class _Best:
    """The best choice so far."""

    def __init__(self, useful: Sequence[_Useful], counts: Sequence[dict[int, int]]) -> None:
        self.useful = useful
        self.keep(counts)

    def keep(self, counts: Sequence[dict[int, int]]) -> None:
        self.counts = [dict(c) for c in counts]
        pairs = [
            (n, kind.items[i])
            for kind, c in zip(self.useful, counts, strict=True)
            for i, n in c.items()
        ]
        self.seconds = math.fsum(n * item[1] for n, item in pairs)
        self.num_bytes = math.fsum(n * item[2] for n, item in pairs)

    def picked(self, bound_s: float) -> Picked:
        counts = []
        for kind, chosen in zip(self.useful, self.counts, strict=True):
            row = [0] * kind.width
            for i, n in chosen.items():
                row[kind.items[i][0]] = n
            counts.append(tuple(row))
        return Picked(tuple(counts), self.seconds, self.num_bytes, min(bound_s, self.seconds))


def _improve(useful: Sequence[_Useful], relaxed: _Relaxed, limit: float, best: _Best) -> bool:
    """Tries every choice whose reduced cost leaves room to be better; False if there are too many.

    A choice costs bound + its reduced costs + price x unused bytes, so only those whose
    reduced costs stay below the incumbent's distance from the bound can win.
    """
    price, bound_s = relaxed.price, relaxed.bound_s
    reduced: list[list[float]] = []
    for kind in useful:
        costs = [s + price * b for _, s, b in kind.items]
        low = min(costs, default=0.0)
        reduced.append([max(0.0, c - low) for c in costs])
    low, high = relaxed.edge
    order = [g for g in range(len(useful)) if g != relaxed.last and useful[g].count]
    tried = 0

    def room_s() -> float:
        return (best.seconds - bound_s) * (1 - 1e-12)

    def choose(g: int, spare: list[int], left: int, excess: float) -> Iterator[dict[int, int]]:
        """Counts of `spare` items of a kind, `left` layers at most, reduced cost in bounds."""
        nonlocal tried
        if not spare:
            yield {}
            return
        item, rest = spare[0], spare[1:]
        cost = reduced[g][item]
        for n in range(left + 1):
            if excess + n * cost >= room_s():
                break
            for more in choose(g, rest, left - n, excess + n * cost):
                tried += 1
                yield {item: n, **more} if n else more

    def last(chosen: dict[int, dict[int, int]], room: float, excess: float) -> None:
        g = relaxed.last
        kind = useful[g]
        spare = sorted(
            (i for i in range(len(kind.items)) if i not in (low, high)),
            key=lambda i: -reduced[g][i],
        )
        step = kind.items[high][2] - kind.items[low][2]
        for some in choose(g, spare, kind.count, excess):
            if tried > MAX_TRIED:
                return
            taken = sum(some.values())
            rest = kind.count - taken
            used = sum(n * kind.items[i][2] for i, n in some.items())
            free = room - used - rest * kind.items[low][2]
            if free < -1e-9 * abs(limit):
                continue
            many = min(rest, math.floor(max(free, 0.0) / step + 1e-12))
            counts = [chosen.get(k, {}) for k in range(len(useful))]
            counts[g] = {**some, low: rest - many, high: many}
            seconds = math.fsum(
                n * useful[k].items[i][1] for k, c in enumerate(counts) for i, n in c.items()
            )
            if seconds < best.seconds:
                best.keep(counts)

    def walk(at: int, chosen: dict[int, dict[int, int]], room: float, excess: float) -> None:
        if tried > MAX_TRIED:
            return
        if at == len(order):
            last(chosen, room, excess)
            return
        g = order[at]
        kind = useful[g]
        base = min(range(len(kind.items)), key=lambda i: (reduced[g][i], i))
        spare = sorted(
            (i for i in range(len(kind.items)) if i != base), key=lambda i: -reduced[g][i]
        )
        for some in choose(g, spare, kind.count, excess):
            if tried > MAX_TRIED:
                return
            counts = {**some, base: kind.count - sum(some.values())}
            used = sum(n * kind.items[i][2] for i, n in counts.items())
            more = sum(n * reduced[g][i] for i, n in counts.items())
            walk(at + 1, {**chosen, g: counts}, room - used, excess + more)

    walk(0, {}, limit, 0.0)
    return tried <= MAX_TRIED
