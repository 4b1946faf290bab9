"""Sequences of mixed lengths: padding, packing, hot switching and unequal pipelines, priced.

    python -m benchmarks.mixed_lengths                  # 33 billion parameters
    python -m benchmarks.mixed_lengths --model 7b --context 1   # sequences may not be split

Lengths are log-normal, median 1,024 tokens, sigma 1.2, cut at 32,768: 4% are longer than 8,192, and
those hold over a quarter of the tokens. A step takes sequences until it has its tokens. Machines
are 32 H20 on four hosts, plans are the search's, prices the planner's: nothing is run.

Attention is priced as a fused kernel that keeps no scores and skips what the mask hides: figures of
a LLaMA traced at three lengths are split into what grows with the tokens and what grows with pairs
of them, and of the latter only FLOPs remain, half of them, for the pairs that see each other.

A pipeline takes the sum over its micro-batches of its slowest stage's seconds, and the other stages
once for its longest micro-batch: the planner's formula for micro-batches of unequal seconds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llama_graph import llama_graph
from shardpar.errors import InfeasibleError, PlanError
from shardpar.planner.cost import stage_cost
from shardpar.planner.dispatch import PipelineSpeed, dispatch
from shardpar.planner.options import SearchOptions
from shardpar.planner.search import search
from shardpar.planner.setting import Workload, setting_of
from shardpar.planner.strategies import describe
from shardpar.spec.cluster import Cluster, Hosts
from shardpar.spec.graph import Activation, LayerClass, LayerGraph
from shardpar.spec.plan import Plan
from shardpar.spec.text import cluster_from_text
from shardpar.train.buckets import buckets_of
from shardpar.train.packing import pack

DEVICES, LONGEST = 32, 32768
BOUNDS = (4096, 8192, 16384, LONGEST)
TRACED = (1024, 2048, 4096)
MODELS = {
    "7b": {"layers": 32, "width": 4096, "heads": 32, "mlp_width": 11008},
    "33b": {"layers": 60, "width": 6656, "heads": 64, "mlp_width": 17920},
}
HOST = Path(__file__).parents[1] / "configs" / "clusters" / "h20x8.yaml"


def machines(devices: int) -> Cluster:
    """So many H20, eight on a host."""
    host = cluster_from_text(HOST.read_text(), str(HOST))
    each = min(devices, 8)
    return replace(
        host, name=f"h20x{devices}", hosts=(Hosts(host.kinds[0].name, each, devices // each),)
    )


def step_lengths(random: np.random.Generator, tokens: int) -> list[int]:
    """Sequences of one step: as many as it takes to have so many tokens."""
    drawn = np.clip(np.round(random.lognormal(math.log(1024), 1.2, tokens // 64)), 16, LONGEST)
    count = int(np.searchsorted(np.cumsum(drawn), tokens)) + 1
    return [int(n) for n in drawn[:count]]


class Rows:
    """A model's layer graph for a row of any length, with so many pairs of tokens that see others.

    Each figure of a layer is a polynomial of the length, through its values at three lengths.
    """

    def __init__(self, model: str) -> None:
        self._graphs = [llama_graph(1, length, **MODELS[model]) for length in TRACED]
        self.graph = functools.lru_cache(maxsize=None)(self._graph)

    def _graph(self, length: int, pairs: float) -> LayerGraph:
        # Layers are the same ones at each length; their figures are not.
        classes = tuple(
            self._class(of_lengths, length, pairs)
            for of_lengths in zip(*(g.classes for g in self._graphs), strict=True)
        )
        return replace(self._graphs[-1], classes=classes, tokens=length)

    def _class(self, traced: Sequence[LayerClass], length: int, pairs: float) -> LayerClass:
        last = traced[-1]
        scale = length / TRACED[-1]
        changed: dict[str, Any] = {
            name: _linear([getattr(cls, name) for cls in traced], length)
            for name in (
                "forward_flops", "backward_flops", "forward_bytes", "backward_bytes", "views_bytes",
            )
        }  # fmt: skip
        for name in ("saved_bytes", "whole_bytes", "scratch_bytes", "fixed_bytes"):
            tables = [dict(getattr(cls, name)) for cls in traced]
            changed[name] = tuple(
                (key, _linear([table[key] for table in tables], length)) for key in tables[-1]
            )
        # Scratch of the traced layer is scores; the kernel leaves that of the other arrays.
        changed["temp_bytes"] = dict(changed["saved_bytes"])["none"]
        # Half the pairs are masked; the backward computes scores again and four products of them.
        attention = last.attention_flops / TRACED[-1] ** 2 * pairs / 2
        changed["forward_flops"] += attention
        changed["backward_flops"] += 2.5 * attention
        changed["attention_flops"] = attention
        for name in ("inputs", "outputs"):
            changed[name] = tuple(_stretched(a, scale) for a in getattr(last, name))
        if last.products is not None:
            changed["products"] = tuple(
                replace(p, moved_bytes=p.moved_bytes * scale, key_bytes=p.key_bytes * scale)
                for p in last.products
            )
        return replace(last, **changed)


def _linear(values: Sequence[float], length: int) -> float:
    """The part of a figure that does not grow with the square of the length, at a length."""
    _, slope, constant = np.polyfit(TRACED, values, 2)
    return max(0.0, float(slope) * length + float(constant))


def _stretched(activation: Activation, scale: float) -> Activation:
    dim = activation.sequence_dim
    if dim is None:
        return activation
    shape = list(activation.shape)
    shape[dim] = round(shape[dim] * scale)
    return replace(activation, shape=tuple(shape))


@dataclass(frozen=True, eq=False)
class Priced:
    """One pipeline and what a micro-batch of rows takes on each of its stages.

    Attributes:
      plan: over its own devices.
      length: tokens of a row.
      row_s, pair_s: of each stage, seconds of a micro-batch: without attention, and for each
        pair of tokens in its rows.
      once_s: the update of the parameters.
      sum_s: adding gradients up with other pipelines.
      lent_s: bringing weights here from another plan, and gradients back.
    """

    plan: Plan
    length: int
    row_s: np.ndarray
    pair_s: np.ndarray
    once_s: float
    sum_s: float
    lent_s: float

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return self.plan.pipelines[0].microbatch

    @property
    def devices(self) -> int:
        return len(self.plan.devices)

    def compute_s(self, pairs: Sequence[float]) -> float:
        """Seconds for rows with so many pairs each, the update left out."""
        if not len(pairs):
            return 0.0
        # Rows of one micro-batch go in lockstep, so like goes with like.
        heaviest = np.sort(np.asarray(pairs, float))[::-1][:: self.rows]
        stages = self.row_s[None] + heaviest[:, None] * self.pair_s[None]
        slowest = stages.max(axis=1)
        return float(slowest.sum() + (stages.sum(axis=1) - slowest).max())

    def speed(self, typical_pairs: float) -> PipelineSpeed:
        """What the dispatcher is told."""
        stages = self.row_s + typical_pairs * self.pair_s
        slow = int(stages.argmax())
        return PipelineSpeed(
            self.length,
            float(self.row_s[slow]) / self.length / self.rows,
            float(self.pair_s[slow]) / self.rows,
            float(stages.sum() - stages.max()) + self.once_s + self.sum_s,
        )

    def __str__(self) -> str:
        pipeline = self.plan.pipelines[0]
        stage = pipeline.stages[0]
        return (
            f"{self.devices} devices, rows of {self.length:,}: {len(pipeline.stages)} stages, "
            f"{describe(stage.layers[0], stage.mesh)}, micro-batch {pipeline.microbatch}"
        )


class Planner:
    """Pipelines of a number of devices for rows of a length, each searched once."""

    def __init__(self, rows: Rows, steps: Sequence[Sequence[int]], options: SearchOptions) -> None:
        self._rows, self._steps, self._options = rows, steps, options
        self._sample = list(itertools.chain(*steps))
        self.priced = functools.lru_cache(maxsize=None)(self._priced)

    @functools.cache  # noqa: B019
    def typical_pairs(self, length: int) -> float:
        """Of a row packed with what fits into it."""
        short = [n for n in self._sample if n <= length]
        return float(np.mean(pairs_of(short, length)))

    def _priced(self, devices: int, length: int, batch: int) -> Priced | None:
        cluster, pairs = machines(devices), self.typical_pairs(length)
        work = Workload(batch, "bfloat16")
        try:
            plan = search(self._rows.graph(length, pairs), cluster, work, self._options).plan
        except (InfeasibleError, PlanError):
            return None
        pipeline = plan.pipelines[0]
        seconds, once_s, sum_s, stored = [], [], [], []
        for at in (0.0, float(length) ** 2):
            graph = self._rows.graph(length, at)
            stages = []
            for number, stage in enumerate(pipeline.stages):
                setting = setting_of(plan, pipeline, stage, graph, cluster, work)
                # Summed over the network of all 32, as one pipeline of several.
                setting = replace(setting, pipelines=2, known={})
                cost = stage_cost(pipeline, number, graph, setting)
                stages.append(cost.forward_s + cost.backward_s + cost.sent_s)
                once_s.append(cost.update_s)
                sum_s.append(cost.cross_s)
                # Master weights and at least one copy in bfloat16.
                stored.append(sum(layer.parameter_bytes for _, layer in cost.layers) / 6)
            seconds.append(np.array(stages))
        link = machines(DEVICES).inter_host
        return Priced(
            plan, length, seconds[0], (seconds[1] - seconds[0]) / float(length) ** 2,
            max(once_s), max(sum_s), (2 + 4) * max(stored) / link.bandwidth,
        )  # fmt: skip

    @functools.cache  # noqa: B019
    def best(self, devices: int, length: int) -> Priced | None:
        """The pipeline that is fastest with its devices' share of what fits of a step."""
        shares = [[n for n in step if n <= length][:: DEVICES // devices] for step in self._steps]
        near = round(math.log2(max(1.0, np.mean([sum(share) for share in shares]) / length)))
        batches = sorted({2 ** max(0, near + change) for change in (-1, 0, 1)})
        found = [p for batch in batches if (p := self.priced(devices, length, batch)) is not None]
        return min(found, key=lambda p: sum(packing_s(p, share) for share in shares), default=None)


def pairs_of(lengths: Sequence[int], row: int) -> list[float]:
    """Pairs of tokens in each row that sequences are packed into."""
    return [float(sum(lengths[i] ** 2 for i in items)) for items in pack(lengths, row)]


def padding_s(priced: Priced, lengths: Sequence[int]) -> float:
    return priced.compute_s([float(priced.length) ** 2] * len(lengths)) + priced.once_s


def packing_s(priced: Priced, lengths: Sequence[int]) -> float:
    return priced.compute_s(pairs_of(lengths, priced.length)) + priced.once_s


def switching_s(plans: dict[int, list[Priced]], lengths: Sequence[int]) -> float:
    """The best choice of buckets for this step, each packed under its fastest plan."""
    best = math.inf
    longest = next(b for b in BOUNDS if b >= max(lengths))
    shorter = [b for b in BOUNDS if b < longest]
    for count in range(len(shorter) + 1):
        for chosen in itertools.combinations(shorter, count):
            total, used = 0.0, set()
            for bound, numbers in buckets_of(lengths, (*chosen, longest)).items():
                here = [lengths[i] for i in numbers]
                seconds, plan = min(
                    ((p.compute_s(pairs_of(here, p.length)), p) for p in plans[bound]),
                    key=lambda pair: pair[0],
                )
                total += seconds
                used.add(plan)
            # One of the plans owns the state; weights are lent to the others.
            total += sum(sorted(p.lent_s for p in used)[:-1]) + max(p.once_s for p in used)
            best = min(best, total)
    return best


def unequal_s(
    planner: Planner, pipelines: Sequence[Priced], lengths: Sequence[int], gap: float = 0.02
) -> float:
    """Sequences dispatched, packed by each pipeline, the slowest one's seconds; inf if too long."""
    if max(lengths) > max(p.length for p in pipelines):
        return math.inf
    found = dispatch(lengths, [p.speed(planner.typical_pairs(p.length)) for p in pipelines], gap)
    slowest = max(
        p.compute_s([float(sum(lengths[i] ** 2 for i in batch)) for batch in batches])
        for p, batches in zip(pipelines, found.microbatches, strict=True)
    )
    several = len(pipelines) > 1
    return slowest + max(p.once_s + several * p.sum_s for p in pipelines)


def combinations_of(sizes: Sequence[int], left: int = DEVICES) -> Iterator[tuple[int, ...]]:
    """Every way to part the devices into pipelines, the largest first."""
    if left == 0:
        yield ()
    for size in sizes:
        if size <= left:
            for rest in combinations_of([s for s in sizes if s <= size], left - size):
                yield (size, *rest)


def shapes(planner: Planner, sizes: Sequence[int]) -> list[tuple[Priced, ...]]:
    """Every combination of pipelines, each with the row length that suits it."""
    out = []
    for combination in combinations_of(sizes):
        choices = []
        for size, count in sorted((s, combination.count(s)) for s in set(combination)):
            kinds = [p for bound in BOUNDS if (p := planner.best(size, bound)) is not None]
            choices.append(list(itertools.combinations_with_replacement(kinds, count)))
        out += [tuple(itertools.chain(*parts)) for parts in itertools.product(*choices)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="33b")
    parser.add_argument("--tokens", type=int, default=200_000, help="of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recompute", choices=["none", "selective", "full"], help="pin it")
    parser.add_argument("--context", type=int, help="pin the degree to which sequences are split")
    args = parser.parse_args()
    start = time.process_time()
    random = np.random.default_rng(0)
    steps = [step_lengths(random, args.tokens) for _ in range(args.steps)]
    # Plans are chosen on other steps than those that are timed.
    earlier = [step_lengths(random, args.tokens) for _ in range(10)]
    options = SearchOptions(recompute=args.recompute, context=args.context, rescore=1)
    planner = Planner(Rows(args.model), earlier, options)

    whole = {b: p for b in BOUNDS if (p := planner.best(DEVICES, b)) is not None}
    single = whole[LONGEST]
    many = planner.priced(DEVICES, LONGEST, 64) or single
    # A bucket may use rows longer than its bound: fewer of them are left partly empty.
    plans = {b: [p for length, p in whole.items() if length >= b] for b in BOUNDS}
    sizes = [n for n in (32, 16, 8, 4) if planner.best(n, BOUNDS[0]) is not None]
    candidates = shapes(planner, sizes)
    # Kept for each step's longest sequence apart, and for all steps.
    able = [c for c in candidates if max(p.length for p in c) == LONGEST]
    able.sort(key=lambda c: sum(unequal_s(planner, c, x, gap=1.0) for x in earlier[:4]))
    fixed = min(able[:20], key=lambda c: sum(unequal_s(planner, c, x) for x in earlier))
    kept = {fixed, *able[:10]}
    for bound in BOUNDS[:-1]:
        holds = [c for c in candidates if max(p.length for p in c) == bound]
        short = [[n for n in x if n <= bound] for x in earlier[:4]]
        holds.sort(key=lambda c, short=short: sum(unequal_s(planner, c, x, gap=1.0) for x in short))
        kept |= set(holds[:10])

    def chosen_s(lengths: Sequence[int]) -> float:
        own = unequal_s(planner, fixed, lengths)
        others = (unequal_s(planner, c, lengths) + max(p.lent_s for p in c) for c in kept - {fixed})
        return min(own, *others)

    rows = {
        "padding to 32,768": [padding_s(many, x) for x in steps],
        "packing, one plan": [packing_s(single, x) for x in steps],
        "hot switching by bucket, each packed": [switching_s(plans, x) for x in steps],
        "unequal pipelines, dispatched, the same every step": [
            unequal_s(planner, fixed, x) for x in steps
        ],
        "unequal pipelines, dispatched, chosen for each step": [chosen_s(x) for x in steps],
    }
    last = list(rows.values())[-1]
    print(f"one plan: {single}")
    for bound, plan in whole.items():
        print(f"bucket of {bound:,}: {plan}")
    for pipeline in fixed:
        print(f"unequal: {pipeline}")
    print("\n| contestant | mean step, s | against packing | against hot switching |")
    print("|---|---|---|---|")
    packing, hot = (float(np.mean(list(rows.values())[i])) for i in (1, 2))
    for name, seconds in rows.items():
        mean = float(np.mean(seconds))
        print(f"| {name} | {mean:.2f} | {packing / mean:.2f} | {hot / mean:.2f} |")
    print(json.dumps({
        "sequences": float(np.mean([len(x) for x in steps])),
        "tokens": float(np.mean([sum(x) for x in steps])),
        "combinations": len(candidates), "cpu_s": round(time.process_time() - start, 1),
        "ahead_of_hot": float(np.mean(list(rows.values())[2]) / np.mean(last)),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
