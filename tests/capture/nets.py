"""Small networks for the tests of capture; each takes the decorator that marks its layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import shardpar
from shardpar.capture.cut import evaluate

WIDTH, BATCH = 4, 8
X = {"x": jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)}


def mse(model, batch):
    return jnp.mean(model(batch["x"]) ** 2)


def plain(cls):
    """The decorator left out."""
    return cls


@shardpar.layer
class Dense(nnx.Module):
    """A marked linear layer with a nonlinearity."""

    def __init__(self, rngs, width=WIDTH, out=None):
        self.linear = nnx.Linear(width, out or width, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.linear(x))


def busy(mark):
    """A class with every kind of state: parameters, dropout, batch statistics, a counter."""

    @mark
    class Busy(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
            self.calls = nnx.Variable(jnp.int32(0))

        def __call__(self, x, scale=1.0, mask=None, mode="gelu"):
            self.calls[...] += 1
            act = {"gelu": nnx.gelu, "tanh": nnx.tanh}[mode]
            y = act(self.dropout(self.norm(self.linear(x)))) * scale
            return y if mask is None else jnp.where(mask, y, 0)

    return Busy


def given_rngs(mark):
    """Layers that draw from one stream of keys, handed to them with each call."""

    @mark
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.dropout = nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            return self.dropout(self.linear(x), rngs=rngs)

    class GivenRngs(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Noisy(rngs) for _ in range(2)])
            self.rngs = nnx.Rngs(dropout=7)

        def __call__(self, x):
            for block in self.blocks:
                x = block(x, rngs=self.rngs)
            return x

    return GivenRngs


def given_variables(mark):
    """A layer that reads one variable and changes another, both handed to it with the call."""

    @mark
    class Reader(nnx.Module):
        def __call__(self, x, pair):
            pair["count"][...] += 1
            return x @ pair["kernel"]

    class GivenVariables(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.count = nnx.Variable(jnp.int32(0))
            self.reader = Reader()

        def __call__(self, x):
            x = self.linear(x)
            return self.reader(x, {"kernel": self.linear.kernel, "count": self.count})

    return GivenVariables


class Skips(nnx.Module):
    """Two values live across layers: each block reads the one before and a much earlier one."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Dense(rngs) for _ in range(4)])

    def __call__(self, x):
        first = self.blocks[0](x)
        second = self.blocks[1](first) + x
        third = self.blocks[2](second)
        return self.blocks[3](third + first) * second


class Shared(nnx.Module):
    """One layer called again and again, between two of its own kind."""

    def __init__(self, rngs):
        self.first, self.middle, self.last = (Dense(rngs) for _ in range(3))

    def __call__(self, x):
        x = self.middle(self.middle(self.first(x)))
        return self.last(self.middle(x))


@shardpar.layer
class Pair(nnx.Module):
    """A marked layer of marked layers."""

    def __init__(self, rngs):
        self.a, self.b = Dense(rngs), Dense(rngs)

    def __call__(self, x):
        return self.b(self.a(x)) + x


class Nested(nnx.Module):
    """Pairs, and one inner layer outside a pair."""

    def __init__(self, rngs):
        self.pairs = nnx.List([Pair(rngs) for _ in range(2)])
        self.tail = Dense(rngs)

    def __call__(self, x):
        for pair in self.pairs:
            x = pair(x)
        return self.tail(x)


class JittedInside(nnx.Module):
    """Wraps its layers in flax's jit and in jax's, one inside the other."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Dense(rngs) for _ in range(3)])

    def __call__(self, x):
        graphdef, state = nnx.split(self.blocks)

        @jax.jit
        def inner(state, x):
            first, second, _ = nnx.merge(graphdef, state)
            return second(first(x)) + 1

        @nnx.jit
        def outer(blocks, x):
            return blocks[2](inner(state, x) * 2)

        return outer(self.blocks, x)


class Masked(nnx.Module):
    """Blocks that read a mask made outside of them, one of them without."""

    def __init__(self, rngs):
        self.blocks = nnx.List([busy(shardpar.layer)(rngs) for _ in range(1)])
        Block = type(self.blocks[0])
        self.blocks.append(Block(rngs))
        self.blocks.append(Block(rngs))

    def __call__(self, x):
        mask = x.sum(0) > 0
        x = self.blocks[0](x, mask=mask)
        x = self.blocks[1](x, 2.0, mask, mode="tanh")
        return self.blocks[2](x)


class Scanned(nnx.Module):
    """Layers in a scan, which cannot be cut apart."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Dense(rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(x, self.blocks)


class Remat(nnx.Module):
    """Layers under remat, which is the plan's to choose."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Dense(rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return x


class Unmarked(nnx.Module):
    """No layer is marked."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


def numbers(tree):
    """The leaves of a tree as NumPy arrays, random keys as their data."""
    return [
        np.asarray(jax.random.key_data(x))
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        else np.asarray(x)
        for x in jax.tree.leaves(tree)
    ]


def assert_same(got, expected, exact=True):
    got, expected = numbers(got), numbers(expected)
    assert len(got) == len(expected)
    largest = max((np.abs(x).max(initial=0.0) for x in expected), default=0.0)
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if exact:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * largest)


def run_cut(program, params, rest, batch):
    """The cut program on these arrays: (loss sum, weight, rest by name)."""
    given = {"params": params, "rest": rest, "batch": batch}
    total, weight, *changed = evaluate(
        program.closed, *[given[kind][name] for kind, name in program.inputs]
    )
    return total, weight, dict(zip(program.outputs, changed, strict=True))
