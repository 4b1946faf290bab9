"""A plan for 100 layers on 1,024 devices of three kinds: its gap, and what finding it costs.

    python -m benchmarks.planner_scale
    python -m benchmarks.planner_scale --units 2      # pipelines may share a kind: finer, slower

The model is LLaMA with 98 blocks, embedding and head, 1,024 sequences a step; the cluster has 512
H100, 256 A100 and 256 H20. The target: a gap of at most 1% in at most 30 CPU-seconds and 4 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

from benchmarks.llama_graph import llama_graph
from shardpar.planner.cost import plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.pipeline import Problem
from shardpar.planner.pipelines import best_combination
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import simulate
from shardpar.spec.cluster import Cluster, Hosts, Link
from shardpar.spec.datasheet import lookup
from shardpar.spec.plan import Objective, Plan

BATCH, LENGTH = 1024, 4096


def cluster() -> Cluster:
    kinds = []
    hosts = []
    for name, count in (("H100", 64), ("A100 80GB", 32), ("H20", 32)):
        known = lookup(f"NVIDIA {name}")
        assert known is not None
        kinds.append(known[0])
        hosts.append(Hosts(known[0].name, 8, count))
    return Cluster("1024-of-3", tuple(kinds), tuple(hosts), Link(200e9), Link(50e9))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--units", type=int, default=1, help="Units each kind is handed out in.")
    parser.add_argument("--epsilon", type=float, default=0.01)
    parser.add_argument("--blocks", type=int, default=98)
    args = parser.parse_args()
    graph, machines = llama_graph(BATCH, LENGTH, args.blocks, 4096, 32, 11008), cluster()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    work = Workload(BATCH, graph.compute_dtype)
    problem = Problem(graph, machines, work, SearchOptions(epsilon=args.epsilon))
    found = best_combination(problem, most_units=args.units)
    cpu_s = time.process_time() - start
    assert found is not None
    plan = Plan(
        machines.name, BATCH, found.pipelines, Objective(found.step_s, found.lower_bound_s, 0.0)
    )
    assert plan.objective is not None
    cost = plan_cost(plan, graph, machines, work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for pipeline in plan.pipelines:
        stages = [
            f"{len(s.devices)} {machines.kind_of(s.devices[0]).name}" for s in pipeline.stages
        ]
        print(
            f"{pipeline.sequences} sequences, micro-batch {pipeline.microbatch}: "
            + " | ".join(stages)
        )
    print(json.dumps({
        "layers": len(graph.layers), "devices": machines.num_devices, "step_s": found.step_s,
        "lower_bound_s": found.lower_bound_s, "gap": round(plan.objective.gap, 5),
        "cpu_s": round(cpu_s, 2), "rss_gb": round(peak / 1e6, 2),
        "search_gb": round((peak - before) / 1e6, 2), "priced_step_s": cost.step_s,
        "simulated_s": simulate(plan, cost).step_s,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
