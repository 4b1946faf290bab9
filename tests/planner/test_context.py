"""Sequences are split only where that can be best: against every degree and place tried."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from shardpar.errors import PlanError
from shardpar.planner.cost import plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.search import search
from shardpar.planner.setting import Workload
from shardpar.planner.strategies import Pins, describe, layer_strategies
from shardpar.spec.check import check
from shardpar.spec.cluster import Link
from shardpar.spec.graph import Product
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from tests.planner.cases import cluster_of, gpt, priced

FIXED = SearchOptions(stages=1, recompute="none", zero1=1, sequence_parallel=False)


def attentive(key_bytes: float = 4096.0, heads: int = 4):
    """The demo GPT, its attention known."""
    size = 2 * key_bytes
    scores = Product("right", 1, 1, 0, 1, True, heads, size, key_bytes)
    values = replace(scores, keys="left", query_dim=3, scores=False)
    return replace(
        gpt(),
        classes=tuple(
            replace(c, products=(scores, values) if c.name == "Block" else ())
            for c in gpt().classes
        ),
    )


def every_uniform(graph, cluster, batch, devices):
    """Every plan of one strategy, each set of axes splitting sequences, in any order."""
    mesh = Mesh.factored(devices)
    for strategy in layer_strategies(mesh, Pins(recompute="none", zero1=1)):
        data = strategy.data_axes(mesh)
        for count in range(len(data) + 1):
            for context in itertools.permutations(data, count):
                for way in ("gather", "heads"):
                    entry = replace(
                        strategy, layers="embed..outside", context=context, attention=way
                    )
                    stage = Stage(tuple(range(devices)), mesh, (entry,))
                    for microbatch in range(1, batch + 1):
                        if batch % microbatch:
                            continue
                        pipeline = Pipeline(batch, microbatch, (stage,))
                        plan = Plan(cluster.name, batch, (pipeline,))
                        try:
                            check(plan, graph, cluster)
                        except PlanError:
                            continue
                        yield plan


@pytest.mark.parametrize("batch", [1, 2, 6, 8])
@pytest.mark.parametrize("key_bytes", [64.0, 1e6])
@pytest.mark.parametrize("bandwidth", [1e8, 1e11])
def test_no_uniform_plan_that_splits_sequences_otherwise_is_better(batch, key_bytes, bandwidth):
    graph, work = attentive(key_bytes), Workload(batch, loops=False)
    cluster = replace(cluster_of(8), intra_host=Link(bandwidth, 1e-6))
    found = search(graph, cluster, work, FIXED)
    assert found.plan.objective.gap == 0.0
    best = min(
        plan_cost(plan, graph, cluster, work).step_s
        for plan in every_uniform(graph, cluster, batch, 8)
    )
    assert found.cost.step_s <= best * (1 + 1e-9)


def test_one_long_sequence_uses_all_devices():
    graph = attentive()
    found = search(graph, cluster_of(4), Workload(1, loops=False), replace(FIXED, tensor=1))
    (stage,) = found.plan.pipelines[0].stages
    assert all(s.context == ("a", "b") for s in stage.layers)
    assert found.cost.step_s < priced(graph, 1, Workload(1, loops=False), 1).step_s


def test_where_the_batch_can_be_split_sequences_are_not():
    for strategy in layer_strategies(Mesh.factored(8), microbatch=8):
        assert strategy.context == ()
    contexts = {(s.tensor, s.context) for s in layer_strategies(Mesh.factored(8), microbatch=2)}
    assert (("c",), ("b",)) in contexts
    assert ((), ("b", "c")) in contexts


def test_a_pinned_degree_splits_the_innermost_data_axes():
    found = list(layer_strategies(Mesh.factored(8), Pins(tensor=2, context=2, attention="heads")))
    assert {(s.context, s.attention) for s in found} == {(("b",), "heads")}
    assert list(layer_strategies(Mesh.factored(8), Pins(context=3))) == []


def test_it_is_called_as_people_call_it():
    mesh = Mesh.factored(8)
    by_heads = LayerStrategy("", ("c",), context=("b",), attention="heads")
    assert describe(by_heads, mesh) == "dp2 tp2 cp2 by heads"
    gathered = LayerStrategy("", fsdp=("a", "b", "c"), context=("b", "c"))
    assert describe(gathered, mesh) == "fsdp8 cp4"
