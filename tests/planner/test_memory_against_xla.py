"""Predicted bytes per device against what XLA allots to the compiled step."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest

from models import gpt
from shardpar.capture.trace import trace
from shardpar.lowering.devices import CPU_EXTRA_COPIES
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.program import Program
from shardpar.planner.options import SearchOptions
from shardpar.planner.search import search
from shardpar.planner.setting import Workload
from shardpar.spec.parameters import optimizer_layout, parameter_layout
from shardpar.spec.select import strategies
from tests.planner.cases import cluster_of

BATCH, LENGTH = 64, 64


@pytest.fixture(scope="module")
def captured():
    options = gpt.GPTOptions(vocab_size=512, layers=4, width=128, heads=4, max_length=LENGTH)
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    return trace(
        gpt.loss,
        lambda rngs: gpt.build(options, rngs),
        {"inputs": tokens, "targets": tokens},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "data", "fsdp", "tensor", "recompute", "parallel"),
    [
        (8, 8, 1, 1, "full", False),
        (8, 1, 8, 1, "full", False),
        (4, 1, 1, 4, "full", False),
        (8, 2, 1, 4, "none", True),
        (8, 1, 2, 4, "selective", True),
    ],
)
def test_the_prediction_is_within_a_quarter(
    captured, devices, data, fsdp, tensor, recompute, parallel
):
    pins = SearchOptions(
        data=data, fsdp=fsdp, tensor=tensor, zero1=1, recompute=recompute,
        sequence_parallel=parallel, microbatch=BATCH // data // fsdp, stages=1,
    )  # fmt: skip
    cluster = cluster_of(devices)
    kinds = tuple(replace(kind, extra_copies=CPU_EXTRA_COPIES) for kind in cluster.kinds)
    found = search(captured.graph, replace(cluster, kinds=kinds), Workload(BATCH), pins)
    program = Program(captured, found.plan, optax.adam(1e-3), ProgramOptions(layers="scan"))
    memory = program.compiled_step.memory_analysis()
    actual = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    assert actual / 1.25 < found.cost.peak_bytes < actual * 1.25
    # What goes in is known to the byte: weights, two moments, the batch, and two counters.
    (stage,) = found.plan.pipelines[0].stages
    chosen = strategies(stage, captured.graph)
    elements = sum(
        math.prod(layout(parameter, chosen[layer.name], stage.mesh).shard_shape(parameter.shape))
        for layout in (parameter_layout, optimizer_layout, optimizer_layout)
        for _, layer, parameter in captured.graph.parameters
    )
    tokens = 2 * BATCH * LENGTH // data // fsdp
    assert memory.argument_size_in_bytes == 4 * (elements + tokens + 2)
    print(f"{found.description}: {found.cost.peak_bytes / actual:.2f}")
