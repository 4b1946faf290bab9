"""Meshes and group layouts, against jax's own NamedSharding and NumPy."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import SpecError
from shardpar.lowering.shardings import named_sharding
from shardpar.spec.mesh import GroupLayout, Mesh
from tests.spec.values import dealt, meshes


@st.composite
def laid_out(draw):
    """A mesh of at most 8 devices, a layout over it, and a shape its axes divide."""
    mesh = draw(meshes(most=8))
    *dims, partial = draw(dealt(mesh, draw(st.integers(1, 4))))
    shape = tuple(mesh.size_of(axes) * draw(st.integers(1, 3)) for axes in dims)
    return GroupLayout(mesh, tuple(dims), partial), shape


def as_jax(layout):
    mesh, devices = layout.mesh, np.array(jax.devices()[: layout.mesh.num_devices], dtype=object)
    return named_sharding(jax.sharding.Mesh(devices.reshape(mesh.sizes), mesh.names), layout)


@settings(deadline=None, max_examples=200)
@given(laid_out())
def test_pieces_are_where_jax_puts_them(case):
    layout, shape = case
    sharding = as_jax(layout)
    expected = [
        tuple((s.indices(n)[0], s.indices(n)[1]) for s, n in zip(index, shape, strict=True))
        for _, index in sorted(
            sharding.devices_indices_map(shape).items(), key=lambda item: item[0].id
        )
    ]
    assert [tuple((s.start, s.stop) for s in piece) for piece in layout.slices(shape)] == expected
    assert layout.shard_shape(shape) == sharding.shard_shape(shape)


@given(laid_out())
def test_pieces_cover_the_array_as_often_as_there_are_replicas_and_partial_sums(case):
    layout, shape = case
    times = np.zeros(shape, int)
    for piece in layout.slices(shape):
        times[piece] += 1
    partial = layout.mesh.size_of(layout.partial)
    assert np.all(times == layout.replicas * partial)
    assert layout.replicas * layout.shards * partial == layout.mesh.num_devices
    assert {*layout.replicated, *layout.partial, *sum(layout.dims, ())} == {*layout.mesh.names}


@given(st.integers(1, 5000))
def test_a_factored_mesh_is_the_prime_factors_largest_first(devices):
    sizes = Mesh.factored(devices).sizes
    assert np.prod(sizes, dtype=int) == devices
    assert list(sizes) == sorted(sizes, reverse=True)
    assert all(size > 1 and all(size % d for d in range(2, size)) for size in sizes)


def test_a_factored_mesh_has_as_many_axis_names_as_it_needs():
    mesh = Mesh.factored(2**28)
    assert mesh.names[:3] == ("a", "b", "c")
    assert mesh.names[-3:] == ("z", "aa", "ab")
    assert Mesh.factored(1) == Mesh() == Mesh(())
    assert Mesh().num_devices == 1


def test_axes_are_asked_for_by_name():
    mesh = Mesh((("a", 4), ("b", 3), ("c", 2)))
    assert (mesh.num_devices, mesh.size_of(("c", "a")), mesh.size_of(())) == (24, 8, 1)
    assert mesh.without(("b",)) == ("a", "c")
    assert str(mesh) == "{a: 4, b: 3, c: 2}"


def test_axes_of_one_dim_are_major_first():
    starts = [
        [piece[0].start for piece in GroupLayout(Mesh.factored(4), (axes,)).slices((8,))]
        for axes in (("a", "b"), ("b", "a"))
    ]
    assert starts == [[0, 2, 4, 6], [0, 4, 2, 6]]


def test_a_layout_prints_the_axes_of_each_dim():
    mesh = Mesh.factored(8)
    assert str(GroupLayout(mesh, ((), ("a", "c")), ("b",))) == "dim1/a,c partial/b"
    assert str(GroupLayout(mesh, ((), ()))) == "replicated"


ABC = Mesh.factored(8)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mesh((("a", 2), ("a", 3))), "mesh {a: 2, a: 3}: an axis is named twice"),
        (
            lambda: Mesh((("a b", 2),)),
            "mesh: 'a b' is not an axis name; write a letter or a word",
        ),
        (lambda: Mesh((("a", 0),)), "mesh: axis a has size 0; write 1 or more"),
        (lambda: Mesh.factored(0), "a mesh needs at least one device; got 0"),
        (lambda: ABC.size_of(("x",)), 'the mesh has no axis "x"; its axes are a, b, c'),
        (lambda: Mesh().size_of(("x",)), 'the mesh has no axis "x"; its axes are none'),
        (
            lambda: GroupLayout(ABC, (("a",), ("a", "b"))),
            "a layout uses axis a twice: (('a',), ('a', 'b')); an axis may split one dim, or be "
            "partial, once",
        ),
        (
            lambda: GroupLayout(ABC, (("a",), ("b",)), ("b",)),
            "a layout uses axis b twice: (('a',), ('b',)); an axis may split one dim, or be "
            "partial, once",
        ),
        (
            lambda: GroupLayout(ABC, (("z",),)),
            'the mesh has no axis "z"; its axes are a, b, c',
        ),
        (
            lambda: GroupLayout(ABC, (("a",),)).shard_shape((4, 4)),
            "layout dim0/a has 1 dims; the array's shape is (4, 4)",
        ),
        (
            lambda: GroupLayout(ABC, ((), ("a", "b"))).shard_shape((4, 6)),
            "dim 1 (6) is not divisible by axes a,b (4)",
        ),
    ],
)
def test_a_layout_that_cannot_be_is_refused(build, message):
    with pytest.raises(SpecError) as error:
        build()
    assert str(error.value) == message
