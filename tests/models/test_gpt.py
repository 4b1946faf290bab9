"""GPT against a NumPy twin, and its sizes and costs against the formulas people quote."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import gpt
from shardpar.capture._compat import matmul_flops
from shardpar.capture.cut import cut
from shardpar.capture.model import abstract_model

OPTIONS = gpt.GPTOptions(vocab_size=29, layers=2, width=24, heads=3, max_length=12, mlp_ratio=3)


def built(**changed):
    options = gpt.GPTOptions(**{**OPTIONS.__dict__, **changed})
    with nnx.use_eager_sharding(False):
        model = gpt.build(options, nnx.Rngs(0))
    # Biases and norms start at 0 and 1: give every parameter a value that shows.
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves), rest)


@nnx.jit
def logits(model, tokens):
    return model(tokens)


@nnx.jit
def loss(model, batch):
    return gpt.loss(model, batch)


def arrays(module):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(module)))


def norm(x, p):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def numpy_gpt(p, tokens, tied=True):
    """One sequence at a time, one head at a time."""
    out = []
    for row in tokens:
        x = p["embed"]["table"][row] + p["embed"]["position"][: len(row)]
        for block in p["blocks"].values():
            y, mixed = norm(x, block["norm1"]), block["out_bias"].copy()
            for h in range(block["out"].shape[0]):
                q, k, v = (y @ block["qkv"][i][:, h] + block["qkv_bias"][i][h] for i in range(3))
                scores = q @ k.T / np.sqrt(q.shape[-1])
                scores[np.triu_indices(len(row), 1)] = -np.inf
                mixed = mixed + softmax(scores) @ v @ block["out"][h]
            x = x + mixed
            hidden = gelu(norm(x, block["norm2"]) @ block["up"] + block["up_bias"])
            x = x + hidden @ block["down"] + block["down_bias"]
        table = p["embed"]["table"] if tied else p["head"]["table"]
        out.append(norm(x, p["head"]["norm"]) @ table.T)
    return np.stack(out)


TOKENS = np.random.default_rng(0).integers(0, 29, (3, 10))


@pytest.mark.parametrize("tied", [True, False])
def test_the_logits_are_those_of_the_numpy_twin(tied):
    model = built(tied=tied)
    expected = numpy_gpt(arrays(model), TOKENS, tied)
    np.testing.assert_allclose(logits(model, jnp.asarray(TOKENS)), expected, rtol=2e-4, atol=2e-4)


def test_the_loss_is_the_sum_of_negative_log_probabilities_and_its_count():
    model = built()
    batch = {"inputs": jnp.asarray(TOKENS[:, :-1]), "targets": jnp.asarray(TOKENS[:, 1:])}
    total, weight = loss(model, batch)
    probabilities = softmax(numpy_gpt(arrays(model), TOKENS[:, :-1]))
    picked = np.take_along_axis(probabilities, TOKENS[:, 1:, None], -1)
    np.testing.assert_allclose(total, -np.log(picked).sum(), rtol=1e-5)
    assert float(weight) == 3 * 9


def test_a_token_sees_only_what_came_before():
    model = built()
    changed = TOKENS.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % 29
    before, after = (np.asarray(logits(model, jnp.asarray(t))) for t in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.all(np.any(before[:, 6:] != after[:, 6:], axis=-1))


def test_dropout_acts_in_training_only():
    model = built(dropout=0.5)
    tokens = jnp.asarray(TOKENS)
    assert np.any(np.asarray(logits(model, tokens)) != np.asarray(logits(model, tokens)))
    model.eval()
    expected = numpy_gpt(arrays(nnx.state(model, nnx.Param)), TOKENS)
    np.testing.assert_allclose(logits(model, tokens), expected, rtol=2e-4, atol=2e-4)


def test_large_logits_give_a_finite_loss():
    model = built()
    model.embed.table[...] = model.embed.table[...] * 1e4
    batch = {"inputs": jnp.asarray(TOKENS), "targets": jnp.asarray(TOKENS)}
    assert np.isfinite(float(loss(model, batch)[0]))


def count(options):
    model = abstract_model(lambda rngs: gpt.build(options, rngs))
    return sum(leaf.size for leaf in model.params.values())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mlp_ratio", [2, 4])
def test_parameters_are_counted_by_the_formula(layers, tied, mlp_ratio):
    v, d, t, r = 100, 32, 64, mlp_ratio
    options = gpt.GPTOptions(v, layers, d, 4, t, r, tied=tied)
    attention, mlp, norms = 4 * d * d + 4 * d, 2 * r * d * d + r * d + d, 4 * d
    tables = (1 if tied else 2) * v * d + t * d
    assert count(options) == tables + layers * (attention + mlp + norms) + 2 * d


def test_gpt2_small_has_its_124_million_parameters():
    options = gpt.GPTOptions(vocab_size=50257, layers=12, width=768, heads=12, max_length=1024)
    assert count(options) == 124_439_808


@pytest.mark.parametrize(
    ("b", "t", "d", "heads", "r", "v", "layers"),
    [(1, 4, 8, 1, 1, 3, 1), (2, 8, 16, 4, 4, 50, 3), (3, 16, 24, 2, 2, 7, 2)],
)
def test_matrix_products_cost_what_the_formula_says(b, t, d, heads, r, v, layers):
    options = gpt.GPTOptions(v, layers, d, heads, t, r)
    tokens = jax.ShapeDtypeStruct((b, t), jnp.int32)
    program = cut(
        abstract_model(lambda rngs: gpt.build(options, rngs)),
        gpt.loss,
        {"inputs": tokens, "targets": tokens},
    )
    costs = {call.name: matmul_flops(call.jaxpr.jaxpr) for call in program.calls}
    attention = 2 * (2 * b * t * t * d)
    block = 2 * b * t * (4 + 2 * r) * d * d + attention
    assert costs == {
        "embed": (0, 0),
        **{f"blocks[{i}]": (block, attention) for i in range(layers)},
        "head": (2 * b * t * d * v, 0),
    }


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"^width \(10\) must be a multiple of heads \(3\)$"):
        gpt.GPTOptions(width=10, heads=3)
