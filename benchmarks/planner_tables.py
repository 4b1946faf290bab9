"""The best plan of Galvatron-style cost tables: exact, certified, in a fraction of a CPU-second.

    python benchmarks/planner_tables.py --tables tests/data/cost_tables_llama2-7b_s2048_bsz16.json

A table holds, for a global batch, micro-batch count and pipeline depth, every admissible layer
strategy with its seconds and MB, and every strategy of embedding and head. This solves exactly
that problem: how many layers each stage gets, which strategy each layer takes, which one the
embedding takes. The objective is Galvatron's (VLDB 2023, arXiv 2211.13878) as its public engine
computes it; its five published optima are reproduced by `reference_plan` in the tests.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardpar.planner.knapsack import Item, Kind, pick

DEVICES = 8
REFERENCE = {
    16: (9.991, 49), 20: (13.709, 64), 24: (13.657, 60), 36: (14.732, 102), 60: (17.528, 171),
}  # fmt: skip
"""Budget in GiB -> samples/s of the reference's plan, and the CPU-seconds it took."""

TABLES = Path(__file__).parents[1] / "tests" / "data" / "cost_tables_llama2-7b_s2048_bsz16.json"


@dataclass(frozen=True)
class StagePlan:
    """Layers of one stage: (strategy name, how many)."""

    layers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class TablePlan:
    """A solution of one table."""

    gbsz: int
    chunks: int
    pp: int
    embed: str
    stages: tuple[StagePlan, ...]

    def describe(self) -> str:
        stages = " | ".join(
            " + ".join(f"{n}x {name}" for name, n in stage.layers) for stage in self.stages
        )
        return f"pp {self.pp}, micro-batches {self.chunks}, embedding {self.embed}: {stages}"


def budget_mb(gib: float) -> int:
    """MB the engine grants: above 20 GiB it keeps a fifth in reserve."""
    whole = int(gib * 1024)
    return whole - int(whole * 0.2) if gib > 20 else whole


def buffer_mb(table: dict[str, Any], max_tp: int) -> int:
    """The engine's buffer for gathered activations."""
    share = table["gbsz"] / table["chunks"] / (DEVICES / table["pp"] / max_tp)
    return int(share * 4096 * 2048 * 4 / 2**20 / 2)


def seconds(chunks: int, stage_s: Sequence[float], layers_with_sync_s: Sequence[float]) -> float:
    """The engine's seconds of one step.

    Args:
      chunks: micro-batches.
      stage_s: per stage, layers and embedding without gradient sync.
      layers_with_sync_s: per stage, layers alone with it; only what outlasts the
        compute of this stage and the ones before it is charged.
    """
    depth, first, rest = len(stage_s), stage_s[0], math.fsum(stage_s[1:])
    steady = math.fsum(stage_s) + (chunks - 1) * stage_s[-1]
    fill = min(depth - 1, chunks - 1) * first
    paced = max(fill / 3, rest / 3) + max(2 * fill / 3, 2 * rest / 3)
    paced += first * max(0, chunks + 1 - depth)
    late = [s - math.fsum(stage_s[: i + 1]) for i, s in enumerate(layers_with_sync_s)]
    return max(steady, paced) + max(0.0, *late)


def evaluate(plan: TablePlan, tables: list[dict[str, Any]]) -> tuple[float, tuple[int, ...]]:
    """(samples/s, MB per stage) of any plan, straight from the table: the checker's own path."""
    table = next(
        t for t in tables
        if (t["gbsz"], t["chunks"], t["pp"]) == (plan.gbsz, plan.chunks, plan.pp)
    )  # fmt: skip
    layers = {s["name"]: s for s in table["layer_strategies"]}
    embed = next(s for s in table["embed_strategies"] if s["name"] == plan.embed)
    max_tp = max([embed["tp"], *(layers[n]["tp"] for st in plan.stages for n, _ in st.layers)])
    stage_s, sync_s, used = [], [], []
    for i, stage in enumerate(plan.stages):
        own = math.fsum(n * layers[name]["time_s_no_gradsync"] for name, n in stage.layers)
        stage_s.append(own + embed["time_s_no_gradsync"][i])
        sync_s.append(math.fsum(n * layers[k]["time_s_with_gradsync"] for k, n in stage.layers))
        used.append(
            sum(n * math.ceil(layers[k]["mem_MB_per_layer_by_stage"][i]) for k, n in stage.layers)
            + math.ceil(embed["mem_MB_by_stage"][i])
            + buffer_mb(table, max_tp)
        )
    return plan.gbsz / seconds(plan.chunks, stage_s, sync_s), tuple(used)


@dataclass(frozen=True)
class Solution:
    """The best plan over all tables, and the most samples/s any plan can reach."""

    plan: TablePlan
    samples_per_s: float
    bound: float

    @property
    def gap(self) -> float:
        return max(0.0, 1 - self.samples_per_s / self.bound)


@dataclass
class _Case:
    """One table with one embedding strategy and one largest tp degree; stages filled lazily."""

    table: dict[str, Any]
    embed: dict[str, Any]
    max_tp: int
    room: list[int]
    strategies: list[dict[str, Any]]
    stage_s: np.ndarray  # [stage, layers]: a lower bound until `exact` says otherwise
    exact: np.ndarray
    choices: dict[tuple[int, int], tuple[tuple[str, int], ...]]
    bound_s: float = 0.0


def solve(tables: list[dict[str, Any]], budget_gib: float, even: bool = False) -> Solution | None:
    """The exact optimum over all tables; None if nothing fits.

    Args:
      tables: as read from the file.
      budget_gib: of one device.
      even: keep to each table's own division of the layers.
    """
    cases = sorted(_cases(tables, budget_mb(budget_gib), even), key=lambda c: c.bound_s)
    best: tuple[float, TablePlan] | None = None
    loose = math.inf
    for case in cases:
        if best is not None and case.bound_s >= best[0]:
            break
        while True:
            bound_s, division = _divide(case)
            if best is not None and bound_s >= best[0]:
                break
            todo = [(i, n) for i, n in enumerate(division) if not case.exact[i, n]]
            for i, n in todo:
                _fill(case, i, n)
            if todo:
                continue
            plan = TablePlan(
                case.table["gbsz"], case.table["chunks"], case.table["pp"], case.embed["name"],
                tuple(StagePlan(case.choices[i, n]) for i, n in enumerate(division)),
            )  # fmt: skip
            found_s = plan.gbsz / evaluate(plan, tables)[0]
            if best is None or found_s < best[0]:
                best = found_s, plan
            if found_s > bound_s * (1 + 1e-12):
                # Sync that outlasts compute is not in the bound: say so rather than claim.
                loose = min(loose, bound_s)
            break
    if best is None:
        return None
    batch = best[1].gbsz
    return Solution(best[1], batch / best[0], batch / min(best[0], loose))


def _cases(tables: list[dict[str, Any]], budget: int, even: bool) -> Iterator[_Case]:
    for table in tables:
        degrees = sorted({s["tp"] for s in table["layer_strategies"]})
        for max_tp in degrees:
            strategies = [s for s in table["layer_strategies"] if s["tp"] <= max_tp]
            lines = [_hull(strategies, stage) for stage in range(table["pp"])]
            for embed in table["embed_strategies"]:
                if embed["tp"] > max_tp:
                    continue
                left = budget - buffer_mb(table, max_tp)
                room = [left - math.ceil(mb) for mb in embed["mem_MB_by_stage"]]
                case = _case(table, embed, max_tp, room, strategies, lines, even)
                if case is not None:
                    yield case


def _case(
    table: dict[str, Any], embed: dict[str, Any], max_tp: int, room: list[int],
    strategies: list[dict[str, Any]], lines: list[tuple[np.ndarray, np.ndarray]], even: bool,
) -> _Case | None:  # fmt: skip
    total = sum(table["pp_division"])
    counts = np.arange(1, total + 1)
    stage_s = np.full((table["pp"], total + 1), np.inf)
    for i, (sizes, times) in enumerate(lines):
        each = room[i] / counts
        fits = each >= sizes[0]
        least = np.interp(each, sizes, times) * counts + embed["time_s_no_gradsync"][i]
        stage_s[i, 1:] = np.where(fits, least, np.inf)
        if even:
            stage_s[i, np.arange(total + 1) != table["pp_division"][i]] = np.inf
    exact = np.isinf(stage_s)
    case = _Case(table, embed, max_tp, room, strategies, stage_s, exact, {})
    case.bound_s, _ = _divide(case)
    return case if math.isfinite(case.bound_s) else None


def _hull(strategies: list[dict[str, Any]], stage: int) -> tuple[np.ndarray, np.ndarray]:
    """The lower convex hull of (MB, seconds)."""
    points = sorted(
        (math.ceil(s["mem_MB_per_layer_by_stage"][stage]), s["time_s_no_gradsync"])
        for s in strategies
    )
    hull: list[tuple[int, float]] = []
    for mb, s in points:
        if hull and s >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-2][1] - hull[-1][1]) * (mb - hull[-1][0]) <= (
            hull[-1][1] - s
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((mb, s))
    return np.array([p[0] for p in hull], float), np.array([p[1] for p in hull])


def _divide(case: _Case) -> tuple[float, tuple[int, ...]]:
    """The best division of the layers for the current stage seconds, late sync left out."""
    times, chunks = case.stage_s, case.table["chunks"]
    depth, total = times.shape[0], times.shape[1] - 1
    if depth == 1:
        return chunks * float(times[0, total]), (total,)
    middle = np.full(total + 1, np.inf)
    middle[0] = 0.0
    steps = []
    for i in range(1, depth - 1):
        sums = np.array([
            middle[: j + 1] + times[i, j::-1] if j else middle[:1] + times[i, :1]
            for j in range(total + 1)
        ], dtype=object)  # fmt: skip
        took = [int(np.argmin(row)) for row in sums]
        steps.append(took)
        middle = np.array([row[k] for row, k in zip(sums, took, strict=True)], float)
    best = (math.inf, (0, 0))
    for first in range(1, total):
        lasts = np.arange(1, total - first + 1)
        inner = middle[total - first - lasts]
        last = times[-1, lasts]
        head = times[0, first]
        rest = inner + last
        fill = min(depth - 1, chunks - 1) * head
        steady = head + rest + (chunks - 1) * last
        paced = np.maximum(fill / 3, rest / 3) + np.maximum(2 * fill / 3, 2 * rest / 3)
        cost = np.maximum(steady, paced + head * max(0, chunks + 1 - depth))
        at = int(np.argmin(cost))
        if cost[at] < best[0]:
            best = (float(cost[at]), (first, int(lasts[at])))
    if not math.isfinite(best[0]):
        return math.inf, ()
    first, last_n = best[1]
    division, left = [last_n], total - first - last_n
    for took in reversed(steps):
        before = took[left]
        division.append(left - before)
        left = before
    return best[0], (first, *reversed(division))


def _fill(case: _Case, stage: int, layers: int) -> None:
    """Replaces a stage's lower bound by its exact optimum."""
    items = tuple(
        Item(s["time_s_no_gradsync"], math.ceil(s["mem_MB_per_layer_by_stage"][stage]))
        for s in case.strategies
    )
    picked = pick([Kind(layers, items)], case.room[stage])
    case.exact[stage, layers] = True
    if picked is None:
        case.stage_s[stage, layers] = math.inf
        return
    case.stage_s[stage, layers] = picked.seconds + case.embed["time_s_no_gradsync"][stage]
    case.choices[stage, layers] = tuple(
        (s["name"], n) for s, n in zip(case.strategies, picked.counts[0], strict=True) if n
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", type=Path, default=TABLES)
    parser.add_argument("--budget-gib", type=float, action="append")
    parser.add_argument("--even", action="store_true", help="Keep to the tables' divisions.")
    parser.add_argument("--json", action="store_true", help="One object per budget.")
    args = parser.parse_args()
    for budget in args.budget_gib or sorted(REFERENCE):
        start = time.process_time()
        tables = json.loads(args.tables.read_text())
        found = solve(tables, budget, args.even)
        cpu_s = time.process_time() - start
        if found is None:
            print(json.dumps({"samples_per_s": None, "plan": None, "cpu_seconds": cpu_s}))
            continue
        if args.json:
            print(json.dumps({
                "samples_per_s": found.samples_per_s, "plan": found.plan.describe(),
                "cpu_seconds": round(cpu_s, 4), "lower_bound": found.bound, "gap": found.gap,
            }))  # fmt: skip
            continue
        _, used = evaluate(found.plan, tables)
        known = REFERENCE.get(int(budget))
        beside = f" (reference {known[0]} in {known[1]} CPU-s)" if known else ""
        print(
            f"{budget:g} GiB: {found.samples_per_s:.3f} samples/s{beside}, gap {found.gap:.4f}, "
            f"{cpu_s:.3f} CPU-s, {max(used)} of {budget_mb(budget)} MB\n  {found.plan.describe()}"
        )


if __name__ == "__main__":
    main()
