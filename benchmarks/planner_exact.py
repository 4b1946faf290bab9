"""Is the planner's answer optimal? Random instances against brute force and a MILP.

    python benchmarks/planner_exact.py --instances 1200

Each instance is a chain of layer kinds on stages of unequal speed and memory, with random
strategies and a memory limit that binds in part of them. Brute force tries every division and
every strategy of every layer with its own evaluator; HiGHS (scipy's `milp`) solves the same
problem where brute force cannot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from shardpar.planner.layers import Choice, Run, choose
from shardpar.planner.stages import StageSeconds, divide


@dataclass(frozen=True)
class Instance:
    """A pipeline to plan: kinds[l] is the kind of layer l; choices[stage][kind] what it may do."""

    kinds: tuple[int, ...]
    choices: tuple[tuple[tuple[Choice, ...], ...], ...]
    limits: tuple[float, ...]
    entry_s: tuple[tuple[float, ...], ...]
    microbatches: int

    @property
    def stages(self) -> int:
        return len(self.limits)


def random_instance(rng: random.Random, most_layers: int) -> Instance:
    layers = rng.randint(2, most_layers)
    stages = rng.randint(1, min(3, layers))
    kinds = tuple(sorted(rng.randint(0, 1) for _ in range(layers)))
    borders = rng.randint(1, 2)
    place = [rng.random() * rng.choice([0.05, 0.5]) for _ in range(borders)]
    entry = tuple(tuple(abs(a - b) for b in place) for a in place)
    choices, limits = [], []
    for _ in range(stages):
        speed, memory = rng.uniform(0.4, 2.5), rng.uniform(0.6, 2.0)
        per_kind = []
        for kind in range(2):
            options = []
            for _ in range(rng.randint(2, 3)):
                lean = rng.random()
                options.append(
                    Choice(
                        seconds=(1 + kind) * (0.5 + lean) / speed,
                        state_bytes=(2 - lean) * rng.uniform(0.5, 1.0),
                        saved_bytes=(1.2 - lean) * rng.uniform(0.2, 1.0),
                        scratch_bytes=rng.choice([0.0, rng.random()]),
                        border=rng.randrange(borders),
                    )
                )
            per_kind.append(tuple(options))
        choices.append(tuple(per_kind))
        limits.append(memory * layers / stages * rng.uniform(1.0, 3.5))
    return Instance(kinds, tuple(choices), tuple(limits), entry, rng.randint(1, 8))


def in_flight(instance: Instance, stage: int) -> int:
    return min(instance.microbatches, instance.stages - stage)


def planner(instance: Instance) -> tuple[float, float]:
    """(step, lower bound) by shardpar; inf, inf if nothing fits."""

    def runs(stage: int, first: int, end: int) -> list[Run]:
        groups = itertools.groupby(instance.kinds[first:end])
        return [
            Run(len(list(members)), instance.choices[stage][kind], instance.entry_s)
            for kind, members in groups
        ]

    def exact(stage: int, first: int, end: int) -> float:
        chosen = choose(runs(stage, first, end), instance.limits[stage], in_flight(instance, stage))
        return math.inf if chosen is None else chosen.seconds

    total = len(instance.kinds)
    lower = []
    for stage in range(instance.stages):
        table = np.full((total + 1, total + 1), np.inf)
        for first, end in itertools.combinations(range(total + 1), 2):
            table[first, end] = sum(
                run.count * min(c.seconds for c in run.choices) for run in runs(stage, first, end)
            )
        lower.append(table)
    found = divide(StageSeconds(lower, exact), instance.microbatches)
    return (math.inf, math.inf) if found is None else (found.step_s, found.lower_bound_s)


def stage_seconds(instance: Instance, stage: int, first: int, picks: Sequence[int]) -> float:
    """The evaluator: seconds of a stage with these choices; inf if they do not fit."""
    options = [
        instance.choices[stage][instance.kinds[first + i]][pick] for i, pick in enumerate(picks)
    ]
    held = in_flight(instance, stage)
    used = sum(c.state_bytes + held * c.saved_bytes for c in options)
    used += max(c.scratch_bytes for c in options)
    if used > instance.limits[stage] + 1e-12:
        return math.inf
    moved = sum(instance.entry_s[a.border][b.border] for a, b in itertools.pairwise(options))
    return sum(c.seconds for c in options) + moved


def brute_force(instance: Instance) -> tuple[float, bool]:
    """(best step, whether the memory limit shut out something faster)."""
    total, best, free = len(instance.kinds), math.inf, math.inf
    table: dict[tuple[int, int, int], tuple[float, float]] = {}
    for stage in range(instance.stages):
        for first, end in itertools.combinations(range(total + 1), 2):
            ranges = [
                range(len(instance.choices[stage][kind])) for kind in instance.kinds[first:end]
            ]
            unlimited = Instance(
                instance.kinds, instance.choices, (math.inf,) * instance.stages,
                instance.entry_s, instance.microbatches,
            )  # fmt: skip
            inside = open_ = math.inf
            for picks in itertools.product(*ranges):
                inside = min(inside, stage_seconds(instance, stage, first, picks))
                open_ = min(open_, stage_seconds(unlimited, stage, first, picks))
            table[stage, first, end] = inside, open_
    for cuts in itertools.combinations(range(1, total), instance.stages - 1):
        bounds = (0, *cuts, total)
        parts = list(enumerate(itertools.pairwise(bounds)))
        for which in (0, 1):
            times = [table[s, a, b][which] for s, (a, b) in parts]
            if any(map(math.isinf, times)):
                continue
            step = sum(times) + (instance.microbatches - 1) * max(times)
            if which:
                free = min(free, step)
            else:
                best = min(best, step)
    return best, best > free + 1e-12


def highs(instance: Instance, seconds: float) -> float | None:
    """The same problem as a MILP; None if HiGHS does not close it in time.

    x[s, l, c] is 1 where layer l is on stage s with choice c; stages are intervals because y[s, l]
    (layer l is on stage s or an earlier one) falls with s and rises with l.
    """
    total, stages = len(instance.kinds), instance.stages
    names: list[tuple[int, int, int]] = [
        (s, layer, c)
        for s in range(stages)
        for layer in range(total)
        for c in range(len(instance.choices[s][instance.kinds[layer]]))
    ]
    index = {name: i for i, name in enumerate(names)}
    pairs = [
        (s, layer, a, b)
        for s in range(stages)
        for layer in range(1, total)
        for a in range(len(instance.choices[s][instance.kinds[layer - 1]]))
        for b in range(len(instance.choices[s][instance.kinds[layer]]))
    ]
    moved = {pair: len(names) + i for i, pair in enumerate(pairs)}
    slow = len(names) + len(pairs)
    scratch = [slow + 1 + s for s in range(stages)]
    size = slow + 1 + stages
    rows, lows, highs_ = [], [], []

    def add(terms: dict[int, float], low: float, high: float) -> None:
        row = np.zeros(size)
        for i, value in terms.items():
            row[i] += value
        rows.append(row)
        lows.append(low)
        highs_.append(high)

    def choice(s: int, layer: int, c: int) -> Choice:
        return instance.choices[s][instance.kinds[layer]][c]

    for layer in range(total):
        add({i: 1.0 for n, i in index.items() if n[1] == layer}, 1, 1)
    for s in range(stages):
        add({i: 1.0 for n, i in index.items() if n[0] == s}, 1, total)
        for layer in range(1, total):
            # Once a stage or an earlier one has left the chain, it does not come back.
            terms = {i: 1.0 for n, i in index.items() if n[1] == layer and n[0] <= s}
            for n, i in index.items():
                if n[1] == layer - 1 and n[0] <= s:
                    terms[i] = terms.get(i, 0.0) - 1.0
            add(terms, -np.inf, 0)
        held = in_flight(instance, s)
        terms = {
            i: choice(*n).state_bytes + held * choice(*n).saved_bytes
            for n, i in index.items()
            if n[0] == s
        }
        terms[scratch[s]] = 1.0
        add(terms, -np.inf, instance.limits[s])
        for n, i in index.items():
            if n[0] == s:
                add({scratch[s]: 1.0, i: -choice(*n).scratch_bytes}, 0, np.inf)
    for (s, layer, a, b), i in moved.items():
        add({i: 1.0, index[s, layer - 1, a]: -1.0, index[s, layer, b]: -1.0}, -1, np.inf)
    cost = np.zeros(size)
    for s in range(stages):
        terms = {slow: -1.0}
        for n, i in index.items():
            if n[0] == s:
                terms[i] = choice(*n).seconds
                cost[i] += choice(*n).seconds
        for (stage, layer, a, b), i in moved.items():
            if stage == s:
                before, after = choice(s, layer - 1, a).border, choice(s, layer, b).border
                terms[i] = instance.entry_s[before][after]
                cost[i] += instance.entry_s[before][after]
        add(terms, -np.inf, 0)
    cost[slow] = instance.microbatches - 1
    integral = np.zeros(size)
    integral[: len(names)] = 1
    upper = np.full(size, np.inf)
    upper[: len(names) + len(pairs)] = 1
    result = milp(
        cost,
        constraints=LinearConstraint(np.array(rows), lows, highs_),
        integrality=integral,
        bounds=Bounds(0, upper),
        options={"time_limit": seconds, "mip_rel_gap": 1e-9},
    )
    if result.status == 2:
        return math.inf
    return float(result.fun) if result.status == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--instances", type=int, default=1200)
    parser.add_argument("--milp", type=int, default=200, help="Larger instances given to HiGHS.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    wrong = binding = infeasible = 0
    cpu_s = 0.0
    for _ in range(args.instances):
        instance = random_instance(rng, 6)
        start = time.process_time()
        step, bound = planner(instance)
        cpu_s += time.process_time() - start
        best, binds = brute_force(instance)
        binding += binds or math.isinf(best)
        infeasible += math.isinf(best)
        same = step == best or abs(step - best) <= 1e-9 * best
        wrong += not same or (math.isfinite(step) and bound < step * (1 - 1e-9))
    closed = milp_wrong = 0
    for _ in range(args.milp):
        instance = random_instance(rng, 14)
        step, _ = planner(instance)
        best_milp = highs(instance, 5.0)
        if best_milp is None:
            continue
        closed += 1
        milp_wrong += not (step == best_milp or abs(step - best_milp) <= 1e-6 * best_milp)
    print(json.dumps({
        "instances": args.instances, "wrong": wrong, "memory_binds": binding,
        "infeasible": infeasible, "planner_cpu_s": round(cpu_s, 2), "milp_closed": closed,
        "milp_given": args.milp, "milp_wrong": milp_wrong,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
