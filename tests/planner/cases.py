"""The captured demo GPT as a value, and clusters with round numbers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from shardpar.planner.cost import PlanCost, plan_cost
from shardpar.planner.setting import Workload
from shardpar.spec.cluster import Cluster, DeviceKind, Hosts, Link
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.text import graph_from_text

GOLDEN = Path(__file__).parents[1] / "golden"
ADAM = Workload(8, "float32", 2.0, loops=False)


@cache
def gpt() -> LayerGraph:
    return graph_from_text((GOLDEN / "gpt_graph.txt").read_text())


def cluster_of(devices: int = 8, hosts: int = 1, memory_bytes: float = 16e9) -> Cluster:
    kind = DeviceKind(
        "unit",
        (("bfloat16", 4e12), ("float32", 1e12)),
        memory_bytes,
        memory_bandwidth=1e11,
        efficiency=0.5,
    )
    links = Link(1e10, 1e-5), Link(1e9, 1e-4)
    return Cluster(f"unit-{hosts}x{devices}", (kind,), (Hosts("unit", devices, hosts),), *links)


def uniform(
    graph: LayerGraph, devices: int = 1, microbatch: int = 8, batch: int = 8, **strategy
) -> Plan:
    first, last = graph.layers[0].name, graph.layers[-1].name
    entry = LayerStrategy(first if first == last else f"{first}..{last}", **strategy)
    stage = Stage(tuple(range(devices)), Mesh.factored(devices), (entry,))
    return Plan("hand", batch, (Pipeline(batch, microbatch, (stage,)),))


def priced(
    graph: LayerGraph,
    devices: int = 1,
    work: Workload = ADAM,
    microbatch: int | None = None,
    **strategy,
) -> PlanCost:
    batch = work.global_batch
    plan = uniform(graph, devices, microbatch or batch, batch, **strategy)
    return plan_cost(plan, graph, cluster_of(max(devices, 1)), work)
