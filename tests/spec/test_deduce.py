"""Deduced layouts: against the types of JAX's explicit sharding, and NumPy on each device."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shardpar.errors import SpecError
from shardpar.lowering.shardings import axes_sharding, partition_spec
from shardpar.spec import deduce
from shardpar.spec.axes import common_axes
from shardpar.spec.layout import Group, Layout, Partial, Replicate
from shardpar.spec.layout_text import layout_from_text as L
from shardpar.spec.mesh import GroupLayout, Mesh
from tests.lowering.layouts import numpy_pieces, random_layout, twin, whole

MATMUL = (((1,), (0,)), ((), ()))


# Against JAX's types: random programs over one group of eight devices.


@dataclass
class Known:
    """An array of a random program: its layout by shardpar, and its shape."""

    layout: Layout
    shape: tuple[int, ...]


def grouped(named: GroupLayout) -> Layout:
    return Layout((Group.of(tuple(range(8)), named),))


def unsummed(layout: Layout) -> Layout:
    """What JAX has after it added up what it cannot keep as addends."""
    group = layout.groups[0]
    entries = tuple(Replicate(e.parts) if isinstance(e, Partial) else e for e in group.entries)
    return Layout((Group(group.devices, entries),))


def spec_of(layout: Layout, rank: int, mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of a layout on the finest mesh of a, b, c."""
    pairs = common_axes(layout.groups[0].entries, [Replicate(n) for n in mesh.sizes])
    assert pairs is not None
    dims: list[tuple[str, ...]] = [()] * rank
    partial = set()
    for name, (entry, _) in zip(mesh.names, pairs, strict=True):
        if hasattr(entry, "dim"):
            dims[entry.dim] = (*dims[entry.dim], name)
        elif isinstance(entry, Partial):
            partial.add(name)
    return PartitionSpec(*partition_spec(tuple(dims)), unreduced=frozenset(partial))


def random_named(draw: random.Random, rank: int, mesh: Mesh) -> GroupLayout:
    dims: list[tuple[str, ...]] = [()] * rank
    for name in mesh.names:
        place = draw.randrange(rank + 2)
        if place < rank:
            dims[place] = (*dims[place], name)
    return GroupLayout(mesh, tuple(dims))


def grow(draw: random.Random, known: list[Known]) -> tuple[Callable, list[int], Layout, tuple]:
    """A random operation on known arrays: (function, its inputs, layout and shape deduced)."""
    i = draw.randrange(len(known))
    x = known[i]
    rank = len(x.shape)
    kind = draw.choice(
        (
            "sin",
            "add",
            "mul",
            "dot",
            "sum",
            "max",
            "T",
            "merge",
            "cut",
            "slice",
            "concat",
            "softmax",
        )
    )
    dim = draw.randrange(rank)
    if kind == "sin":
        return jnp.sin, [i], deduce.unary(x.layout), x.shape
    if kind in ("add", "mul", "concat"):
        j = draw.choice([j for j, y in enumerate(known) if y.shape == x.shape])
        y = known[j]
        if kind == "concat":
            shape = (*x.shape[:dim], 2 * x.shape[dim], *x.shape[dim + 1 :])
            out = deduce.concatenate([x.layout, y.layout], dim)
            return (lambda a, b: jnp.concatenate([a, b], dim)), [i, j], out, shape
        if kind == "add":
            return jnp.add, [i, j], deduce.add(x.layout, y.layout, x.shape, y.shape), x.shape
        out = deduce.multiply(x.layout, y.layout, x.shape, y.shape)
        return jnp.multiply, [i, j], out, x.shape
    if kind == "dot":
        choices = [
            (j, q) for j, y in enumerate(known) for q, n in enumerate(y.shape) if n == x.shape[dim]
        ]
        j, q = draw.choice(choices)
        y = known[j]
        dims = (((dim,), (q,)), ((), ()))
        out = deduce.dot(x.layout, y.layout, rank, len(y.shape), dims)
        shape = (*x.shape[:dim], *x.shape[dim + 1 :], *y.shape[:q], *y.shape[q + 1 :])
        if len(shape) not in (1, 2, 3):
            raise SpecError("too many dims for this test")
        spec = spec_of(out, len(shape), MESH)

        def product(a, b):
            return jax.lax.dot_general(a, b, dims, out_sharding=spec)

        return product, [i, j], out, shape
    if kind in ("sum", "max"):
        if rank == 1:
            raise SpecError("keep one dim for this test")
        shape = (*x.shape[:dim], *x.shape[dim + 1 :])
        if kind == "sum":
            return (lambda a: a.sum(dim)), [i], deduce.reduce_sum(x.layout, [dim]), shape
        return (lambda a: a.max(dim)), [i], deduce.reduce_max(x.layout, [dim]), shape
    if kind == "T":
        order = draw.sample(range(rank), rank)
        out = deduce.transpose(x.layout, order)
        return (lambda a: a.transpose(order)), [i], out, tuple(x.shape[d] for d in order)
    if kind in ("merge", "cut"):
        if kind == "merge" and rank > 1 and dim < rank - 1:
            shape = (*x.shape[:dim], x.shape[dim] * x.shape[dim + 1], *x.shape[dim + 2 :])
        elif rank < 3:
            shape = (*x.shape[:dim], x.shape[dim] // 2, 2, *x.shape[dim + 1 :])
        else:
            raise SpecError("no such reshape here")
        return (lambda a: a.reshape(shape)), [i], deduce.reshape(x.layout, x.shape, shape), shape
    if kind == "slice":
        half = x.shape[dim] // 2
        shape = (*x.shape[:dim], half, *x.shape[dim + 1 :])
        out = deduce.slice_(x.layout, [dim])
        return (lambda a: jax.lax.slice_in_dim(a, 0, half, axis=dim)), [i], out, shape
    return (lambda a: jax.nn.softmax(a, dim)), [i], deduce.normalise(x.layout, [dim]), x.shape


MESH = Mesh.of_sizes((2, 2, 2))


def jax_mesh() -> jax.sharding.Mesh:
    named = GroupLayout(MESH, ())
    return axes_sharding(named, jax.devices(), explicit=True).mesh


@pytest.mark.parametrize("seed", range(150))
def test_random_programs_have_the_types_that_jax_gives_them(seed):
    draw = random.Random(seed)
    mesh = jax_mesh()
    shapes = [draw.choice(((16, 16), (16, 16), (16,), (16, 16, 16))) for _ in range(3)]
    named = [random_named(draw, len(shape), MESH) for shape in shapes]
    known = [Known(grouped(n), s) for n, s in zip(named, shapes, strict=True)]
    steps = []
    for _ in range(60):
        if len(steps) == 5:
            break
        try:
            function, inputs, layout, shape = grow(draw, known)
        except SpecError:
            continue
        steps.append((function, inputs, layout))
        known.append(Known(unsummed(layout), shape))

    def program(*arrays):
        values = list(arrays)
        made = []
        for function, inputs, layout in steps:
            value = function(*[values[i] for i in inputs])
            made.append(value)
            if jax.typeof(value).sharding.spec.unreduced:
                whole_spec = spec_of(unsummed(layout), value.ndim, MESH)
                value = jax.sharding.reshard(value, NamedSharding(mesh, whole_spec))
            values.append(value)
        return made

    with jax.set_mesh(mesh):
        inputs = [
            jax.ShapeDtypeStruct(
                s, jnp.float32, sharding=NamedSharding(mesh, partition_spec(n.dims))
            )
            for n, s in zip(named, shapes, strict=True)
        ]
        types = jax.make_jaxpr(program)(*inputs).out_avals
    assert steps
    for (function, _, layout), known_type in zip(steps, types, strict=True):
        spec = known_type.sharding.spec
        kept = layout if spec.unreduced else unsummed(layout)
        mine = spec_of(kept, len(known_type.shape), MESH)
        want = NamedSharding(mesh, mine)
        same = mine.unreduced == spec.unreduced and tuple(
            _as_tuple(a) for a in mine.partitions
        ) == tuple(_as_tuple(a) for a in spec.partitions)
        assert same, (function, str(layout), want.spec, spec)


def _as_tuple(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


# Against NumPy on each device: any union of groups.


def check(layouts, arrays, out: Layout, local, expected, seed=0) -> None:
    """Runs `local` on each device's pieces; together they must be the expected array."""
    held = [
        numpy_pieces(x, a, seed + i) for i, (x, a) in enumerate(zip(layouts, arrays, strict=True))
    ]
    pieces = {p.device: p for group in out.pieces(expected.shape) for p in group}
    made = {d: local(*[h[d] for h in held], piece=pieces[d]) for d in pieces}
    assert {d: m.shape for d, m in made.items()} == {d: p.shape for d, p in pieces.items()}
    assert np.array_equal(whole(out, expected.shape, made), expected)


def numbers(shape, seed) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9, 9, shape)


SHAPE = (12, 8)
UNARY = {
    "neg": (lambda a: deduce.unary(a, linear=True), lambda p, piece: -p),
    "square": (deduce.unary, lambda p, piece: p * p),
    "sum": (lambda a: deduce.reduce_sum(a, [0]), lambda p, piece: p.sum(0)),
    "max": (lambda a: deduce.reduce_max(a, [1]), lambda p, piece: p.max(1)),
    "transpose": (lambda a: deduce.transpose(a, (1, 0)), lambda p, piece: p.T),
    "merge": (
        lambda a: deduce.reshape(a, SHAPE, (96,)),
        lambda p, piece: p.reshape(piece.shape if piece else 96),
    ),
    "cut": (
        lambda a: deduce.reshape(a, SHAPE, (4, 3, 8)),
        lambda p, piece: p.reshape(piece.shape if piece else (4, 3, 8)),
    ),
    "slice": (lambda a: deduce.slice_(a, [1]), lambda p, piece: p[:, 2:6]),
    "pad": (lambda a: deduce.pad(a, [1]), lambda p, piece: np.pad(p, ((0, 0), (1, 3)))),
    "broadcast": (
        lambda a: deduce.broadcast(a, (0, 2)),
        lambda p, piece: np.broadcast_to(p[:, None], (p.shape[0], 5, p.shape[1])),
    ),
    "cumsum": (lambda a: deduce.normalise(a, [1]), lambda p, piece: p.cumsum(1)),
}
BINARY = {
    "add": (lambda a, b: deduce.add(a, b, SHAPE, SHAPE), lambda p, q, piece: p + q),
    "multiply": (lambda a, b: deduce.multiply(a, b, SHAPE, SHAPE), lambda p, q, piece: p * q),
    "dot": (
        lambda a, b: deduce.dot(a, b, 2, 2, (((1,), (1,)), ((), ()))),
        lambda p, q, piece: p @ q.T,
    ),
    "gradient of a weight": (
        lambda a, b: deduce.dot(a, b, 2, 2, (((0,), (0,)), ((), ()))),
        lambda p, q, piece: p.T @ q,
    ),
    "dot with a batch dim": (
        lambda a, b: deduce.dot(a, b, 2, 2, (((1,), (1,)), ((0,), (0,)))),
        lambda p, q, piece: (p * q).sum(1),
    ),
    "concatenate": (
        lambda a, b: deduce.concatenate([a, b], 0),
        lambda p, q, piece: np.concatenate([p, q]),
    ),
}


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_unions_through_an_operation_are_right_wherever_they_are_allowed(name):
    """Every device does the operation on what it has; together they have the result."""
    done = 0
    for seed in range(700):
        draw = random.Random(seed)
        a = random_layout(draw, SHAPE)
        layouts = [a] if name in UNARY else [a, twin(draw, a, SHAPE)]
        arrays = [numbers(SHAPE, seed + i) for i in range(len(layouts))]
        deduced, local = (UNARY if name in UNARY else BINARY)[name]
        expected = local(*arrays, piece=None)
        try:
            out = deduced(*layouts)
            out.pieces(expected.shape)
        except SpecError:
            continue
        check(layouts, arrays, out, local, expected, seed)
        done += 1
    assert done > 40


def test_a_lookup_and_its_gradient_are_right_over_unions():
    rows, width, count = 12, 4, 8
    done = {"take": 0, "scatter_add": 0}
    for seed in range(1500):
        draw = random.Random(seed)
        table_at = random_layout(draw, (rows, width))
        ids_at = twin(draw, table_at, (rows,))
        table, ids = numbers((rows, width), seed), np.abs(numbers((12,), seed)) % rows
        try:
            out = deduce.take(table_at, ids_at, 1)
            out.pieces((12, width))
        except SpecError:
            pass
        else:
            held = numpy_pieces(table_at, table, seed)
            spans = {p.device: p.spans for g in table_at.pieces((rows, width)) for p in g}

            def look(at, piece, held=held, spans=spans):
                mine = np.concatenate([np.arange(*s) for s in spans[piece.device][0]])
                place = {row: i for i, row in enumerate(mine)}
                part = held[piece.device]
                zero = np.zeros(part.shape[1], part.dtype)
                return np.stack([part[place[i]] if i in place else zero for i in at])

            check([ids_at], [ids], out, look, table[ids], seed)
            done["take"] += 1
        updates_at = twin(draw, ids_at, (12, width))
        updates = numbers((12, width), seed + 7)
        try:
            grad = deduce.scatter_add(ids_at, updates_at, 1)
            grad.pieces((rows, width))
        except SpecError:
            continue
        expected = np.zeros((rows, width), int)
        np.add.at(expected, ids, updates)

        def scatter(at, part, piece):
            out = np.zeros((rows, part.shape[1]), int)
            np.add.at(out, at, part)
            return out

        try:
            check([ids_at, updates_at], [ids, updates], grad, scatter, expected, seed)
        except AssertionError as error:
            raise AssertionError((seed, str(ids_at), str(updates_at), str(grad))) from error
        done["scatter_add"] += 1
    assert min(done.values()) > 40, done
    assert count


def test_a_convolution_is_right_over_unions():
    done = 0
    for seed in range(1500):
        draw = random.Random(seed)
        x_at = random_layout(draw, (4, 6, 8))
        w_at = twin(draw, x_at, (4, 6, 8))
        x, w = numbers((4, 6, 8), seed), numbers((4, 6, 8), seed + 1)[:, :, :3]
        try:
            out = deduce.conv(x_at, w_at)
            w_at.pieces(w.shape)
            out.pieces((4, 4, 6))
        except SpecError:
            continue

        def convolve(a, k, piece=None):
            windows = np.lib.stride_tricks.sliding_window_view(a, 3, axis=2)
            return np.einsum("ncsk,ock->nos", windows, k)

        check([x_at, w_at], [x, w], out, convolve, convolve(x, w), seed)
        done += 1
    assert done > 40


MENDS = {
    "matmul, one side split": (
        lambda: deduce.dot(L("[0,1]{split1:2}"), L("[0,1]{dup:2}"), 2, 2, MATMUL),
        "dot of [0,1]{split1:2} and [0,1]{dup:2}: a contracted dim is split in one input only; "
        "reshard input 1 to [0,1]{split0:2} first",
    ),
    "matmul, both free dims": (
        lambda: deduce.dot(L("[0,1]{split0:2}"), L("[0,1]{split1:2}"), 2, 2, MATMUL),
        "dot of [0,1]{split0:2} and [0,1]{split1:2}: one axis splits free dims of both inputs; "
        "reshard input 1 to [0,1]{dup:2} first",
    ),
    "add of addends and a whole": (
        lambda: deduce.add(L("[0,1]{partial:2}"), L("[0,1]{dup:2}"), (8,), (8,)),
        "add of [0,1]{partial:2} and [0,1]{dup:2}: one input would be added once per addend of "
        "the other; reshard input 0 to [0,1]{dup:2} first",
    ),
    "relu of addends across groups": (
        lambda: deduce.unary(L("[0] + [1] across partial")),
        "unary of [0]{} + [1]{} across partial: a function that is not linear cannot take "
        "addends; reshard input 0 to [0]{} + [1]{} across dup first",
    ),
    "other groups": (
        lambda: deduce.add(L("[0]"), L("[1]"), (8,), (8,)),
        "add: the inputs lie on different groups: [0]{} and [1]{}; reshard them to the same "
        "groups first",
    ),
    "other extents": (
        lambda: deduce.add(
            L("[0]+[1] across split0(5,3)"), L("[0]+[1] across split0(4,4)"), (8,), (8,)
        ),
        "add: the inputs are split across groups with different extents: [0]{} + [1]{} across "
        "split0(5,3) and [0]{} + [1]{} across split0(4,4); reshard one to the extents of the "
        "other first",
    ),
    "softmax over a split dim": (
        lambda: deduce.normalise(L("[0,1,2,3]{split0:2, split1:2}"), [1]),
        "normalise of [0,1,2,3]{split0:2, split1:2}: dim 1 must be whole; reshard input 0 to "
        "[0,1,2,3]{split0:2, dup:2} first",
    ),
    "reshape that merges a split behind another dim": (
        lambda: deduce.reshape(L("[0,1]{split1:2}"), (4, 6), (24,)),
        "reshape of [0,1]{split1:2}: dim 1 is not the first of the dims it is merged with; "
        "reshard input 0 to [0,1]{dup:2} first",
    ),
}


S1 = "[0,1]{split1:2}"
MISUSES = {
    "negative dim to reduce": lambda: deduce.reduce_sum(L(S1), (-1,)),
    "dim to reduce twice": lambda: deduce.reduce_sum(L(S1), (0, 0)),
    "negative dim of a softmax": lambda: deduce.normalise(L(S1), (-1,)),
    "negative dim to slice": lambda: deduce.slice_(L(S1), (-1,)),
    "nothing to concatenate": lambda: deduce.concatenate([], 0),
    "order that is none": lambda: deduce.transpose(L(S1), (0, 0)),
    "order that is too short": lambda: deduce.transpose(L(S1), (0,)),
    "broadcast of too few dims": lambda: deduce.broadcast(L(S1), (0,)),
    "broadcast into one dim twice": lambda: deduce.broadcast(L(S1), (0, 0)),
    "unequally many contracted": lambda: deduce.dot(L(S1), L(S1), 2, 2, (((1,), ()), ((), ()))),
    "contracted dim that is not there": lambda: deduce.dot(
        L(S1), L(S1), 2, 2, (((2,), (0,)), ((), ()))
    ),
    "rank too small": lambda: deduce.dot(L(S1), L("[0,1]{dup:2}"), 1, 1, (((0,), (0,)), ((), ()))),
    "shapes that do not broadcast": lambda: deduce.add(
        L("[0,1]{dup:2}"), L("[0,1]{dup:2}"), (8,), (6,)
    ),
    "split of one index": lambda: deduce.add(L("[0,1]{dup:2}"), L("[0,1]{split0:2}"), (8, 1), (1,)),
    "reshape of another rank": lambda: deduce.reshape(L("[0,1]{split3:2}"), (4, 4), (16,)),
    "reshape without elements": lambda: deduce.reshape(L("[0]"), (0, 2), (0, 5)),
    "reshape that cuts a row apart": lambda: deduce.reshape(
        L("[0,1,2,3]{split0:4}+[4] across split0(12,4)"), (16,), (8, 2)
    ),
}


@pytest.mark.parametrize("case", MISUSES)
def test_dims_that_cannot_be_are_spec_errors(case):
    with pytest.raises(SpecError):
        MISUSES[case]()


def test_a_reshape_is_judged_by_each_groups_own_part():
    out = deduce.reshape(L("[0,1,2]{split0:3}+[4] across split0(6,2)"), (8,), (4, 2))
    assert str(out) == "[0,1,2]{split0:3} + [4]{} across split0(3,1)"


def test_the_mend_across_groups_takes_the_other_inputs_extents():
    with pytest.raises(SpecError) as error:
        deduce.dot(L("[0]+[1] across split0(5,3)"), L("[0]+[1] across split0(3,1)"), 2, 2, MATMUL)
    assert "reshard input 0 to [0]{} + [1]{} across split1(3,1) first" in str(error.value)


@pytest.mark.parametrize("case", MENDS)
def test_inputs_that_do_not_fit_name_the_reshard_that_mends_it(case):
    run, message = MENDS[case]
    with pytest.raises(SpecError) as error:
        run()
    assert str(error.value) == message


def test_the_mend_that_is_named_does_mend_it():
    text = "reshard input 1 to "
    with pytest.raises(SpecError) as error:
        deduce.dot(L("[0,1,2,3]{split1:4}"), L("[0,1,2,3]{split0:2, dup:2}"), 2, 2, MATMUL)
    mended = L(str(error.value).split(text)[1].removesuffix(" first"))
    assert str(deduce.dot(L("[0,1,2,3]{split1:4}"), mended, 2, 2, MATMUL)) == "[0,1,2,3]{partial:4}"


def test_the_gradients_of_a_product_are_products():
    """dW of Y = X W with the batch split is a sum over devices, as data parallelism has it."""
    x, w = L("[0,1,2,3]{split0:2, dup:2}"), L("[0,1,2,3]{dup:2, split1:2}")
    y = deduce.dot(x, w, 2, 2, MATMUL)
    assert str(y) == "[0,1,2,3]{split0:2, split1:2}"
    dw = deduce.dot(x, y, 2, 2, (((0,), (0,)), ((), ())))
    assert str(dw) == "[0,1,2,3]{partial:2, split1:2}"
    dx = deduce.dot(y, w, 2, 2, (((1,), (1,)), ((), ())))
    assert str(dx) == "[0,1,2,3]{split0:2, partial:2}"


def test_meshes_without_a_common_refinement_are_refused():
    a, b = L("[0,1,2,3,4,5]{split0:2, dup:3}"), L("[0,1,2,3,4,5]{dup:3, split0:2}")
    with pytest.raises(SpecError, match="no common refinement"):
        deduce.add(a, b, (12,), (12,))


def test_explicit_axes_are_what_the_oracle_runs_on():
    assert jax_mesh().axis_types == (AxisType.Explicit,) * 3
