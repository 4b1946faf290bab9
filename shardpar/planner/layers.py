"""The best strategies for the layers of one stage under its memory limit: exact, with a bound.

A stage is a chain of runs of equal layers. Within a run only how many layers take
each strategy matters, and strategies that leave activations in the same layout at
the border sit side by side, so that moving activations between layouts is paid
once per change. Choosing the counts is `knapsack.pick`; this module adds the
changes of layout and the scratch that only one layer at a time needs.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shardpar.planner.knapsack import Item, Kind, Picked, bound, pick

MAX_PATHS = 4000
"""Orders of layouts looked at before the search settles for a gap."""


@dataclass(frozen=True)
class Choice:
    """One strategy of one layer.

    Attributes:
      seconds: of one micro-batch, with the step's once-only work spread over micro-batches.
      state_bytes: held through the step.
      saved_bytes: kept for the backward, per micro-batch in flight.
      scratch_bytes: alive only while the layer computes.
      border: which layout activations have at the layer's border; equal numbers, equal layouts.
    """

    seconds: float
    state_bytes: float
    saved_bytes: float
    scratch_bytes: float
    border: int


@dataclass(frozen=True)
class Run:
    """`count` equal layers in a row.

    Attributes:
      count: how many.
      choices: what each may do.
      entry_s: entry_s[a][b] is the seconds to bring this layer's input from border
        layout a to b, forward and backward.
    """

    count: int
    choices: tuple[Choice, ...]
    entry_s: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Chosen:
    """Strategies for a chain of runs.

    Attributes:
      order: per run, (choice, how many layers) in the order of the layers.
      seconds: of one micro-batch, changes of layout included.
      num_bytes: state, saved activations and scratch.
      lower_bound_s: nothing within the limit is faster.
    """

    order: tuple[tuple[tuple[int, int], ...], ...]
    seconds: float
    num_bytes: float
    lower_bound_s: float


def choose(
    runs: Sequence[Run], limit: float, in_flight: int, epsilon: float = 0.0
) -> Chosen | None:
    """The fastest strategies that fit.

    Args:
      runs: the stage's layers in order; runs of no layers are left out by the caller.
      limit: bytes a device may hold.
      in_flight: micro-batches whose activations are held at once.
      epsilon: stop within this fraction of the bound.

    Returns:
      The choice, or None if nothing fits.

    >>> fast, lean = Choice(1.0, 8.0, 2.0, 0.0, 0), Choice(2.0, 4.0, 0.0, 0.0, 0)
    >>> choose([Run(3, (fast, lean), ((0.0,),))], 25.0, 1).order
    (((0, 2), (1, 1)),)
    """
    best: Chosen | None = None
    floor = math.inf
    for cap, spare in _scratch_levels(runs):
        allowed = [[i for i, c in enumerate(run.choices) if c.scratch_bytes <= cap] for run in runs]
        if not all(allowed):
            continue
        problem = _Problem(runs, allowed, limit - cap, limit - spare, in_flight)
        relaxed = problem.bound()
        if relaxed >= (best.seconds if best else math.inf):
            continue
        found = problem.solve(best.seconds if best else math.inf, epsilon)
        floor = min(floor, found[1])
        if found[0] is not None and (best is None or found[0].seconds < best.seconds):
            best = found[0]
    if best is None:
        return None
    return Chosen(best.order, best.seconds, best.num_bytes, min(best.seconds, floor))


def least_bytes(runs: Sequence[Run], in_flight: int) -> float:
    """Bytes of the leanest choice: what the layers need however slow."""
    return min(
        (
            cap
            + sum(
                run.count
                * min(
                    c.state_bytes + in_flight * c.saved_bytes
                    for c in run.choices
                    if c.scratch_bytes <= cap
                )
                for run in runs
            )
            for cap, _ in _scratch_levels(runs)
            if all(any(c.scratch_bytes <= cap for c in run.choices) for run in runs)
        ),
        default=math.inf,
    )


def leanest_choice(run: Run, in_flight: int) -> int:
    """The choice of the fewest bytes, scratch included; the faster of equals."""

    def key(i: int) -> tuple[float, float]:
        c = run.choices[i]
        each = c.state_bytes + in_flight * c.saved_bytes
        return run.count * each + c.scratch_bytes, c.seconds

    return min(range(len(run.choices)), key=key)


def bounds(parts: Sequence[Run], counts: np.ndarray, limit: float, in_flight: int) -> np.ndarray:
    """Seconds that no choice beats, for many numbers of layers at once.

    Changes of layout are left out. The relaxation is solved by its dual: the bound
    is the best, over prices of a byte, of the layers' priced seconds less the limit's worth.

    Args:
      parts: one run per kind of layer; its own count is not read.
      counts: [many, parts] numbers of layers.
      limit: bytes a device may hold.
      in_flight: as in `choose`.

    Returns:
      [many] seconds; inf where nothing fits.
    """
    out = np.full(len(counts), np.inf)
    used = counts > 0
    every = []
    for part in parts:
        figures = np.array(
            [
                (c.state_bytes + in_flight * c.saved_bytes, c.seconds, c.scratch_bytes)
                for c in part.choices
            ]
        ).T
        every.append(figures[:, np.lexsort(figures[1::-1])])
    for cap, spare in _coarse(_scratch_levels(parts)):
        hulls = [_hull(sizes[x <= cap], s[x <= cap]) for sizes, s, x in every]
        # The dual's optimum is at the slope of some hull, or at zero.
        slopes = {(a[1] - b[1]) / (b[0] - a[0]) for h in hulls for a, b in itertools.pairwise(h)}
        prices = np.array([0.0, *slopes])
        priced = np.zeros((len(hulls), len(prices)))
        for row, hull in zip(priced, hulls, strict=True):
            if hull:
                sizes, seconds = np.array(hull).T
                row[:] = (seconds[:, None] + sizes[:, None] * prices).min(axis=0)
        least = np.array([hull[0][0] if hull else 0.0 for hull in hulls])
        possible = ~(used & np.array([not hull for hull in hulls])).any(axis=1)
        fits = possible & (counts @ least <= (limit - spare) * (1 + 1e-12))
        values = (counts @ priced - prices * (limit - spare)).max(axis=1)
        out = np.where(fits, np.minimum(out, values), out)
    return out


def _hull(sizes: np.ndarray, seconds: np.ndarray) -> list[tuple[float, float]]:
    """(bytes, seconds) of the lower convex hull of choices, sorted by bytes, then seconds."""
    # Only what is faster than all that is smaller.
    useful = np.ones(len(seconds), bool)
    useful[1:] = seconds[1:] < np.minimum.accumulate(seconds)[:-1]
    hull: list[tuple[float, float]] = []
    for b, s in zip(sizes[useful].tolist(), seconds[useful].tolist(), strict=True):
        while len(hull) > 1 and (hull[-2][1] - hull[-1][1]) * (b - hull[-1][0]) <= (
            hull[-1][1] - s
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((b, s))
    return hull


def _scratch_levels(runs: Sequence[Run]) -> list[tuple[float, float]]:
    """(largest scratch allowed, scratch set aside at least) pairs, largest first."""
    levels = sorted({c.scratch_bytes for run in runs for c in run.choices}, reverse=True)
    return [(level, level) for level in levels]


def _coarse(levels: list[tuple[float, float]], most: int = 6) -> list[tuple[float, float]]:
    """Neighbouring levels merged; a merged one sets aside only its smallest scratch."""
    if len(levels) <= most:
        return levels
    size = -(-len(levels) // most)
    groups = [levels[i : i + size] for i in range(0, len(levels), size)]
    return [(group[0][0], group[-1][1]) for group in groups]


class _Problem:
    """One level of scratch: which layouts in which order, then how many layers of each choice."""

    def __init__(
        self,
        runs: Sequence[Run],
        allowed: Sequence[Sequence[int]],
        room: float,
        loose_room: float,
        in_flight: int,
    ) -> None:
        self.runs, self.room, self.in_flight = runs, room, in_flight
        self.loose_room = loose_room
        self.by_border: list[dict[int, list[int]]] = []
        for run, indices in zip(runs, allowed, strict=True):
            groups: dict[int, list[int]] = {}
            for i in indices:
                groups.setdefault(run.choices[i].border, []).append(i)
            self.by_border.append(
                {border: self._useful(run, group) for border, group in groups.items()}
            )

    def _useful(self, run: Run, indices: list[int]) -> list[int]:
        kept: list[int] = []
        for i in sorted(
            indices, key=lambda i: (self._bytes(run.choices[i]), run.choices[i].seconds)
        ):
            if not kept or run.choices[i].seconds < run.choices[kept[-1]].seconds:
                kept.append(i)
        return kept

    def _bytes(self, choice: Choice) -> float:
        return choice.state_bytes + self.in_flight * choice.saved_bytes

    def _kind(self, at: int, count: int, indices: Sequence[int]) -> Kind:
        choices = self.runs[at].choices
        return Kind(
            count, tuple(Item(choices[i].seconds, self._bytes(choices[i])) for i in indices)
        )

    def _kinds(
        self, path: Sequence[Sequence[int]]
    ) -> tuple[list[Kind], list[tuple[int, list[int]]]]:
        """The knapsack of a path, and what each of its kinds is: (run, choices).

        Each layout of the path gets one layer for sure, or its change would be paid for nothing.
        """
        kinds: list[Kind] = []
        members: list[tuple[int, list[int]]] = []
        for at, (groups, borders) in enumerate(zip(self.by_border, path, strict=True)):
            parts = [(1, groups[border]) for border in borders] if len(borders) > 1 else []
            rest = self.runs[at].count - len(parts)
            parts.append((rest, [i for border in borders for i in groups[border]]))
            for count, indices in parts:
                if count:
                    kinds.append(self._kind(at, count, indices))
                    members.append((at, indices))
        return kinds, members

    def bound(self) -> float:
        """Seconds without changes of layout: all layouts everywhere, for nothing."""
        kinds = [
            self._kind(at, run.count, [i for group in groups.values() for i in group])
            for at, (run, groups) in enumerate(zip(self.runs, self.by_border, strict=True))
        ]
        return bound(kinds, self.loose_room)

    def solve(self, cutoff: float, epsilon: float) -> tuple[Chosen | None, float]:
        """The best choice below `cutoff`, and a bound on every choice of this level."""
        relaxed = self.bound()
        best: Chosen | None = None
        best_s = cutoff
        floor = math.inf
        looked = 0
        for moves_s, path in self._paths():
            if relaxed + moves_s >= best_s * (1 - epsilon):
                floor = min(floor, relaxed + moves_s)
                break
            looked += 1
            if looked > MAX_PATHS:
                floor = min(floor, relaxed + moves_s)
                break
            kinds, members = self._kinds(path)
            least = bound(kinds, self.room) + moves_s
            if least >= best_s * (1 - epsilon):
                floor = min(floor, least)
                continue
            picked = pick(kinds, self.room, epsilon)
            if picked is None:
                continue
            floor = min(floor, picked.lower_bound_s + moves_s)
            if picked.seconds + moves_s < best_s:
                best_s = picked.seconds + moves_s
                best = self._chosen(path, members, picked, moves_s)
        return best, min(floor, best_s)

    def _chosen(
        self,
        path: Sequence[Sequence[int]],
        members: Sequence[tuple[int, Sequence[int]]],
        picked: Picked,
        moves_s: float,
    ) -> Chosen:
        counts: list[dict[int, int]] = [{} for _ in self.runs]
        for (at, indices), row in zip(members, picked.counts, strict=True):
            for i, n in zip(indices, row, strict=True):
                if n:
                    counts[at][i] = counts[at].get(i, 0) + n
        order = []
        scratch = 0.0
        for run, borders, used in zip(self.runs, path, counts, strict=True):
            # Equal layouts are neighbours, in the path's order.
            place = {border: k for k, border in enumerate(borders)}
            indices = sorted(used, key=lambda i: (place[run.choices[i].border], i))
            scratch = max([scratch, *(run.choices[i].scratch_bytes for i in used)])
            order.append(tuple((i, used[i]) for i in indices))
        seconds = picked.seconds + moves_s
        return Chosen(tuple(order), seconds, picked.num_bytes + scratch, seconds)

    def _paths(self) -> Iterator[tuple[float, tuple[tuple[int, ...], ...]]]:
        """Orders of layouts over the runs, cheapest changes first.

        Within a run a layout appears once: layers are equal, so meeting it again
        could be sorted away.
        """
        heap: list[tuple[float, int, tuple[tuple[int, ...], ...]]] = [(0.0, 0, ())]
        number = 0
        while heap:
            cost, _, path = heapq.heappop(heap)
            done = len(path) == len(self.runs) and len(path[-1]) >= 1
            if done:
                yield cost, path
            for more, longer in self._extend(path):
                number += 1
                heapq.heappush(heap, (cost + more, number, longer))

    def _extend(
        self, path: tuple[tuple[int, ...], ...]
    ) -> Iterator[tuple[float, tuple[tuple[int, ...], ...]]]:
        if path:
            at = len(path) - 1
            run, last = self.runs[at], path[-1]
            if len(last) < run.count:
                for border in self.by_border[at]:
                    if border not in last:
                        cost = run.entry_s[last[-1]][border]
                        yield cost, (*path[:-1], (*last, border))
        if len(path) < len(self.runs):
            at = len(path)
            for border in self.by_border[at]:
                cost = self.runs[at].entry_s[path[-1][-1]][border] if path else 0.0
                yield cost, (*path, (border,))
