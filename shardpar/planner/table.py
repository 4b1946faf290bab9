"""Seconds of a pipeline on some units of devices with some sequences: bounds, exact on demand.

A pipeline takes some units of each kind of devices, runs stages of one kind each, and trains on
some sequences in micro-batches of a power of two. What is not among the pipelines that could
make up the best plan is never priced.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from shardpar.planner.pipeline import Found, Groups, Problem, Shape, best_pipeline, lower_bound
from shardpar.planner.prices import floor_s
from shardpar.planner.setting import Setting
from shardpar.planner.stock import Stock, Units
from shardpar.spec.mesh import Mesh

Item = tuple[Units, int]
"""A pipeline to be: units, and sequences of the batch."""

MOST_STAGES = 16
MOST_SHARES = 64
"""Shares of the batch are multiples of this part of it, where the batch is that large."""


class Bound(NamedTuple):
    """No pipeline of a shape takes less than `seconds`; how much was spent to know it."""

    seconds: float
    number: int
    level: int
    shape: Shape


class Table:
    """Seconds of every (units, sequences): bounds, made tighter and exact on demand.

    A bound of a pipeline is of one of three levels, each dearer than the one before: the
    arithmetic of the model's parts alone (0); each part under its fastest strategy on each
    group (1); layers divided within the limits of memory (2).
    """

    def __init__(self, problem: Problem, stock: Stock) -> None:
        self.problem, self.stock = problem, stock
        self.batch = problem.workload.global_batch
        self.close = 1 - problem.options.epsilon / 2
        self.limit = math.inf
        self.reached = 0.0
        self.seconds: dict[Item, float] = {}
        self.found: dict[Item, Found | None] = {}
        self.met: dict[Item, list[Found]] = {}
        self.heaps: dict[Item, list[Bound]] = {}
        self.least: dict[tuple[int, int, int, int], np.ndarray] = {}
        self.alone: dict[int, np.ndarray] = {}
        self.chains: dict[Units, list[Groups]] = {}
        # Per units and chain of groups: a bound on a step of m micro-batches is
        # (base + (m - 1) * pace) times the sequences of a micro-batch.
        self.floors: dict[Units, tuple[np.ndarray, np.ndarray]] = {}
        self.sizes = 1 << np.arange(self.batch.bit_length())
        most_stages = min(MOST_STAGES, len(problem.graph.layers))
        for units in itertools.product(*(range(n + 1) for n in stock.units)):
            chains = list(stock.chains(units, most_stages)) if any(units) else []
            if not chains:
                continue
            self.chains[units] = chains
            bases, paces = zip(
                *(_base_and_pace([self._floor_s(group) for group in chain]) for chain in chains),
                strict=True,
            )
            self.floors[units] = np.array(bases), np.array(paces)
            for sequences in self._shares():
                item = units, sequences
                self.seconds[item] = float(self._floors(item).min())

    def _shares(self) -> Iterator[int]:
        grain, pipelines = max(1, self.batch // MOST_SHARES), self.problem.options.pipelines
        if pipelines != 1:
            yield from range(grain, self.batch, grain)
        if pipelines != 2:
            yield self.batch

    def _floors(self, item: Item) -> np.ndarray:
        """[chains, sizes of a micro-batch] bounds of level 0."""
        units, sequences = item
        base, pace = self.floors[units]
        counts, rest = np.divmod(sequences, self.sizes)
        seconds: np.ndarray = self.sizes * (base[:, None] + (counts - 1) * pace[:, None])
        return np.where(rest == 0, seconds, np.inf)

    def _floor_s(self, devices: tuple[int, ...]) -> np.ndarray:
        """[parts] seconds of one sequence that no strategy beats."""
        alike = self.problem.alike(devices)
        if alike not in self.alone:
            setting = Setting(
                self.problem.cluster, devices, Mesh.factored(len(devices)),
                self.problem.graph.batch, 1, 1, self.problem.workload,
            )  # fmt: skip
            self.alone[alike] = np.array(
                [(p.end - p.first) * floor_s(p.cls, setting) for p in self.problem.parts]
            )
        return self.alone[alike]

    def _heap(self, item: Item) -> list[Bound]:
        if item not in self.heaps:
            units, sequences = item
            many = 1 if sequences == self.batch else 2
            floors = self._floors(item)
            self.heaps[item] = [
                Bound(
                    float(floors[at, size]), number, 0,
                    Shape(self.chains[units][at], sequences, int(self.sizes[size]), many),
                )
                for number, (at, size) in enumerate(np.argwhere(np.isfinite(floors)).tolist())
            ]  # fmt: skip
            heapq.heapify(self.heaps[item])
        return self.heaps[item]

    def _raise(self, heap: list[Bound], cutoff: float) -> None:
        """Replaces the lowest bound by one of the next level."""
        seconds, number, level, shape = heap[0]
        if level == 0:
            tighter = self._fastest_s(shape)
        else:
            tighter = lower_bound(self.problem, shape, cutoff)
            # Nothing below the cutoff is all that is known then.
            tighter = min(tighter, cutoff)
        if math.isinf(tighter):
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, Bound(max(seconds, tighter), number, level + 1, shape))

    def _fastest_s(self, shape: Shape) -> float:
        """Seconds a pipeline needs if each part of the model takes its fastest strategy."""
        rows = [self._least_s(devices, shape) for devices in shape.groups]
        if not np.isfinite(rows).all():
            return math.inf
        base, pace = _base_and_pace(rows)
        return base + (shape.num_microbatches - 1) * pace

    def _least_s(self, devices: tuple[int, ...], shape: Shape) -> np.ndarray:
        """[parts] seconds of a micro-batch of a shape on a group; inf if it cannot run there."""
        count, many = shape.num_microbatches, min(shape.pipelines, 2)
        key = (self.problem.alike(devices), shape.microbatch, count, many)
        if key not in self.least:
            priced = self.problem.priced(devices, shape)
            self.least[key] = (
                np.full(len(self.problem.parts), np.inf)
                if priced is None
                else priced.least_s(count, many)
            )
        return self.least[key]

    def tighten(self, item: Item, cutoff: float) -> bool:
        """Makes an item's bound one of level 2; stops, and says so, as soon as it has risen."""
        if item in self.found:
            return False
        heap = self._heap(item)
        for level in (1, 2):
            while heap and heap[0].level < level and heap[0].seconds < self.close * cutoff:
                self._raise(heap, cutoff)
            seconds = heap[0].seconds if heap else math.inf
            if seconds > self.seconds[item]:
                self.seconds[item] = seconds
                return True
        return False

    def solve(self, item: Item, cutoff: float) -> Found | None:
        """The best pipeline for some units and sequences; its seconds replace the bound.

        None if none takes less than `cutoff`; the bound then says so.
        """
        if item in self.found:
            return self.found[item]
        best: Found | None = None
        floor = math.inf
        heap = self._heap(item)
        while heap:
            reached = cutoff if best is None else best.step_s
            if heap[0].seconds >= self.close * reached:
                floor = min(floor, heap[0].seconds)
                break
            if heap[0].level < 2:
                self._raise(heap, reached)
                continue
            found = best_pipeline(self.problem, heapq.heappop(heap).shape, reached)
            if found is not None:
                best, floor = found, min(floor, found.lower_bound_s)
                self.met.setdefault(item, []).append(found)
            else:
                floor = min(floor, self.close * reached * self.problem.slack)
        self.found[item] = best
        if best is None:
            # Cutoffs only fall, so what cannot beat this one is out for good; `limit`
            # remembers how near to it, at most, what was left out may be.
            self.seconds[item] = max(cutoff, self.seconds[item])
            self.limit = min(self.limit, self.close * cutoff * self.problem.slack)
            return None
        self.seconds[item] = min(max(floor, self.seconds[item]), best.step_s)
        return best

    def near(self, item: Item, most: int, cutoff: float) -> list[Found]:
        """Other shapes of a solved item that take less than `cutoff`, `most` of them."""
        found = [f for f in self.met[item] if f is not self.found[item] and f.step_s < cutoff]
        heap = self.heaps[item]
        while len(found) < most and heap and heap[0].seconds < cutoff:
            if heap[0].level < 2:
                self._raise(heap, cutoff)
                continue
            other = best_pipeline(self.problem, heapq.heappop(heap).shape, cutoff)
            if other is not None:
                found.append(other)
        return sorted(found, key=lambda f: f.step_s)[:most]

    def fastest(self) -> tuple[float, list[Item]] | None:
        """The combination whose slowest pipeline is fastest, by the seconds as they stand."""
        values = sorted({s for s in self.seconds.values() if math.isfinite(s)})
        # Bounds only rise, mostly by little: look from where the last one was, in growing steps.
        low = high = bisect.bisect_left(values, self.reached * (1 - 1e-9))
        step = 1
        while high < len(values) and self._reach(values[high]) is None:
            low, high, step = high + 1, high + step, 2 * step
        high = min(high, len(values) - 1)
        while low < high:
            middle = (low + high) // 2
            if self._reach(values[middle]) is None:
                low = middle + 1
            else:
                high = middle
        items = self._reach(values[low]) if low < len(values) else None
        if items is None:
            return None
        self.reached = values[low]
        return values[low], items

    def _reach(self, step_s: float) -> list[Item] | None:
        """Pipelines, none slower than this, that take the whole batch; None if there are none."""
        allowed: dict[Units, list[int]] = {}
        for (units, sequences), seconds in self.seconds.items():
            if seconds <= step_s:
                allowed.setdefault(units, []).append(sequences)
        # Bit n of reach[used] says that pipelines on these units can take n sequences.
        start = tuple(0 for _ in self.stock.units)
        everything = (1 << (self.batch + 1)) - 1
        reach: dict[Units, int] = {start: 1}
        came: dict[tuple[Units, int], tuple[Units, int]] = {}
        for used in itertools.product(*(range(n + 1) for n in self.stock.units)):
            for units, counts in allowed.items():
                before = tuple(a - b for a, b in zip(used, units, strict=True))
                if before not in reach or min(before) < 0:
                    continue
                for sequences in counts:
                    new = (reach[before] << sequences) & everything & ~reach.get(used, 0)
                    reach[used] = reach.get(used, 0) | new
                    while new:
                        low = new & -new
                        came[used, low.bit_length() - 1] = (units, sequences)
                        new ^= low
        ends = [used for used, bits in reach.items() if bits >> self.batch & 1]
        if not ends:
            return None
        used, taken = max(ends, key=sum), self.batch
        items = []
        while taken:
            units, sequences = came[used, taken]
            items.append((units, sequences))
            used = tuple(a - b for a, b in zip(used, units, strict=True))
            taken -= sequences
        return items


def _base_and_pace(rows: Sequence[np.ndarray]) -> tuple[float, float]:
    """(base, pace) such that no division of the layers takes less than base + (m - 1) * pace.

    Args:
      rows: per group, seconds of a micro-batch through each part of the model, whole.
    """
    parts = np.array(rows)
    base = float(parts.min(axis=0).sum())
    # The slowest group takes no less than any average of all groups, however layers are divided.
    # Weighed by speed, the average hardly depends on who takes what; a part of the model alone
    # bounds it too, where groups differ in what they are good at.
    with np.errstate(divide="ignore", invalid="ignore"):
        speed = 1 / parts.sum(axis=1)
        weights = speed / speed.sum()
        pace = float((weights[:, None] * parts).min(axis=0).sum())
        alone = float((1 / (1 / parts).sum(axis=0)).max())
    return base, max(pace, alone)
