"""LLaMA against a NumPy twin, and its sizes and costs against the published ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import llama
from shardpar.capture._compat import matmul_flops
from shardpar.capture.cut import cut
from shardpar.capture.model import abstract_model

OPTIONS = llama.LlamaOptions(
    vocab_size=29, layers=2, width=24, heads=6, kv_heads=2, mlp_width=40, max_length=12
)


def built(**changed):
    options = llama.LlamaOptions(**{**OPTIONS.__dict__, **changed})
    with nnx.use_eager_sharding(False):
        model = llama.build(options, nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


@nnx.jit
def logits(model, tokens):
    return model(tokens)


@nnx.jit
def loss(model, batch):
    return llama.loss(model, batch)


def arrays(module):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(module)))


def norm(x, p):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"]


def turned(x, base=10000.0):
    """Each pair (i, i + half) as a complex number, turned by its position's angle."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_llama(p, tokens):
    out = []
    for row in tokens:
        x = p["embed"]["table"][row]
        for block in p["blocks"].values():
            y = norm(x, block["norm1"])
            heads, kv_heads = block["query"].shape[1], block["key_value"].shape[2]
            mixed = 0.0
            for h in range(heads):
                shared = h // (heads // kv_heads)
                q = turned(y @ block["query"][:, h])
                k = turned(y @ block["key_value"][0][:, shared])
                v = y @ block["key_value"][1][:, shared]
                scores = q @ k.T / np.sqrt(q.shape[-1])
                scores[np.triu_indices(len(row), 1)] = -np.inf
                mixed = mixed + softmax(scores) @ v @ block["out"][h]
            x = x + mixed
            y = norm(x, block["norm2"])
            gate, up = (y @ block["gate_up"][i] for i in range(2))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ block["down"]
        head = p["head"]
        out.append(norm(x, head["norm"]) @ head.get("table", p["embed"]["table"]).T)
    return np.stack(out)


TOKENS = np.random.default_rng(0).integers(0, 29, (3, 10))


@pytest.mark.parametrize(("kv_heads", "tied"), [(1, False), (2, True), (6, False)])
def test_the_logits_are_those_of_the_numpy_twin(kv_heads, tied):
    model = built(kv_heads=kv_heads, tied=tied)
    expected = numpy_llama(arrays(model), TOKENS)
    np.testing.assert_allclose(logits(model, jnp.asarray(TOKENS)), expected, rtol=2e-4, atol=2e-4)


def test_the_loss_is_the_sum_of_negative_log_probabilities_and_its_count():
    model = built()
    batch = {"inputs": jnp.asarray(TOKENS[:, :-1]), "targets": jnp.asarray(TOKENS[:, 1:])}
    total, weight = loss(model, batch)
    probabilities = softmax(numpy_llama(arrays(model), TOKENS[:, :-1]))
    picked = np.take_along_axis(probabilities, TOKENS[:, 1:, None], -1)
    np.testing.assert_allclose(total, -np.log(picked).sum(), rtol=1e-5)
    assert float(weight) == 3 * 9


def test_scores_depend_on_distances_only():
    same = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (8,)), (1, 9, 1, 8))
    at = np.asarray(llama.rotate(same, 100.0))[0, :, 0]
    scores = at @ at.T
    for distance in range(9):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert abs(scores[0, 0] - scores[0, 4]) > 0.1


def count(**options):
    model = abstract_model(lambda rngs: llama.build(llama.LlamaOptions(**options), rngs))
    return sum(leaf.size for leaf in model.params.values())


def formula(v, d, layers, heads, kv, f, tied=False):
    attention = d * d * 2 + 2 * d * kv * (d // heads)
    return (1 if tied else 2) * v * d + layers * (attention + 3 * d * f + 2 * d) + d


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        ((32000, 4096, 32, 32, 32, 11008), 6_738_415_616),
        ((32000, 5120, 40, 40, 40, 13824), 13_015_864_320),
        ((32000, 8192, 80, 64, 8, 28672), 68_976_648_192),
        ((128256, 4096, 32, 32, 8, 14336), 8_030_261_248),
        ((50, 16, 2, 4, 2, 24, True), None),
    ],
)
def test_parameters_are_counted_by_the_formula_and_as_published(sizes, published):
    v, d, layers, heads, kv, f, *tied = sizes
    got = count(
        vocab_size=v, width=d, layers=layers, heads=heads, kv_heads=kv, mlp_width=f,
        tied=bool(tied),
    )  # fmt: skip
    assert got == formula(*sizes)
    assert published in (None, got)


@pytest.mark.parametrize(
    ("b", "t", "d", "heads", "kv", "f", "v", "layers"),
    [(1, 4, 8, 1, 1, 3, 5, 1), (2, 8, 24, 6, 2, 40, 29, 2)],
)
def test_matrix_products_cost_what_the_formula_says(b, t, d, heads, kv, f, v, layers):
    options = llama.LlamaOptions(v, layers, d, heads, kv, f, t)
    tokens = jax.ShapeDtypeStruct((b, t), jnp.int32)
    program = cut(
        abstract_model(lambda rngs: llama.build(options, rngs)),
        llama.loss,
        {"inputs": tokens, "targets": tokens},
    )
    costs = {call.name: matmul_flops(call.jaxpr.jaxpr) for call in program.calls}
    attention = 2 * (2 * b * t * t * d)
    block = 2 * b * t * (2 * d * d + 2 * d * d * kv // heads + 3 * d * f) + attention
    assert costs == {
        "embed": (0, 0),
        **{f"blocks[{i}]": (block, attention) for i in range(layers)},
        "head": (2 * b * t * d * v, 0),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 36, "heads": 12}, "width (36) must be a multiple of 2 * heads (24)"),
        ({"width": 30, "heads": 6}, "width (30) must be a multiple of 2 * heads (12)"),
        (
            {"width": 24, "heads": 6, "kv_heads": 4},
            "heads (6) must be a multiple of kv_heads (4)",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    options = {"kv_heads": 1, **options}
    with pytest.raises(ValueError, match="must be a multiple") as error:
        llama.LlamaOptions(**options)
    assert str(error.value) == message
