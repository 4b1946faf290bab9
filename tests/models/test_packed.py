"""A packed row has the losses and gradients of its sequences run one by one, on any plan."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models import gpt, llama
from shardpar.capture.trace import trace
from shardpar.lowering.lower import lower
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.train.packing import fill, pack

ROW = 32
SIZES = {
    gpt: gpt.GPTOptions(vocab_size=30, layers=2, width=32, heads=4, max_length=ROW, mlp_ratio=2),
    llama: llama.LlamaOptions(
        vocab_size=30, layers=2, width=32, heads=4, kv_heads=2, mlp_width=48, max_length=ROW
    ),
}
BOTH = pytest.mark.parametrize("source", [gpt, llama], ids=["gpt", "llama"])

RANDOM = np.random.default_rng(0)
LENGTHS = (9, 20, 4, 33, 9, 20, 2, 9, 20)
SEQUENCES = [RANDOM.integers(0, 29, n) for n in LENGTHS]
WEIGHTS = [RANDOM.choice([0.0, 1.0, 0.5], n - 1) for n in LENGTHS]
ROWS = pack([n - 1 for n in LENGTHS], ROW)
PACKED = fill(SEQUENCES, ROWS, ROW, WEIGHTS)


@cache
def captured(source):
    return trace(source.loss, lambda rngs: source.build(SIZES[source], rngs), PACKED, causal=True)


@cache
def parameters(source):
    return captured(source).model.create(0)


def loss_of(source, params, batch):
    _, rest = parameters(source)
    return source.loss(captured(source).model.merge(params, rest), batch)


def both_of(source):
    return jax.jit(jax.value_and_grad(lambda p, b: loss_of(source, p, b), has_aux=True))


@cache
def one_by_one(source):
    """(sum, weight, gradients) of the sequences, each alone in a batch without segments."""
    total, weight, grads, both = 0.0, 0.0, None, both_of(source)
    for ids, weights in zip(SEQUENCES, WEIGHTS, strict=True):
        batch = {"inputs": ids[None, :-1], "targets": ids[None, 1:], "weights": weights[None]}
        (one, its_weight), its_grads = both(parameters(source)[0], jax.tree.map(jnp.array, batch))
        total, weight = total + float(one), weight + float(its_weight)
        grads = its_grads if grads is None else jax.tree.map(jnp.add, grads, its_grads)
    return total, weight, grads


def close(got, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(
            np.asarray(got[name]), np.asarray(value), rtol=2e-4, atol=2e-5, err_msg=name
        )


def test_the_rows_are_worth_testing():
    assert len(ROWS) == 4
    assert max(len(row) for row in ROWS) >= 3
    assert (PACKED["segment_ids"] == 0).any()


@BOTH
def test_every_token_has_the_logits_it_has_alone(source):
    model = captured(source).model.merge(*parameters(source))
    logits = nnx.jit(lambda model, *arrays: model(*arrays))
    keys = ("inputs", "segment_ids", "positions")
    together = np.asarray(logits(model, *(jnp.asarray(PACKED[key]) for key in keys)))
    for r, row in enumerate(ROWS):
        for segment, number in enumerate(row, 1):
            alone = logits(model, jnp.asarray(SEQUENCES[number][None, :-1]))[0]
            at = PACKED["segment_ids"][r] == segment
            np.testing.assert_allclose(together[r, at], alone, rtol=2e-5, atol=2e-5)


@BOTH
def test_losses_and_gradients_are_those_of_the_sequences_one_by_one(source):
    total, weight, grads = one_by_one(source)
    (got, got_weight), got_grads = both_of(source)(parameters(source)[0], PACKED)
    np.testing.assert_allclose([got, got_weight], [total, weight], rtol=1e-5)
    close(got_grads, grads)


@BOTH
def test_rows_of_one_whole_sequence_have_the_loss_of_a_batch_without_segments(source):
    ids = RANDOM.integers(0, 29, (2, ROW + 1))
    batch = fill(list(ids), ((0,), (1,)), ROW)
    plain = {"inputs": jnp.asarray(ids[:, :-1]), "targets": jnp.asarray(ids[:, 1:])}
    params = parameters(source)[0]
    loss = jax.jit(lambda batch: loss_of(source, params, batch))
    np.testing.assert_allclose(loss(batch), loss(plain), rtol=1e-6)


def stages(*parts, microbatch=4):
    made, first = [], 0
    for devices, layers, choices in parts:
        at = tuple(range(first, first + devices))
        made.append(Stage(at, Mesh.factored(devices), (LayerStrategy(layers, **choices),)))
        first += devices
    return Plan("test", 4, (Pipeline(4, microbatch, tuple(made)),))


@pytest.mark.parametrize(
    ("source", "plan"),
    [
        (gpt, stages((4, "embed..outside", {"fsdp": ("a",), "tensor": ("b",)}))),
        (llama, stages((2, "embed..outside", {"tensor": ("a",)}), microbatch=2)),
        (llama, stages((2, "embed..outside", {"context": ("a",)}))),
        (gpt, stages((1, "embed..blocks[0]", {}), (1, "blocks[1]..outside", {}), microbatch=2)),
    ],
    ids=["gpt fsdp tensor", "llama tensor", "llama split sequence", "gpt two stages"],
)
def test_a_plan_changes_nothing(source, plan):
    total, weight, grads = one_by_one(source)
    program = lower(captured(source), plan, optax.sgd(1.0))
    gathered = program.accumulate(program.init(0), PACKED)
    got = program.gathered_homes.first_copies(gathered)
    np.testing.assert_allclose(np.asarray(got.sums), [total, weight], rtol=1e-5)
    close(got.grads, grads)
