"""Several pipelines of unequal shape over unequal devices, each with its share of the batch.

Devices of one kind are handed out in equal units. A pipeline takes some units of each
kind, runs stages of one kind each, and trains on some sequences in micro-batches of a power
of two; the plan's step is that of its slowest pipeline. Seconds of (units, sequences)
start as bounds that cost nothing and are solved only where the best combination uses
them, so the combination that remains is optimal, and the bounds say so. (Unequal
pipelines: HSPMD, arXiv 2504.20490; shares by speed: Malleus, arXiv 2410.13333.)
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from shardpar.planner.pipeline import Found, Groups, Problem, Shape, best_pipeline, lower_bound
from shardpar.spec.cluster import Cluster
from shardpar.spec.plan import Pipeline

Units = tuple[int, ...]
"""How many units of each kind."""

MOST_UNITS = 4
MOST_STAGES = 16
MOST_SHARES = 64
"""Shares of the batch are multiples of this part of it, where the batch is that large."""


@dataclass(frozen=True)
class Combination:
    """Pipelines that together take the whole batch.

    Attributes:
      pipelines: on distinct devices.
      step_s: of the slowest.
      lower_bound_s: no combination in the searched space is faster.
    """

    pipelines: tuple[Pipeline, ...]
    step_s: float
    lower_bound_s: float


@dataclass(frozen=True)
class Stock:
    """The devices of a cluster by kind, in units.

    Attributes:
      kinds: names, the one with most memory first: early stages hold most activations.
      devices: per kind, its devices in order.
      unit: per kind, devices of one unit.
    """

    kinds: tuple[str, ...]
    devices: tuple[tuple[int, ...], ...]
    unit: tuple[int, ...]

    @classmethod
    def of(cls, cluster: Cluster, most_units: int = MOST_UNITS) -> Stock:
        """Units are whole hosts, as many to a unit as keeps their number small."""
        by_kind: dict[str, list[int]] = {}
        for device in range(cluster.num_devices):
            by_kind.setdefault(cluster.kind_of(device).name, []).append(device)
        names = sorted(by_kind, key=lambda n: (-cluster.kind_of(by_kind[n][0]).memory_bytes, n))
        units = []
        for name in names:
            sizes = {hosts.devices for hosts in cluster.hosts if hosts.kind == name}
            total = len(by_kind[name])
            size = sizes.pop() if len(sizes) == 1 else total
            while total // size > most_units or total % size:
                size = next(s for s in range(size + 1, total + 1) if total % s == 0)
            units.append(size)
        return cls(tuple(names), tuple(tuple(by_kind[n]) for n in names), tuple(units))

    @property
    def units(self) -> Units:
        """All there is."""
        return tuple(len(d) // u for d, u in zip(self.devices, self.unit, strict=True))


def best_combination(
    problem: Problem, cutoff: float = math.inf, most_units: int = MOST_UNITS
) -> Combination | None:
    """The best pipelines over a cluster with several kinds of devices.

    Args:
      problem: what is planned for.
      cutoff: combinations that take longer are of no interest.
      most_units: of each kind; more are finer and take longer.

    Returns:
      The combination, or None if none takes less than `cutoff`.
    """
    table = _Table(problem, Stock.of(problem.cluster, most_units))
    best: Combination | None = None
    epsilon = problem.options.epsilon
    while True:
        chosen = table.fastest()
        bound_s = math.inf if chosen is None else chosen[0]
        reached = min(cutoff, best.step_s if best else math.inf)
        if chosen is None or bound_s >= reached * (1 - epsilon):
            if best is None:
                return None
            return replace(best, lower_bound_s=min(bound_s, table.limit, best.step_s))
        items = chosen[1]
        found = [table.solve(units, sequences, reached) for units, sequences in items]
        if all(f is not None for f in found):
            step_s = max(f.step_s for f in found if f is not None)
            if step_s < (best.step_s if best else math.inf):
                best = table.combination([f for f in found if f is not None], items, bound_s)


class _Table:
    """Seconds of every (units, sequences): bounds, made exact on demand."""

    def __init__(self, problem: Problem, stock: Stock) -> None:
        self.problem, self.stock = problem, stock
        self.batch = problem.workload.global_batch
        self.limit = math.inf
        self.least: dict[tuple[tuple[int, ...], int], np.ndarray] = {}
        self.shapes: dict[Units, list[tuple[Groups, int]]] = {}
        self.seconds: dict[tuple[Units, int], float] = {}
        self.found: dict[tuple[Units, int], Found | None] = {}
        # Per units, for every (groups, micro-batch): a bound on a step of m micro-batches
        # is base + (m - 1) * pace.
        self.base: dict[Units, np.ndarray] = {}
        self.pace: dict[Units, np.ndarray] = {}
        self.sizes: dict[Units, np.ndarray] = {}
        for units in itertools.product(*(range(n + 1) for n in stock.units)):
            if not any(units):
                continue
            entries = list(self._entries(units))
            if not entries:
                continue
            self.shapes[units] = [(groups, microbatch) for groups, microbatch, _, _ in entries]
            self.sizes[units] = np.array([entry[1] for entry in entries])
            self.base[units] = np.array([entry[2] for entry in entries])
            self.pace[units] = np.array([entry[3] for entry in entries])
            for sequences in self._shares():
                bounds = self._bounds(units, sequences)
                self.seconds[units, sequences] = float(bounds.min())

    def _shares(self) -> Iterator[int]:
        grain = max(1, self.batch // MOST_SHARES)
        yield from range(grain, self.batch, grain)
        if self.problem.options.pipelines in (None, 1):
            yield self.batch

    def _entries(self, units: Units) -> Iterator[tuple[Groups, int, float, float]]:
        """Groups share the work in proportion to their speed at best: (…, base, pace)."""
        for groups in self._groups(units):
            for microbatch in (1 << i for i in range(self.batch.bit_length())):
                parts = np.array([self._least_s(group, microbatch) for group in groups])
                if not np.isfinite(parts).all():
                    continue
                # Groups may differ in which layers they are good at, so each part of the model
                # goes to its best group, and the parts bound the slowest stage one by one.
                with np.errstate(divide="ignore"):
                    paces = 1 / (1 / parts).sum(axis=0)
                yield groups, microbatch, float(parts.min(axis=0).sum()), float(paces.max())

    def _bounds(self, units: Units, sequences: int) -> np.ndarray:
        counts, rest = np.divmod(sequences, self.sizes[units])
        bounds: np.ndarray = self.base[units] + (counts - 1) * self.pace[units]
        return np.where(rest == 0, bounds, np.inf)

    def _groups(self, units: Units) -> Iterator[Groups]:
        """Stages for some units: equal ones within a kind, kinds in every order."""
        stock = self.stock
        per_kind: list[list[Groups]] = []
        for count, devices, unit in zip(units, stock.devices, stock.unit, strict=True):
            own = devices[: count * unit]
            options = []
            for stages in range(1, len(own) + 1):
                if len(own) % stages == 0 and stages <= MOST_STAGES:
                    size = len(own) // stages
                    options.append(tuple(own[i : i + size] for i in range(0, len(own), size)))
            per_kind.append(options or [()])
        used = [k for k, count in enumerate(units) if count]
        for picks in itertools.product(*per_kind):
            if sum(map(len, picks)) > min(MOST_STAGES, len(self.problem.graph.layers)):
                continue
            for order in itertools.permutations(used):
                yield tuple(group for k in order for group in picks[k])

    def _least_s(self, devices: tuple[int, ...], microbatch: int) -> np.ndarray:
        """Seconds a group needs at least for a micro-batch through each part of the model."""
        key = (devices, microbatch)
        if key not in self.least:
            # So many micro-batches that what is done once a step weighs nothing, and a single one,
            # which adds up no gradients: whatever the step, it is no faster than the faster.
            counts = (1 << 20, 1)
            shapes = [Shape((devices,), microbatch * n, microbatch, 1) for n in counts]
            spaces = [self.problem.space(devices, shape) for shape in shapes]
            rows = [
                [math.inf] * len(self.problem.parts)
                if space is None
                else [run.count * min(c.seconds for c in run.choices) for run in space.runs]
                for space in spaces
            ]
            self.least[key] = np.array(rows).min(axis=0)
        return self.least[key]

    def solve(self, units: Units, sequences: int, cutoff: float) -> Found | None:
        """The best pipeline for some units and sequences; its seconds replace the bound.

        None if none takes less than `cutoff`; the bound then says so.
        """
        key = (units, sequences)
        if key in self.found:
            return self.found[key]
        best: Found | None = None
        floor = math.inf
        number = itertools.count()
        many = 1 if sequences == self.batch else 2
        heap = [
            (float(bound_s), next(number), False, Shape(groups, sequences, microbatch, many))
            for bound_s, (groups, microbatch) in zip(
                self._bounds(units, sequences), self.shapes[units], strict=True
            )
            if math.isfinite(bound_s)
        ]
        heapq.heapify(heap)
        close = 1 - self.problem.options.epsilon / 2
        while heap:
            reached = cutoff if best is None else best.step_s
            if heap[0][0] >= close * reached:
                floor = min(floor, heap[0][0])
                break
            bound_s, _, tight, shape = heapq.heappop(heap)
            if not tight:
                tighter = max(bound_s, lower_bound(self.problem, shape, reached))
                if math.isfinite(tighter):
                    heapq.heappush(heap, (tighter, next(number), True, shape))
                continue
            found = best_pipeline(self.problem, shape, reached)
            if found is not None:
                best, floor = found, min(floor, found.lower_bound_s)
        if best is None:
            # Cutoffs only fall, so what cannot beat this one is out for good; `limit`
            # remembers how near to it, at most, what was left out may be.
            self.seconds[key] = max(cutoff, self.seconds[key])
            self.found[key] = None
            self.limit = min(self.limit, close * cutoff * self.problem.slack)
            return None
        self.found[key] = best
        self.seconds[key] = min(floor, best.step_s)
        return best

    def fastest(self) -> tuple[float, list[tuple[Units, int]]] | None:
        """The combination whose slowest pipeline is fastest, by the seconds as they stand."""
        values = sorted({s for s in self.seconds.values() if math.isfinite(s)})
        low, high = 0, len(values) - 1
        if not values or self._reach(values[-1]) is None:
            return None
        while low < high:
            middle = (low + high) // 2
            if self._reach(values[middle]) is None:
                low = middle + 1
            else:
                high = middle
        items = self._reach(values[low])
        return None if items is None else (values[low], items)

    def _reach(self, step_s: float) -> list[tuple[Units, int]] | None:
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

    def combination(
        self, found: list[Found], items: list[tuple[Units, int]], bound_s: float
    ) -> Combination:
        """Pipelines on devices of their own."""
        taken = [0] * len(self.stock.kinds)
        pipelines = []
        for one, (units, _) in zip(found, items, strict=True):
            moved: dict[int, int] = {}
            for k, count in enumerate(units):
                size = count * self.stock.unit[k]
                devices = self.stock.devices[k]
                moved.update(zip(devices[:size], devices[taken[k] : taken[k] + size], strict=True))
                taken[k] += size
            pipelines.append(
                replace(
                    one.pipeline,
                    stages=tuple(
                        replace(stage, devices=tuple(moved[d] for d in stage.devices))
                        for stage in one.pipeline.stages
                    ),
                )
            )
        return Combination(tuple(pipelines), max(f.step_s for f in found), bound_s)
