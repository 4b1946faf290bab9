"""Sequences split over devices: the same training, and no more traffic than was priced."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardpar.capture.trace import trace
from shardpar.config.model_source import load_model_source
from shardpar.errors import PlanError
from shardpar.lowering.collectives import collectives
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.program import Program
from shardpar.planner.setting import Workload
from shardpar.planner.traffic import predicted_collectives
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from tests.lowering.tiny import captured
from tests.planner.cases import cluster_of

LENGTH, STEPS = 32, 3
GATHER = {"context": ("b", "c")}
HEADS = {"context": ("b", "c"), "attention": "heads"}
PLANS = {
    "gathered": GATHER,
    "by heads": HEADS,
    "gathered, tensor parallel and sequence parallel": {
        "context": ("b",), "tensor": ("c",), "sequence_parallel": True
    },
    "by heads, tensor parallel": {"context": ("b",), "tensor": ("c",), "attention": "heads"},
    "gathered, fsdp, full recompute": {**GATHER, "fsdp": ("a", "b", "c"), "recompute": "full"},
    "by heads, zero1, selective": {**HEADS, "zero1": ("a", "b"), "recompute": "selective"},
    "all devices on one sequence": {"context": ("a", "b", "c")},
}  # fmt: skip


def llama():
    source = load_model_source(Path(__file__).parents[2] / "models" / "llama.py")
    options = source.LlamaOptions(
        vocab_size=64, layers=2, width=64, heads=8, kv_heads=4, mlp_width=96, max_length=LENGTH
    )
    tokens = jax.ShapeDtypeStruct((8, LENGTH), jnp.int32)
    return trace(
        source.loss,
        lambda rngs: source.build(options, rngs),
        {"inputs": tokens, "targets": tokens},
        causal=True,
    )


SOURCES = {"gpt": captured, "llama with grouped queries": llama}


def plan_of(devices: int, batch: int = 2, microbatch: int | None = None, **choices) -> Plan:
    stage = Stage(
        tuple(range(devices)), Mesh.factored(devices), (LayerStrategy("embed..outside", **choices),)
    )
    return Plan("test", batch, (Pipeline(batch, microbatch or batch, (stage,)),))


def trained(source, plan: Plan, **options):
    program = Program(source, plan, optax.sgd(0.1), ProgramOptions(**options))
    random = np.random.default_rng(0)
    state, losses = program.init(0), []
    for _ in range(STEPS):
        batch = {
            name: random.integers(0, 64, (plan.global_batch, LENGTH)).astype(np.int32)
            for name in ("inputs", "targets")
        }
        state, metrics = program.step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, {name: np.asarray(value) for name, value in state.params.items()}


@pytest.fixture(scope="module", params=SOURCES)
def model(request):
    source = SOURCES[request.param]()
    return source, trained(source, plan_of(1))


@pytest.mark.parametrize("name", PLANS)
def test_a_split_sequence_trains_like_one_device(name, model):
    source, (losses, params) = model
    got_losses, got = trained(source, plan_of(8, **PLANS[name]))
    np.testing.assert_allclose(got_losses, losses, rtol=2e-5)
    for path, value in params.items():
        np.testing.assert_allclose(got[path], value, rtol=2e-4, atol=2e-6, err_msg=path)


def test_loops_and_micro_batches_change_nothing(model):
    source, (losses, _) = model
    plan = plan_of(8, microbatch=1, context=("a", "b", "c"), recompute="full")
    got, _ = trained(source, plan, layers="scan")
    np.testing.assert_allclose(got, losses, rtol=2e-5)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("choices", [GATHER, HEADS], ids=["gathered", "by heads"])
def test_what_attention_sends_is_what_was_priced(choices, recompute):
    """Gradients of gathered keys come back scattered; XLA:CPU may say so as a sum and a slice."""
    source, plan = llama(), plan_of(8, recompute=recompute, **choices)
    program = Program(source, plan, optax.sgd(0.1), ProgramOptions(layers="unroll"))
    compiled = collectives(program.compiled_step.as_text())
    kind = "all-to-all" if choices is HEADS else "all-gather"
    predicted = {
        c[0]: (c[2], c[3])
        for c in predicted_collectives(plan, source.graph, cluster_of(8), Workload(2))
    }
    found = {c.kind: (c.count, c.num_bytes) for c in compiled if c.group_size == 4}
    assert found[kind][1] == predicted[kind][1]


def test_a_sequence_that_does_not_divide_is_refused():
    with pytest.raises(PlanError, match="sequence length 32 is not divisible by context axes a"):
        Program(captured(), plan_of(3, batch=3, context=("a",)), optax.sgd(0.1))


def test_heads_that_do_not_divide_are_refused_with_what_would_do():
    plan = plan_of(16, context=("a", "b", "c", "d"), attention="heads")
    with pytest.raises(PlanError, match=r"8 heads, .* \(16\) do not divide; write attention: gath"):
        Program(captured(), plan, optax.sgd(0.1))
