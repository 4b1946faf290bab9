"""Layouts of parameters, optimizer state and activations under each strategy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.errors import PlanError
from shardpar.spec.graph import Activation, Parameter
from shardpar.spec.mesh import Mesh
from shardpar.spec.parameters import (
    FSDP_MIN_SIZE,
    activation_layout,
    compute_layout,
    optimizer_layout,
    parameter_layout,
)
from shardpar.spec.plan import LayerStrategy

MESH = Mesh.factored(8)
UP = Parameter("up", (256, 1024), "float32", ("embed", "mlp"))
DOWN = Parameter("down", (1024, 256), "float32", ("mlp", "embed"))
QKV = Parameter("qkv", (3, 256, 8, 32), "float32", (None, "embed", "heads", "head_dim"))
BIAS = Parameter("bias", (1024,), "float32", ("mlp",))
PLAIN = Parameter("plain", (256, 1024), "float32", (None, None))


def strategy(**axes):
    return LayerStrategy("blocks", **axes)


@pytest.mark.parametrize(
    ("parameter", "axes", "at_rest", "computing", "optimizer"),
    [
        (UP, {}, "replicated", "replicated", "replicated"),
        (UP, {"fsdp": ("a", "b", "c")}, "dim1/a,b,c", "replicated", "dim1/a,b,c"),
        (UP, {"tensor": ("c",)}, "dim1/c", "dim1/c", "dim1/c"),
        (UP, {"tensor": ("b", "c"), "fsdp": ("a",)}, "dim0/a dim1/b,c", "dim1/b,c",
         "dim0/a dim1/b,c"),
        (UP, {"zero1": ("a", "b")}, "replicated", "replicated", "dim1/a,b"),
        (UP, {"tensor": ("c",), "zero1": ("a",)}, "dim1/c", "dim1/c", "dim0/a dim1/c"),
        (UP, {"fsdp": ("c",), "zero1": ("a",)}, "dim1/c", "replicated", "dim0/a dim1/c"),
        (DOWN, {"tensor": ("c",), "fsdp": ("a", "b")}, "dim0/c dim1/a,b", "dim0/c",
         "dim0/c dim1/a,b"),
        (QKV, {"tensor": ("b", "c")}, "dim2/b,c", "dim2/b,c", "dim2/b,c"),
        (QKV, {"tensor": ("c",), "fsdp": ("a",)}, "dim1/a dim2/c", "dim2/c", "dim1/a dim2/c"),
        (PLAIN, {"tensor": ("c",), "fsdp": ("a",)}, "dim1/a", "replicated", "dim1/a"),
    ],
)  # fmt: skip
def test_each_strategy_has_its_layout(parameter, axes, at_rest, computing, optimizer):
    chosen = strategy(**axes)
    assert str(parameter_layout(parameter, chosen, MESH)) == at_rest
    assert str(compute_layout(parameter, chosen, MESH)) == computing
    assert str(optimizer_layout(parameter, chosen, MESH)) == optimizer


def test_a_tiny_parameter_stays_whole_under_fsdp_and_zero1():
    limit = Parameter("w", (2, FSDP_MIN_SIZE // 2), "float32", (None, None))
    below = Parameter("w", (2, FSDP_MIN_SIZE // 2 - 8), "float32", (None, None))
    for axes in ({"fsdp": ("a", "b")}, {"zero1": ("a", "b")}):
        assert str(optimizer_layout(limit, strategy(**axes), MESH)) == "dim1/a,b"
        assert str(optimizer_layout(below, strategy(**axes), MESH)) == "replicated"
    # Tensor parallelism splits even a bias: the layer computes with its part of it.
    assert str(parameter_layout(BIAS, strategy(tensor=("c",), fsdp=("a",)), MESH)) == "dim0/c"


def test_fsdp_takes_another_dim_when_the_largest_is_not_divisible():
    odd = Parameter("odd", (64, 1023), "float32", (None, None))
    assert str(parameter_layout(odd, strategy(fsdp=("a", "b", "c")), MESH)) == "dim0/a,b,c"


def test_fsdp_shares_the_tensor_dim_when_no_other_is_divisible():
    thin = Parameter("thin", (3, 2**13), "float32", (None, "mlp"))
    assert str(parameter_layout(thin, strategy(tensor=("c",), fsdp=("a",)), MESH)) == "dim1/c,a"


def test_a_parameter_no_dim_of_which_is_divisible_stays_whole():
    prime = Parameter("prime", (131, 127), "float32", (None, None))
    assert str(parameter_layout(prime, strategy(fsdp=("a",)), MESH)) == "replicated"


def test_a_plan_may_name_other_dims_for_tensor_parallelism():
    chosen = strategy(tensor=("c",))
    assert str(parameter_layout(UP, chosen, MESH, ("embed",))) == "dim0/c"
    assert str(parameter_layout(UP, chosen, MESH, ())) == "replicated"
    both = Parameter("both", (8, 8), "float32", ("heads", "mlp"))
    assert str(parameter_layout(both, chosen, MESH)) == "dim0/c"


@pytest.mark.parametrize(
    ("size", "axes", "mesh", "advice"),
    [
        (11009, ("c",), MESH, "1, or pad the dim to 11010"),
        (6, ("b", "c"), MESH, "2 or 3, or pad the dim to 8"),
        (10, ("a",), Mesh((("a", 3),)), "1 or 2, or pad the dim to 12"),
        (30, ("a", "b", "c"), MESH, "5 or 6, or pad the dim to 32"),
    ],
)
def test_a_dim_the_tensor_axes_do_not_divide_is_refused_with_a_way_out(size, axes, mesh, advice):
    odd = Parameter("mlp.up", (256, size), "float32", ("embed", "mlp"))
    with pytest.raises(PlanError) as error:
        parameter_layout(odd, strategy(tensor=axes), mesh)
    assert str(error.value) == (
        f'mlp.up dim 1 "mlp" ({size}) is not divisible by tensor axes {",".join(axes)} '
        f"({mesh.size_of(axes)}); use a tensor degree of {advice}"
    )


sizes = st.sampled_from([1, 2, 3, 8, 12, 64, 96, 127, 256, 1024])
logical = st.sampled_from(["embed", "mlp", "heads", "vocab", None])


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(sizes, min_size=1, max_size=4)))
    dims = tuple(draw(logical) for _ in shape)
    hands = [[], [], [], []]
    for axis in MESH.names:
        draw(st.sampled_from(hands)).append(axis)
    tensor, fsdp, zero1, _ = map(tuple, hands)
    return Parameter("p", shape, "float32", dims), strategy(tensor=tensor, fsdp=fsdp, zero1=zero1)


def elements(layout, shape):
    return math.prod(layout.shard_shape(shape))


@given(cases())
def test_every_layout_divides_and_each_of_them_refines_the_one_before(case):
    parameter, chosen = case
    try:
        computing = compute_layout(parameter, chosen, MESH)
    except PlanError:
        split = next(
            size
            for size, name in zip(parameter.shape, parameter.dims, strict=True)
            if name in ("mlp", "heads", "vocab")
        )
        assert split % MESH.size_of(chosen.tensor)
        return
    at_rest = parameter_layout(parameter, chosen, MESH)
    update = optimizer_layout(parameter, chosen, MESH)
    for coarse, fine, axes in ((computing, at_rest, chosen.fsdp), (at_rest, update, chosen.zero1)):
        extra = [a for d, e in zip(coarse.dims, fine.dims, strict=True) for a in e[len(d) :]]
        assert all(e[: len(d)] == d for d, e in zip(coarse.dims, fine.dims, strict=True))
        assert extra in ([], list(axes))
        ratio = elements(coarse, parameter.shape) // elements(fine, parameter.shape)
        assert ratio == MESH.size_of(tuple(extra))
    divisible = [
        size for size in computing.shard_shape(parameter.shape)
        if chosen.fsdp and size % MESH.size_of(chosen.fsdp) == 0
    ]  # fmt: skip
    assert (at_rest != computing) == (bool(divisible) and parameter.size >= FSDP_MIN_SIZE)


@pytest.mark.parametrize(
    ("batch_dim", "sequence_dim", "axes", "expected"),
    [
        (0, 1, {}, "dim0/a,b,c"),
        (0, 1, {"fsdp": ("a",)}, "dim0/a,b,c"),
        (0, 1, {"tensor": ("c",)}, "dim0/a,b"),
        (0, 1, {"tensor": ("b", "c"), "sequence_parallel": True}, "dim0/a dim1/b,c"),
        (1, 0, {"tensor": ("b", "c"), "sequence_parallel": True}, "dim0/b,c dim1/a"),
        (0, None, {"tensor": ("c",), "sequence_parallel": True}, "dim0/a,b"),
        (0, 0, {"tensor": ("c",), "sequence_parallel": True}, "dim0/a,b"),
        (0, 1, {"tensor": ("a", "b", "c")}, "replicated"),
    ],
)
def test_an_activation_is_split_along_batch_and_sequence(batch_dim, sequence_dim, axes, expected):
    stream = Activation((8, 16, 64), "float32", batch_dim, sequence_dim)
    assert str(activation_layout(stream, strategy(**axes), MESH)) == expected


def test_an_activation_that_does_not_grow_with_the_batch_is_left_to_xla():
    mask = Activation((16, 16), "bool", None, 0)
    assert activation_layout(mask, strategy(tensor=("c",)), MESH) is None
