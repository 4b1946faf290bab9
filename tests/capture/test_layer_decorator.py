"""`@shardpar.layer` changes no number: each class with and without it, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardpar
from models import gpt
from shardpar.capture.layers import is_marked, marked_class
from shardpar.errors import CaptureError
from tests.capture.nets import WIDTH, assert_same, busy, given_rngs, given_variables, plain

INPUT = jax.random.normal(jax.random.key(3), (8, WIDTH))
MASK = np.arange(WIDTH) % 2 == 0
CALLS = {
    "alone": (busy, (), {}),
    "scale and mask": (busy, (2.0,), {"mask": MASK}),
    "traced mask": (busy, (), {"mask": jnp.asarray(MASK), "mode": "tanh"}),
    "whole number": (busy, (3,), {}),
    "rngs": (given_rngs, (), {}),
    "variables": (given_variables, (), {}),
}


def loss(model, x, args, kwargs):
    return jnp.sum(model(x, *args, **kwargs) ** 2)


def both(make):
    """The same model twice, undecorated and decorated, with equal numbers in it."""
    return make(plain)(nnx.Rngs(0)), make(shardpar.layer)(nnx.Rngs(0))


def state(model):
    return nnx.to_pure_dict(nnx.state(model))


@pytest.mark.parametrize("case", CALLS)
def test_a_call_outside_a_trace_is_the_undecorated_call(case):
    make, args, kwargs = CALLS[case]
    bare, marked = both(make)
    for _ in range(2):
        assert_same(marked(INPUT, *args, **kwargs), bare(INPUT, *args, **kwargs))
        assert_same(state(marked), state(bare))


@pytest.mark.parametrize("case", CALLS)
def test_a_jitted_step_gives_the_same_bits_and_leaves_the_same_state(case):
    make, args, kwargs = CALLS[case]
    bare, marked = both(make)

    @nnx.jit
    def step(model, x):
        return nnx.value_and_grad(loss)(model, x, args, kwargs)

    for _ in range(2):  # the second call starts from the state that the first left
        assert_same(step(marked, INPUT), step(bare, INPUT))
        assert_same(state(marked), state(bare))


@pytest.mark.parametrize("case", CALLS)
def test_a_gradient_outside_jit_is_the_same_up_to_rounding(case):
    make, args, kwargs = CALLS[case]
    bare, marked = both(make)
    value_and_grad = nnx.value_and_grad(loss)
    assert_same(
        value_and_grad(marked, INPUT, args, kwargs),
        value_and_grad(bare, INPUT, args, kwargs),
        exact=False,
    )
    assert_same(state(marked), state(bare))


def test_batches_through_vmap_are_the_same():
    outs = []
    for model in both(busy):
        model.eval()
        graphdef, variables = nnx.split(model)
        outs.append(
            jax.jit(jax.vmap(lambda x, g=graphdef, v=variables: nnx.merge(g, v, copy=True)(x)))(
                jnp.stack([INPUT, 2 * INPUT])
            )
        )
    assert_same(*outs)


def test_gpt_without_its_decorators_trains_to_the_same_bits(monkeypatch):
    options = gpt.GPTOptions(vocab_size=32, layers=1, width=16, heads=2, max_length=8, dropout=0.3)
    tokens = jax.random.randint(jax.random.key(0), (4, 9), 0, 32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}

    def trained():
        with nnx.use_eager_sharding(False):
            model = gpt.build(options, nnx.Rngs(0))

        @nnx.jit
        def step(model):
            value, grads = nnx.value_and_grad(lambda m: gpt.loss(m, batch)[0])(model)
            new = jax.tree.map(lambda p, g: p - 0.01 * g, nnx.state(model, nnx.Param), grads)
            nnx.update(model, new)
            return value

        return [step(model) for _ in range(3)], state(model)

    marked = trained()
    for cls in (gpt.Embed, gpt.Block, gpt.Head):
        assert is_marked(cls)
        monkeypatch.setattr(cls, "__call__", cls.__call__.__wrapped__)
        assert not is_marked(cls)
    assert_same(marked, trained())
    assert len({float(value) for value in marked[0]}) == 3


def test_a_number_written_another_way_is_another_number():
    @shardpar.layer
    class Times(nnx.Module):
        def __call__(self, x, k):
            return x * k

    model, ints = Times(), jnp.arange(3)
    dtypes = jax.jit(lambda x: [model(x, k) for k in (2, 2.0, True, 1, 1.0)])(ints)
    assert [a.dtype.kind for a in dtypes] == ["i", "f", "i", "i", "f"]
    bools = jax.jit(lambda x: [model(x, k) for k in (1, True)])(ints > 0)
    assert [a.dtype.kind for a in bools] == ["i", "b"]
    zeros = jax.jit(lambda x: [model(x, k) for k in (0.0, -0.0)])(jnp.ones(1))
    assert [bool(jnp.signbit(z[0])) for z in zeros] == [False, True]


def test_a_variable_sown_inside_is_there_afterwards():
    def make(mark):
        @mark
        class Sows(nnx.Module):
            def __call__(self, x):
                self.seen = nnx.Intermediate(x + 1)
                return 2 * x

        return Sows

    bare, marked = make(plain)(), make(shardpar.layer)()
    call = nnx.jit(lambda model, x: model(x))
    assert_same(call(marked, INPUT), call(bare, INPUT))
    assert_same(marked.seen[...], INPUT + 1)
    assert_same(state(marked), state(bare))


def test_a_marked_call_is_one_equation_that_returns_only_what_changed():
    graphdef, variables = nnx.split(busy(shardpar.layer)(nnx.Rngs(0)))
    (eqn,) = jax.make_jaxpr(lambda v, x: nnx.merge(graphdef, v, copy=True)(x))(
        variables, INPUT
    ).eqns
    assert marked_class(eqn) == "Busy"
    # The output; then calls, the dropout's count, and the mean and variance of the norm.
    assert [v.aval.shape for v in eqn.outvars] == [(8, WIDTH), (), (), (WIDTH,), (WIDTH,)]


def test_a_subclass_is_marked_with_its_base():
    @shardpar.layer
    class Base(nnx.Module):
        def __call__(self, x):
            return x + 1

    class Inherits(Base):
        pass

    class Extends(Base):
        def __call__(self, x):
            return 2 * super().__call__(x)

    assert [is_marked(cls) for cls in (Base, Inherits, Extends, nnx.Linear)] == [
        True, True, True, False,
    ]  # fmt: skip
    assert_same(jax.jit(lambda x: Extends()(Inherits()(x)))(jnp.ones(2)), jnp.full(2, 6.0))


def test_the_decorated_class_keeps_its_name_and_documentation():
    class Plain(nnx.Module):
        """Words."""

        def __call__(self, x):
            """Says."""
            return x

    assert shardpar.layer(Plain) is Plain
    assert (Plain.__name__, Plain.__doc__, Plain.__call__.__doc__) == ("Plain", "Words.", "Says.")


class Silent(nnx.Module):
    pass


def a_function(x):
    return x


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            dict,
            "@shardpar.layer: <class 'dict'> is not a flax.nnx.Module class; put the decorator on "
            "the class whose instances repeat in the model (a linen module can be wrapped with "
            "flax.nnx.bridge.ToNNX)",
        ),
        (Silent, "@shardpar.layer: Silent has no __call__ to mark"),
    ],
)
def test_what_cannot_be_marked_is_refused(what, message):
    with pytest.raises(CaptureError) as error:
        shardpar.layer(what)
    assert str(error.value) == message


def test_a_function_cannot_be_marked():
    with pytest.raises(CaptureError, match=r"<function a_function at .*> is not a flax.nnx.Module"):
        shardpar.layer(a_function)


def test_an_argument_that_can_be_neither_traced_nor_compiled_in_is_refused():
    @shardpar.layer
    class Takes(nnx.Module):
        def __call__(self, x, y):
            return x

    with pytest.raises(CaptureError) as error:
        jax.jit(lambda x: Takes()(x, {1, 2}))(jnp.ones(2))
    assert str(error.value) == (
        "a marked layer was called with an argument that is neither an array nor hashable "
        "(unhashable type: 'set'); pass arrays, numbers, strings or tuples"
    )
