"""A linen model costs one line: a marked subclass of Flax's own bridge."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import shardpar
from shardpar.capture.cut import cut
from shardpar.capture.model import abstract_model
from shardpar.capture.trace import trace
from tests.capture.nets import mse, run_cut

WIDTH, HIDDEN = 8, 16


class MLP(nn.Module):
    """A linen block with linen's own partitioning metadata."""

    @nn.compact
    def __call__(self, x):
        def dense(features, *names):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), names)
            return nn.Dense(features, kernel_init=init)

        y = nn.relu(dense(HIDDEN, "embed", "mlp")(x))
        return dense(WIDTH, "mlp", "embed")(y)


@shardpar.layer
class Linen(nnx.bridge.ToNNX):
    """The one line."""


class Net(nnx.Module):
    def __init__(self, rngs):
        example = jnp.zeros((1, WIDTH))
        self.blocks = nnx.List([Linen(MLP(), rngs=rngs).lazy_init(example) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


BATCH = {"x": jax.ShapeDtypeStruct((4, WIDTH), jnp.float32)}


def test_a_linen_model_is_captured_with_its_logical_names():
    graph = trace(mse, Net, BATCH).graph
    assert [(layer.name, layer.class_name) for layer in graph.layers] == [
        ("blocks[0]", "Linen"),
        ("blocks[1]", "Linen"),
        ("outside", "outside"),
    ]
    assert {p.name: p.dims for p in graph.classes[0].parameters} == {
        "Dense_0.bias": (None,),
        "Dense_0.kernel": ("embed", "mlp"),
        "Dense_1.bias": (None,),
        "Dense_1.kernel": ("mlp", "embed"),
    }


def test_the_cut_linen_model_computes_what_linen_does():
    model = abstract_model(Net)
    params, rest = model.create(0)
    x = jax.random.normal(jax.random.key(1), (4, WIDTH))
    total, weight, _ = run_cut(cut(model, mse, BATCH), params, rest, {"x": x})
    y = x
    for i in range(2):
        own = {n.removeprefix(f"blocks.{i}."): p for n, p in params.items() if f"blocks.{i}" in n}
        tree = {
            layer: {leaf: own[f"{layer}.{leaf}"] for leaf in ("kernel", "bias")}
            for layer in ("Dense_0", "Dense_1")
        }
        y = MLP().apply({"params": tree}, y)
    np.testing.assert_allclose(total / weight, jnp.mean(y**2), rtol=1e-6)
