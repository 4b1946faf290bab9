"""What a loop of layers keeps for its backward: never a weight that fsdp has gathered."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
import pytest

from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.program import Program
from tests.lowering.tiny import BATCH, LENGTH, captured, uniform

ROWS = BATCH * LENGTH


def kept_shapes(plan):
    """Shapes that the loop over the blocks hands to its backward, per turn."""
    # No dim of a weight is as long as the batch, the sequence or both together.
    source = captured(heads=4, mlp_ratio=2)
    weights = [p for _, layer, p in source.graph.parameters if layer.class_name == "Block"]
    assert not {BATCH, LENGTH, ROWS} & {size for p in weights for size in p.shape}
    program = Program(source, plan, optax.sgd(0.1), ProgramOptions(layers="scan"))
    forward = program._forward(training=True)
    params = {n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in source.model.params.items()}
    batch = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in source.batch.items()}

    def gradient(params, batch):
        return jax.grad(lambda p: forward(p, {}, batch)[0])(params)

    jaxpr = jax.make_jaxpr(gradient)(params, batch).jaxpr
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(scans) == 2, "one loop forward, one back"
    kept = scans[0].outvars[scans[0].params["num_carry"] :]
    read = {id(v) for v in scans[1].invars}
    assert {v.aval.dtype for v in kept} == {jnp.dtype("float32")}
    return [v.aval.shape[1:] for v in kept if id(v) in read]


def made_of_weights(shapes):
    return [shape for shape in shapes if not {BATCH, LENGTH, ROWS} & set(shape)]


@pytest.mark.parametrize(
    "choices",
    [
        {"fsdp": ("a", "b", "c")},
        {"fsdp": ("b",)},
        {"fsdp": ("b",), "tensor": ("c",)},
        {"fsdp": ("a", "b"), "tensor": ("c",), "sequence_parallel": True},
        {"fsdp": ("a", "b", "c"), "recompute": "selective"},
        {"tensor": ("b", "c"), "sequence_parallel": True},
    ],
)
def test_no_gathered_weight_is_kept(choices):
    shapes = kept_shapes(uniform(**choices))
    assert len(shapes) >= 2
    assert made_of_weights(shapes) == []


def test_a_layer_that_gathers_nothing_may_keep_views_of_its_weights():
    """What the test above would see if gathered weights were kept."""
    shapes = kept_shapes(uniform())
    assert made_of_weights(shapes) != []


def test_full_recompute_keeps_the_stream_alone():
    shapes = kept_shapes(uniform(fsdp=("a", "b", "c"), recompute="full"))
    assert shapes == [(BATCH, LENGTH, 64)]


@pytest.mark.parametrize(
    "choices",
    [
        {"fsdp": ("a", "b", "c")},
        {"fsdp": ("a",), "tensor": ("b", "c"), "sequence_parallel": True},
        {"fsdp": ("a", "b", "c"), "recompute": "selective"},
        {"tensor": ("b", "c"), "recompute": "selective"},
        {"recompute": "full"},
    ],
)
def test_what_is_kept_is_as_much_as_the_planner_counts(choices):
    graph = captured(heads=4, mlp_ratio=2).graph
    block = next(cls for cls in graph.classes if cls.name == "Block")
    num_bytes = sum(4 * math.prod(shape) for shape in kept_shapes(uniform(**choices)))
    gathers = "fsdp" in choices or "sequence_parallel" in choices
    assert num_bytes == block.saved(choices.get("recompute", "none"), gathers)
