"""Which products of activations a layer has, and which operand is the keys'."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import shardpar
from shardpar.capture.trace import trace
from shardpar.config.model_source import load_model_source

BATCH, LENGTH, HEADS, DIM = 4, 8, 4, 4
MODELS = Path(__file__).parents[2] / "models"


def products(attend, batch=BATCH, length=LENGTH):
    @shardpar.layer
    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones((HEADS, DIM)))

        def __call__(self, x):
            return attend(x * self.scale, x, x)

    shape = jax.ShapeDtypeStruct((batch, length, HEADS, DIM), jnp.float32)
    captured = trace(lambda model, b: jnp.sum(model(b["x"]) ** 2), Attention, {"x": shape})
    return captured.graph.classes[0].products


def in_order(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def keys_first(q, k, v):
    weights = jax.nn.softmax(jax.lax.dot_general(k, q, (((3,), (3,)), ((0, 2), (0, 2)))), axis=2)
    return jnp.einsum("bhkq,bkhd->bqhd", weights, v)


def test_of_scores_the_keys_are_the_operand_that_the_next_product_adds_up_over():
    size = BATCH * LENGTH * HEADS * DIM * 4
    scores, values = products(in_order)
    assert (scores.keys, scores.scores, scores.num_heads) == ("right", True, HEADS)
    assert (scores.query_dim, scores.key_dim) == (1, 1)
    assert (scores.moved_bytes, scores.key_bytes) == (2 * size, size)
    assert (values.scores, values.moved_bytes, values.key_bytes) == (False, 2 * size, size)
    assert products(keys_first)[0].keys == "left"


@pytest.mark.parametrize(
    "attend",
    [
        in_order,
        keys_first,
        jax.jit(in_order),
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: jax.nn.dot_product_attention(q, k[:, :, :2], v[:, :, :2]),
        nnx.dot_product_attention,
        lambda q, k, v: in_order(q.swapaxes(1, 2).swapaxes(1, 2), k, v),
    ],
    ids=["einsum", "keys first", "in a jit", "jax.nn", "grouped", "flax", "swapped"],
)
def test_attention_is_known_however_it_is_written(attend):
    scores, values = products(attend)
    assert scores.scores
    assert not values.scores
    assert scores.keys is not None
    assert values.keys is not None


def test_dims_of_one_size_are_told_apart():
    scores, values = products(in_order, batch=4, length=4)
    assert (scores.batch, scores.heads) == (0, 1)
    assert (values.batch, values.heads) == (0, 1)


def through_a_scan(q, k, v):
    return jax.lax.scan(lambda c, _: (in_order(c, k, v), None), q, None, length=2)[0]


def scores_alone(q, k, v):
    return v * jnp.sum(jnp.einsum("bqhd,bkhd->bhqk", q, k), axis=(1, 2, 3))[:, None, None, None]


@pytest.mark.parametrize("attend", [through_a_scan, scores_alone])
def test_what_is_not_understood_is_not_guessed(attend):
    assert products(attend) is None


def test_layers_without_such_products_have_none():
    assert products(lambda q, k, v: q + k + v) == ()


@pytest.mark.parametrize(
    ("name", "options", "groups"),
    [("gpt", {"heads": 4}, 4), ("llama", {"heads": 4, "kv_heads": 2}, 2)],
)
def test_the_models_that_come_along_are_known(name, options, groups):
    source = load_model_source(MODELS / f"{name}.py")
    kind = getattr(source, {"gpt": "GPTOptions", "llama": "LlamaOptions"}[name])
    made = kind(vocab_size=32, layers=1, width=32, max_length=16, **options)
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    captured = trace(
        source.loss, lambda rngs: source.build(made, rngs), {"inputs": tokens, "targets": tokens}
    )
    found = {cls.name: cls.products for cls in captured.graph.classes}
    assert [p.num_heads for p in found.pop("Block")] == [groups, groups]
    assert set(found.values()) == {()}
