"""The cut program says what the traced one says, and its cuts are where the layers are."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import gpt, llama
from shardpar.capture.cut import cut
from shardpar.capture.layers import marked_class
from shardpar.capture.model import abstract_model, loss_and_weight
from shardpar.errors import CaptureError
from tests.capture import nets
from tests.capture.nets import (
    BATCH,
    WIDTH,
    Dense,
    Pair,
    X,
    assert_same,
    given_rngs,
    mse,
    run_cut,
)

TOKENS = {k: jax.ShapeDtypeStruct((4, 8), jnp.int32) for k in ("inputs", "targets")}
SMALL = {"vocab_size": 32, "width": 16, "heads": 2, "max_length": 8}


def tokens(key):
    drawn = jax.random.randint(jax.random.key(key), (4, 9), 0, 32)
    return {"inputs": drawn[:, :-1], "targets": drawn[:, 1:]}


def gpt_of(**options):
    return lambda rngs: gpt.build(gpt.GPTOptions(**SMALL, **options), rngs)


def llama_of(**options):
    return lambda rngs: llama.build(llama.LlamaOptions(**SMALL, mlp_width=24, **options), rngs)


CASES = {
    "gpt tied, dropout": (gpt_of(layers=1, dropout=0.3), gpt.loss, TOKENS),
    "llama, grouped queries": (llama_of(layers=1, kv_heads=1), llama.loss, TOKENS),
    "skips": (nets.Skips, mse, X),
    "shared": (nets.Shared, mse, X),
    "nested": (nets.Nested, mse, X),
    "jitted inside": (nets.JittedInside, mse, X),
    "masks": (nets.Masked, mse, X),
    "rngs": (given_rngs(nets.shardpar.layer), mse, X),
    "variables": (nets.given_variables(nets.shardpar.layer), mse, X),
    "scanned": (nets.Scanned, mse, X),
    "unmarked": (nets.Unmarked, mse, X),
}


EVALUATED = ("masks", "rngs")


@pytest.mark.parametrize(
    ("case", "training"), [*((c, True) for c in CASES), *((c, False) for c in EVALUATED)]
)
def test_the_cut_program_has_the_loss_the_gradient_and_the_state_of_the_original(case, training):
    init, loss, shapes = CASES[case]
    model = abstract_model(init)
    program = cut(model, loss, shapes, training=training)
    params, rest = model.create(0)
    batch = {"x": jax.random.normal(jax.random.key(5), (BATCH, WIDTH))}
    batch = tokens(5) if shapes is TOKENS else batch

    def original(params, rest):
        module = model.merge(params, rest)
        if not training:
            module.eval()
        total, weight = loss_and_weight(loss(module, batch), len(next(iter(batch.values()))))
        return total, (weight, model.split(module)[1])

    def cut_apart(params, rest):
        total, weight, changed = run_cut(program, params, rest, batch)
        return total, (weight, changed)

    jitted = [jax.jit(jax.value_and_grad(f, has_aux=True)) for f in (cut_apart, original)]
    for _ in range(2 if training and rest else 1):
        got, expected = (f(params, rest) for f in jitted)
        assert_same(got, expected, exact=False)
        changed = got[0][1][1]
        assert set(changed) == set(rest)
        rest = changed


def names(init, loss=mse, shapes=X):
    return [call.name for call in cut(abstract_model(init), loss, shapes).calls]


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        (nets.Skips, ["blocks[0]", "blocks[1]", "blocks[2]", "blocks[3]"]),
        (
            nets.Shared,
            ["first", "middle", "middle@2", "middle@3", "last"],
        ),
        (nets.Nested, ["pairs[0]", "pairs[1]", "tail"]),
        (nets.JittedInside, ["blocks[0]", "blocks[1]", "blocks[2]"]),
        (nets.Masked, ["blocks[0]", "blocks[1]", "blocks[2]"]),
        (nets.given_variables(nets.shardpar.layer), ["reader"]),
        (Dense, ["dense"]),
        (nets.Scanned, []),
        (nets.Unmarked, []),
    ],
)
def test_layers_are_named_after_their_place_in_the_model(init, expected):
    assert names(init) == expected


def test_a_gpt_is_cut_into_embed_blocks_and_head():
    program = cut(abstract_model(gpt_of(layers=3)), gpt.loss, TOKENS)
    assert [(c.name, c.path, c.class_name) for c in program.calls] == [
        ("embed", "embed", "Embed"),
        *((f"blocks[{i}]", f"blocks.{i}", "Block") for i in range(3)),
        ("head", "head", "Head"),
    ]
    first, *others = program.calls[1:4]
    assert all(block.jaxpr is first.jaxpr for block in others)
    eqns = program.closed.jaxpr.eqns
    assert [marked_class(eqns[c.position]) for c in program.calls] == [
        c.class_name for c in program.calls
    ]
    assert sum(marked_class(e) is not None for e in eqns) == 5
    # Which parameter stands behind which input: the tied head reads the embedding's table.
    head = program.calls[-1]
    assert {n for n in head.parameters if n} == {
        "head.norm.scale", "head.norm.bias", "embed.table",
    }  # fmt: skip
    assert {n for n in first.parameters if n} == {
        n for n in abstract_model(gpt_of(layers=3)).params if n.startswith("blocks.0.")
    }


def test_a_layer_that_reads_more_of_another_than_of_itself_keeps_its_name():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Pair(rngs) for _ in range(2)])
            for name in ("a", "b"):
                getattr(self.blocks[1], name).linear.kernel = getattr(
                    self.blocks[0], name
                ).linear.kernel
            self.blocks[1].b.linear.bias = self.blocks[0].b.linear.bias

        def __call__(self, x):
            return self.blocks[1](self.blocks[0](x))

    program = cut(abstract_model(Tied), mse, X)
    assert [call.name for call in program.calls] == ["blocks[0]", "blocks[1]"]
    assert sum(name == "blocks.1.a.linear.bias" for name in program.calls[1].parameters) == 1


def test_the_inputs_and_outputs_of_the_program_are_named():
    model = abstract_model(nets.Masked)
    program = cut(model, mse, X)
    assert program.inputs == (
        *(("params", name) for name in sorted(model.params)),
        *(("rest", name) for name in sorted(model.rest)),
        ("batch", "x"),
    )
    assert program.outputs == tuple(sorted(model.rest))
    assert len(program.closed.jaxpr.outvars) == 2 + len(model.rest)


def test_jits_that_hold_no_layer_are_left_closed():
    inner = jax.jit(lambda x: jnp.sin(x) + 1)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.block = Dense(rngs)

        def __call__(self, x):
            return inner(self.block(inner(x)))

    program = cut(abstract_model(Net), mse, X)
    jits = [e for e in program.closed.jaxpr.eqns if e.primitive.name in ("jit", "pjit")]
    assert [marked_class(e) for e in jits] == [None, "Dense", None]


@pytest.mark.parametrize("init", [nets.Scanned, nets.Remat])
def test_layers_that_cannot_be_cut_apart_are_named(init):
    program = cut(abstract_model(init), mse, X)
    assert program.hidden_layers == ("Dense",)
    assert program.calls == ()


def test_parameters_have_the_compute_dtype_inside_the_model():
    model = abstract_model(gpt_of(layers=1))
    program = cut(model, gpt.loss, TOKENS, compute_dtype="bfloat16")
    dtypes = {
        kind: {str(v.aval.dtype) for v, (k, _) in zip(
            program.closed.jaxpr.invars, program.inputs, strict=True) if k == kind}
        for kind in ("params", "batch")
    }  # fmt: skip
    assert dtypes == {"params": {"bfloat16"}, "batch": {"int32"}}
    assert {str(leaf.dtype) for leaf in model.params.values()} == {"float32"}


def the_mean(model, batch):
    return jnp.mean(model(batch["x"]))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (the_mean, (0.5 * BATCH, BATCH)),
        (lambda m, b: (4 * the_mean(m, b), jnp.int32(3)), (2.0, 3)),
        (lambda m, b: (4 * the_mean(m, b), 3), (2.0, 3)),
        (lambda m, b: jnp.float16(the_mean(m, b)), (0.5 * BATCH, BATCH)),
    ],
)
def test_a_mean_counts_for_its_sequences_and_a_sum_for_its_weight(loss, expected):
    class Half(nnx.Module):
        def __init__(self, rngs):
            self.half = nnx.Param(jnp.float32(0.5))

        def __call__(self, x):
            return self.half * jnp.ones_like(x)

    model = abstract_model(Half)
    program = cut(model, loss, X)
    params, rest = model.create(0)
    total, weight, _ = run_cut(program, params, rest, {"x": jnp.zeros((BATCH, WIDTH))})
    assert (float(total), float(weight)) == expected
    assert total.dtype == weight.dtype == jnp.float32


F = jnp.float32
WRONG = "the loss cannot be traced for batch {x: (8, 4)}: "


@pytest.mark.parametrize(
    ("loss", "batch", "message"),
    [
        (
            lambda m, b: m(b["x"]), X,
            "the loss returned an array of shape (8, 4); return a scalar mean, or (sum, weight)",
        ),
        (
            lambda m, b: (jnp.sum(m(b["x"])), jnp.ones(3)), X,
            "the loss returned an array of shape (3,); return a scalar mean, or (sum, weight)",
        ),
        (
            lambda m, b: (1.0, 2.0, jnp.ones(3)), X,
            "the loss returned a tuple; return a scalar mean, or (sum, weight)",
        ),
        (
            lambda m, b: {"loss": 1.0}, X,
            "the loss returned a dict; return a scalar mean, or (sum, weight)",
        ),
        (lambda m, b: mse(m, {"x": b["y"]}), X, WRONG + "KeyError: 'y'"),
        (
            lambda m, b: m(b["x"].T), X,
            WRONG + "TypeError: dot_general requires contracting dimensions to have the same "
            "shape, got (8,) and (4,).",
        ),
        (lambda m, b: m.missing, X, WRONG + "AttributeError: 'Dense' object has no attribute "
         "'missing'"),
        (lambda m, b: 1 / 0, X, WRONG + "ZeroDivisionError: division by zero"),
        (
            mse, {"x": X["x"], "y": jax.ShapeDtypeStruct((4,), F)},
            "the batch's arrays must share their first dim, the sequences; got "
            "{x: (8, 4), y: (4,)}",
        ),
        (
            mse, {"x": jax.ShapeDtypeStruct((), F)},
            "the batch's arrays must share their first dim, the sequences; got {x: ()}",
        ),
        (mse, {}, "the batch's arrays must share their first dim, the sequences; got {}"),
    ],
)  # fmt: skip
def test_a_loss_that_cannot_be_captured_says_why(loss, batch, message):
    with pytest.raises(CaptureError) as error:
        cut(abstract_model(Dense), loss, batch)
    assert str(error.value).startswith(message)


def test_an_error_without_words_is_still_a_capture_error():
    def loss(model, batch):
        raise NotImplementedError

    with pytest.raises(CaptureError) as error:
        cut(abstract_model(Dense), loss, X)
    assert str(error.value).startswith(WRONG + "NotImplementedError: ")
    # A person looks for the line in their own code, not in jax's.
    assert re.search(r"\(\S*test_cut.py line \d+\)$", str(error.value))
    assert isinstance(error.value.__cause__, NotImplementedError)
