"""Unequal pipelines on 16 fast and 32 slow GPUs against the best uniform plans, in the simulator.

    python -m benchmarks.planner_unequal
    python -m benchmarks.planner_unequal --context 1      # sequences may not be split
    python -m benchmarks.planner_unequal --pipelines 2    # two pipelines or more

The cluster is that of Hetu's HSPMD paper (configs/clusters/h800x16-h20x32.yaml), the model a
LLaMA of 33 billion parameters, 64 sequences of 4,096 tokens a step. "Uniform" is what a planner
for equal devices can say: one strategy for all layers and equal stages, each with as many devices,
layers and sequences as the others, over all 48 GPUs or over one kind alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.llama_graph import llama_graph
from shardpar.errors import PlanError
from shardpar.planner.cost import plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.search import search
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import simulate
from shardpar.planner.strategies import describe, layer_strategies
from shardpar.spec.check import check
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.text import cluster_from_text, plan_to_text

BATCH, LENGTH = 64, 4096
CLUSTER = Path(__file__).parents[1] / "configs" / "clusters" / "h800x16-h20x32.yaml"


def uniform_plans(graph: LayerGraph, devices: tuple[int, ...]) -> Iterator[tuple[str, Plan]]:
    """Every plan of equal pipelines of equal stages with one strategy, whether it fits or not."""
    names = [layer.name for layer in graph.layers]
    blocks = len(names) - 3
    for depth in (d for d in range(1, len(devices) + 1) if len(devices) % d == 0):
        if blocks % depth:
            continue
        each = blocks // depth
        cuts = [0, *(1 + each * (i + 1) for i in range(depth - 1)), len(names)]
        for copies in (c for c in range(1, len(devices) // depth + 1)):
            if (len(devices) // depth) % copies or BATCH % copies or (copies > 1 and depth == 1):
                continue
            size = len(devices) // depth // copies
            mesh = Mesh.factored(size)
            share = BATCH // copies
            for microbatch in (m for m in (1, 2, 4, 8, 16, 32, 64) if share % m == 0):
                for strategy in layer_strategies(mesh, most_tensor=8, microbatch=microbatch):
                    if microbatch % mesh.size_of(strategy.batch_axes(mesh)):
                        continue
                    text = f"{copies} pipelines x {depth} stages, {describe(strategy, mesh)}"
                    yield (
                        f"{text}, micro-batch {microbatch}",
                        plan_of(devices, names, cuts, copies, size, strategy, share, microbatch),
                    )


def plan_of(
    devices: tuple[int, ...], names: list[str], cuts: list[int], copies: int, size: int,
    strategy: LayerStrategy, share: int, microbatch: int,
) -> Plan:  # fmt: skip
    depth = len(cuts) - 1
    pipelines = []
    for c in range(copies):
        stages = []
        for s in range(depth):
            # A stage's copies lie side by side, so that a pipeline crosses the kinds in order.
            start = (s * copies + c) * size
            first, last = names[cuts[s]], names[cuts[s + 1] - 1]
            layers = first if first == last else f"{first}..{last}"
            stages.append(
                Stage(
                    devices[start : start + size], Mesh.factored(size),
                    (replace(strategy, layers=layers),),
                )
            )  # fmt: skip
        pipelines.append(Pipeline(share, microbatch, tuple(stages)))
    return Plan("uniform", share * copies, tuple(pipelines))


def best_uniform(
    graph: LayerGraph, cluster: Cluster, work: Workload, devices: tuple[int, ...]
) -> tuple[float, str] | None:
    """(simulated seconds, description) of the best uniform plan that fits."""
    limit = 0.9 * min(cluster.kind_of(d).memory_bytes for d in devices)
    best: tuple[float, str] | None = None
    for text, plan in uniform_plans(graph, devices):
        try:
            check(plan, graph, cluster)
        except PlanError:
            continue
        cost = plan_cost(plan, graph, cluster, work)
        if cost.peak_bytes > limit or (best is not None and cost.step_s > 1.1 * best[0]):
            continue
        step_s = simulate(plan, cost).step_s
        if best is None or step_s < best[0]:
            best = step_s, text
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, help="pin the degree to which sequences are split")
    parser.add_argument("--pipelines", type=int, help="1 for one pipeline, 2 for several")
    args = parser.parse_args()
    graph = llama_graph(BATCH, LENGTH, layers=60, width=6656, heads=52, mlp_width=17920)
    cluster = cluster_from_text(CLUSTER.read_text(), str(CLUSTER))
    work = Workload(BATCH, graph.compute_dtype)
    start = time.process_time()
    found = search(
        graph, cluster, work, SearchOptions(context=args.context, pipelines=args.pipelines)
    )
    cpu_s = time.process_time() - start
    ours = found.simulated_s
    print(plan_to_text(found.plan))
    everything = tuple(range(cluster.num_devices))
    fast = tuple(d for d in everything if cluster.kind_of(d).name == "h800")
    slow = tuple(d for d in everything if d not in fast)
    rows = {}
    for name, devices in (("all 48", everything), ("16 H800", fast), ("32 H20", slow)):
        best = best_uniform(graph, cluster, work, devices)
        rows[name] = best
        print(f"best uniform plan on {name}: {best}")
    known = [row[0] for row in rows.values() if row is not None]
    assert found.plan.objective is not None
    print(json.dumps({
        "shares": [p.sequences for p in found.plan.pipelines],
        "stages": [len(p.stages) for p in found.plan.pipelines],
        "step_s": found.cost.step_s, "gap": found.plan.objective.gap, "simulated_s": ours,
        "cpu_s": round(cpu_s, 1), "best_uniform_s": min(known), "speedup": min(known) / ours,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
