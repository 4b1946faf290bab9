"""The abstract model: names, shapes and logical dims of parameters, with none allocated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from models import gpt
from shardpar.capture.model import abstract_model
from shardpar.errors import CaptureError
from tests.capture.nets import Dense, assert_same, busy, given_rngs, plain


def named(*names):
    return nnx.with_partitioning(nnx.initializers.lecun_normal(), names)


class Attention(nnx.Module):
    """Parameters called as attention's are: a name must not be mistaken for Flax's `.value`."""

    def __init__(self, rngs):
        self.key, self.value = (nnx.Param(jnp.ones((2, 3))) for _ in range(2))
        self.out = nnx.Linear(3, 2, kernel_init=named("mlp", "embed"), rngs=rngs)
        self.deep = nnx.List([nnx.Dict({"value": nnx.Param(jnp.ones(4))})])


def test_parameters_are_called_by_their_paths():
    model = abstract_model(Attention)
    assert {name: leaf.shape for name, leaf in model.params.items()} == {
        "deep.0.value": (4,),
        "key": (2, 3),
        "out.bias": (2,),
        "out.kernel": (3, 2),
        "value": (2, 3),
    }
    assert model.dims["out.kernel"] == ("mlp", "embed")
    assert model.dims["value"] == (None, None)


def test_everything_that_is_not_trained_is_the_rest():
    model = abstract_model(busy(plain))
    assert set(model.params) == {"linear.bias", "linear.kernel", "norm.bias", "norm.scale"}
    assert {"calls", "norm.mean", "norm.var"} <= set(model.rest)
    assert any("dropout" in name and name.endswith("count") for name in model.rest)


@pytest.mark.parametrize("build", [busy(plain), given_rngs(plain), Attention])
def test_created_arrays_are_those_of_the_plain_model(build):
    model = abstract_model(build)
    params, rest = model.create(3)
    with nnx.use_eager_sharding(False):
        expected = nnx.to_pure_dict(nnx.state(build(nnx.Rngs(jax.random.key(3)))))
    assert_same(nnx.to_pure_dict(nnx.state(model.merge(params, rest))), expected)
    assert {n: (p.shape, p.dtype) for n, p in {**params, **rest}.items()} == {
        n: (p.shape, p.dtype) for n, p in {**model.params, **model.rest}.items()
    }


def test_splitting_undoes_merging():
    model = abstract_model(given_rngs(plain))
    numbered = [
        {name: i + 10 * k for i, name in enumerate(part)}
        for k, part in enumerate((model.params, model.rest), 1)
    ]
    filled = [
        {n: jnp.full(part[n].shape, v, jnp.float32) for n, v in numbers.items()}
        for numbers, part in zip(numbered, (model.params, model.rest), strict=True)
    ]
    assert_same(list(model.split(model.merge(*filled))), filled)


def test_a_shared_variable_is_one_parameter():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(2, 2, rngs=rngs)
            self.b = nnx.Linear(2, 2, rngs=rngs)
            self.b.kernel = self.a.kernel

    assert set(abstract_model(Tied).params) == {"a.bias", "a.kernel", "b.bias"}


def test_no_parameter_is_allocated():
    before = {id(array) for array in jax.live_arrays()}
    options = gpt.GPTOptions(vocab_size=50_000, layers=4, width=4096, heads=8)
    model = abstract_model(lambda rngs: gpt.build(options, rngs))
    assert sum(leaf.size for leaf in model.params.values()) > 10**9
    after = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.size for array in after) < 100


@pytest.mark.parametrize("kind", ["with_partitioning", "out_sharding", "PartitionSpec"])
def test_logical_names_are_read_as_flax_writes_them(kind):
    class Annotated(nnx.Module):
        def __init__(self, rngs):
            if kind == "with_partitioning":
                self.w = nnx.Param(named("embed", None)(rngs.params(), (2, 3)))
            else:
                names = ("embed", None)
                spec = PartitionSpec(*names) if kind == "PartitionSpec" else names
                self.w = nnx.Param(jnp.ones((2, 3)), out_sharding=spec)

    assert abstract_model(Annotated).dims == {"w": ("embed", None)}


def test_marked_layers_are_listed_with_their_paths():
    class Sub(Dense):
        pass

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Dense(rngs), Sub(rngs)])
            self.plain = nnx.Linear(2, 2, rngs=rngs)

    assert sorted(abstract_model(Net).marked) == [("blocks.0", "Dense"), ("blocks.1", "Dense")]


class Reads(nnx.Module):
    """A constructor that reads a value, in the given way."""

    def __init__(self, rngs, how):
        self.w = nnx.Param(rngs.params.uniform((2,)))
        self.n = how(self.w[...])


class Misnamed(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones((2, 3)), out_sharding=("embed",))


class Raises(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones(2) * {}["oops"])


SHAPES = "make it depend on shapes only"
VALUE = "the model's constructor reads the value of a parameter or random number ("


@pytest.mark.parametrize(
    ("init", "start", "end"),
    [
        (lambda rngs: 3, "the model's init returned int; return a flax.nnx.Module", ""),
        (lambda rngs: Reads(rngs, lambda w: float(w[0])), VALUE, SHAPES),
        (
            lambda rngs: Reads(rngs, lambda w: w[0] > 0 and 1),
            VALUE,
            "make it depend on shapes only",
        ),
        (lambda rngs: Reads(rngs, np.asarray), VALUE, SHAPES),
        (Raises, "the model's constructor failed: KeyError: 'oops' (", "test_model.py line 136)"),
        (nnx.Dict, "Dict has no parameters; there is nothing to train", ""),
        (
            Misnamed,
            "parameter w has shape (2, 3) but 1 logical names ('embed',); "
            "give one name or None per dim",
            "",
        ),
    ],
)
def test_a_model_that_cannot_be_captured_says_why(init, start, end):
    with pytest.raises(CaptureError) as error:
        abstract_model(init if init is not nnx.Dict else lambda rngs: nnx.Dict())
    assert str(error.value).startswith(start)
    assert str(error.value).endswith(end)
    assert "\n" not in str(error.value)
    if not end:
        assert str(error.value) == start
