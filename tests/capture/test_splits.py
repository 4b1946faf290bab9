"""Which values tensor parallelism splits, against XLA's partitioner on several devices."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models import gpt, llama
from shardpar.capture._compat import inner_jaxpr, is_literal, run_equation
from shardpar.capture.cut import cut
from shardpar.capture.model import abstract_model
from shardpar.capture.splits import split_dims
from shardpar.spec.plan import TENSOR_DIMS


def inlined(jaxpr, consts, args, made=None):
    """Runs a jaxpr with the calls inside it opened; `made` gets every value on the way."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom):
        return atom.val if is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        inner = inner_jaxpr(eqn)
        if inner is not None:
            # Which is closed depends on the primitive.
            body = getattr(inner, "jaxpr", inner)
            outputs = inlined(body, getattr(inner, "consts", ()), [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outputs, strict=True))
        else:
            env.update(run_equation(core.ClosedJaxpr(jaxpr, consts), eqn, read))
        if made is not None:
            made += [env[v] for v in eqn.outvars if v in env]
    return [read(v) for v in jaxpr.outvars]


def flattened(closed):
    """The same program without calls, so that each value on the way has a variable."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    return jax.make_jaxpr(lambda *args: inlined(closed.jaxpr, closed.consts, args))(*shapes)


def by_xla(closed, given, devices):
    """Per value made on the way, the dims that XLA splits if the inputs are split as given."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("t",), axis_types=(AxisType.Auto,))

    def split(var, dims):
        spec = PartitionSpec(*("t" if d in dims else None for d in range(len(var.aval.shape))))
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype, sharding=sharding)

    def everything(*args):
        made: list[Any] = []
        inlined(closed.jaxpr, closed.consts, args, made)
        return made

    inputs = [split(v, d) for v, d in zip(closed.jaxpr.invars, given, strict=True)]
    compiled = jax.jit(everything).lower(*inputs).compile()
    shapes = [v.aval.shape for eqn in closed.jaxpr.eqns for v in eqn.outvars]
    return [
        frozenset(
            d
            for d, (whole, part) in enumerate(zip(shape, s.shard_shape(shape), strict=True))
            if whole != part
        )
        for shape, s in zip(shapes, compiled.output_shardings, strict=True)
    ]


def by_us(closed, given):
    found = split_dims(closed.jaxpr, given)
    return [frozenset(map(int, found[v])) for eqn in closed.jaxpr.eqns for v in eqn.outvars]


MODELS = {
    "gpt": (
        gpt,
        gpt.GPTOptions(vocab_size=512, layers=1, width=128, heads=8, max_length=32),
    ),
    "gpt, its head not tied": (
        gpt,
        gpt.GPTOptions(vocab_size=512, layers=1, width=128, heads=8, max_length=32, tied=False),
    ),
    "llama": (
        llama,
        llama.LlamaOptions(
            vocab_size=512, layers=1, width=128, heads=16, kv_heads=8, mlp_width=256
        ),
    ),
}


@cache
def layers_of(name):
    """(class, its program without calls, dims of each input that tensor axes split)."""
    module, options = MODELS[name]
    model = abstract_model(lambda rngs: module.build(options, rngs))
    tokens = {k: jax.ShapeDtypeStruct((8, 32), jnp.int32) for k in ("inputs", "targets")}
    out = {}
    for call in cut(model, module.loss, tokens).calls:
        given = []
        for parameter in call.parameters:
            names = model.dims[parameter] if parameter else ()
            first = next((d for d, n in enumerate(names) if n in TENSOR_DIMS), None)
            given.append(frozenset() if first is None else frozenset({first}))
        out[call.class_name] = (flattened(call.jaxpr), given)
    return out


LAYERS = [(name, layer) for name in ("gpt", "llama") for layer in ("Embed", "Block", "Head")]


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize(("name", "layer"), [*LAYERS, ("gpt, its head not tied", "Head")])
def test_every_value_of_a_layer_is_split_as_xla_splits_it(name, layer, devices):
    closed, given = layers_of(name)[layer]
    assert any(given)
    ours, xlas = by_us(closed, given), by_xla(closed, given, devices)
    primitives = [eqn.primitive.name for eqn in closed.jaxpr.eqns for _ in eqn.outvars]
    assert list(zip(primitives, ours, strict=True)) == list(zip(primitives, xlas, strict=True))
    if layer == "Block":
        assert len(ours) > 50
        assert 0.3 < sum(map(bool, ours)) / len(ours) < 0.9


SHAPE = (4, 16, 8)
ONE_INPUT = {
    "elementwise": lambda x: jnp.sin(x) + 1,
    "transpose": lambda x: x.transpose(2, 0, 1),
    "leading dims as one": lambda x: x.reshape(64, 8),
    "trailing dims as one": lambda x: x.reshape(4, 128),
    "a dim in two": lambda x: x.reshape(4, 8, 2, 8),
    "another dim in two": lambda x: x.reshape(2, 2, 16, 8),
    "a new dim": lambda x: x[:, :, None],
    "a dim of one taken away": lambda x: x[:1].squeeze(0),
    "repeated": lambda x: jnp.broadcast_to(x[None], (3, *SHAPE)),
    "sum over the first": lambda x: x.sum(0),
    "sum over the last": lambda x: x.sum(-1),
    "largest over the middle": lambda x: x.max(1),
    "a part of another dim": lambda x: x[1:3],
    "padded": lambda x: jnp.pad(x, ((1, 1), (0, 0), (0, 0))),
    "side by side": lambda x: jnp.concatenate([x, x * 2], axis=0),
    "parts": lambda x: jnp.split(x, 2, axis=0),
    "softmax": lambda x: jnp.exp(x) / jnp.exp(x).sum(0, keepdims=True),
    "a product over the last": lambda x: jnp.einsum("abc,cd->abd", x, jnp.ones((8, 4))),
    "a product over the middle": lambda x: jnp.einsum("abc,bd->acd", x, jnp.ones((16, 4))),
    "a product of all": lambda x: jnp.einsum("abc,dbc->bad", x, jnp.ones((2, 16, 8))),
}


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("name", ONE_INPUT)
def test_a_split_dim_is_followed_as_xla_follows_it(name, dim):
    closed = flattened(jax.make_jaxpr(ONE_INPUT[name])(jnp.ones(SHAPE)))
    given = [frozenset({dim})]
    xlas = by_xla(closed, given, 2)
    assert by_us(closed, given)[-1] == xlas[-1]


def test_what_is_made_of_the_stream_alone_is_whole():
    def layer(x, up, down):
        return x + jnp.tanh((x * x) @ up) @ down

    shapes = [jnp.ones(s) for s in ((4, 8), (8, 16), (16, 8))]
    closed = jax.make_jaxpr(layer)(*shapes)
    found = split_dims(closed.jaxpr, [frozenset(), frozenset({1}), frozenset({0})])
    made = {eqn.primitive.name: found[eqn.outvars[0]] for eqn in closed.jaxpr.eqns}
    assert made["mul"] == made["add"] == frozenset()
    assert made["tanh"] == {1}


def test_calls_are_followed_inside():
    inner = jax.jit(lambda x, w: jnp.sin(x @ w))
    closed = jax.make_jaxpr(lambda x, w: inner(x, w) * 2)(jnp.ones((4, 8)), jnp.ones((8, 16)))
    found = split_dims(closed.jaxpr, [frozenset(), frozenset({1})])
    assert [found[v] for v in closed.jaxpr.outvars] == [{1}]
