"""Layouts through operations: what a result's layout is, given those of the inputs.

Every axis of a group's mesh, and the top tier across groups, does one thing to an array:
it splits a dim, keeps copies, or holds addends. A rule says what it does to the result,
one axis at a time, so it covers groups and unions alike (HSPMD, arXiv 2504.20490, table
of deduction). Where two inputs do not fit, the error names the reshard that mends it.

Gradients need no rules of their own: the transpose of each operation is again one of these.
The cotangent of a `dot` is two dots, of a `take` a `scatter_add`, of a `reduce_sum` a
`broadcast`, of a `transpose`, `reshape` or `slice_` the one back (`pad`); the gradient of a
layout change from addends to copies is that from copies to copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from shardpar.errors import SpecError
from shardpar.spec.layout import Layout, Split, SplitAcross
from shardpar.spec.roles import Addends, Along, ClashError, Copies, Role, error_of, lift

Shape = tuple[int, ...]


def _require_dims(name: str, dims: Sequence[int], rank: int | None = None) -> None:
    """Refuses dims that are negative, named twice, or not there."""
    for dim in dims:
        if dim < 0 or (rank is not None and dim >= rank):
            there = "counted from 0" if rank is None else f"0 to {rank - 1}"
            raise SpecError(f"{name}: dim {dim} of {list(dims)}: dims are {there}")
    if len(set(dims)) != len(dims):
        raise SpecError(f"{name}: a dim is named twice in {list(dims)}; name each once")


def _require_fit(name: str, *arrays: tuple[Layout, Shape]) -> None:
    """Refuses layouts that do not fit their arrays."""
    for layout, shape in arrays:
        try:
            layout.pieces(tuple(shape))
        except SpecError as error:
            raise SpecError(f"{name} of {layout}: {error}") from None


def _require_rank(name: str, layout: Layout, rank: int) -> None:
    split = {e.dim for g in layout.groups for e in g.entries if isinstance(e, Split)}
    if isinstance(layout.across, SplitAcross):
        split.add(layout.across.dim)
    if max(split, default=-1) >= rank:
        raise SpecError(
            f"{name} of {layout}: it splits dim {max(split)}, but the array has {rank} dims, "
            "counted from 0"
        )


def unary(x: Layout, *, linear: bool = False) -> Layout:
    """An operation on each element.

    Args:
      x: the input.
      linear: whether f(a + b) = f(a) + f(b), as scaling and casting are; then addends may stay.

    Raises:
      SpecError: addends under a function that is not linear.

    >>> from shardpar.spec.layout_text import layout_from_text
    >>> print(unary(layout_from_text("[0,1]{partial:2}"), linear=True))
    [0,1]{partial:2}
    """

    def rule(roles: tuple[Role, ...]) -> Role:
        if isinstance(roles[0], Addends) and not linear:
            raise ClashError("a function that is not linear cannot take addends", (0, Copies()))
        return roles[0]

    return lift("unary", [x], rule)


def add(a: Layout, b: Layout, a_shape: Shape, b_shape: Shape) -> Layout:
    """A sum or difference of two arrays, with NumPy's broadcasting.

    Raises:
      SpecError: the inputs are split differently, or only one of them holds addends.
    """
    return _binary("add", a, b, a_shape, b_shape, bilinear=False)


def multiply(a: Layout, b: Layout, a_shape: Shape, b_shape: Shape) -> Layout:
    """A product of two arrays, element by element, with NumPy's broadcasting.

    Raises:
      SpecError: the inputs are split differently, or both hold addends.
    """
    return _binary("multiply", a, b, a_shape, b_shape, bilinear=True)


def _binary(
    name: str, a: Layout, b: Layout, a_shape: Shape, b_shape: Shape, *, bilinear: bool
) -> Layout:
    rank = max(len(a_shape), len(b_shape))
    shapes = (a_shape, b_shape)
    _require_fit(name, (a, a_shape), (b, b_shape))
    for x, y in zip(reversed(a_shape), reversed(b_shape), strict=False):
        if x != y and 1 not in (x, y):
            raise SpecError(f"{name}: shapes {a_shape} and {b_shape} do not broadcast together")
    shifts = [rank - len(shape) for shape in shapes]

    def is_whole(side: int, dim: int) -> bool:
        """Whether an input has just one index (or none) where the result has dim `dim`."""
        own = dim - shifts[side]
        return own < 0 or shapes[side][own] == 1

    def rule(roles: tuple[Role, ...]) -> Role:
        moved = [_shift(role, shifts[i]) for i, role in enumerate(roles)]
        x, y = moved
        if x == y and not (bilinear and isinstance(x, Addends)):
            return x
        if isinstance(x, Addends) and isinstance(y, Addends):
            raise ClashError("a product of two sums is not the sum of the products", (1, Copies()))
        for i, (one, other) in enumerate(((x, y), (y, x))):
            if isinstance(one, Along) and isinstance(other, Copies):
                if is_whole(1 - i, one.dim):
                    return one
                mend = Along(one.dim - shifts[1 - i])
                raise ClashError("one input is split where the other is whole", (1 - i, mend))
            if isinstance(one, Addends) and isinstance(other, Copies):
                if bilinear:
                    return one
                raise ClashError(
                    "one input would be added once per addend of the other", (i, Copies())
                )
            if isinstance(one, Addends):
                raise ClashError("one input holds addends where the other is split", (i, Copies()))
        assert isinstance(x, Along)
        if is_whole(1, x.dim):
            raise ClashError("the inputs are split along different dims", (1, Copies()))
        raise ClashError("the inputs are split along different dims", (1, Along(x.dim - shifts[1])))

    return lift(name, [a, b], rule)


def _shift(role: Role, by: int) -> Role:
    return Along(role.dim + by) if isinstance(role, Along) else role


DotDims = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def dot(a: Layout, b: Layout, a_rank: int, b_rank: int, dims: DotDims) -> Layout:
    """A general product: `dims` is ((contracted of a, of b), (batch of a, of b)), as in XLA.

    The result has the batch dims, then the free ones of a, then those of b. Where both are
    split along a contracted dim, the result is addends.

    Raises:
      SpecError: a contracted or batch dim is split in one input only, or one axis splits free
        dims of both.

    >>> from shardpar.spec.layout_text import layout_from_text
    >>> x, w = layout_from_text("[0,1]{split1:2}"), layout_from_text("[0,1]{split0:2}")
    >>> print(dot(x, w, 2, 2, (((1,), (0,)), ((), ()))))
    [0,1]{partial:2}
    """
    (a_sum, b_sum), (a_batch, b_batch) = dims
    _require_dims("dot", [*a_sum, *a_batch], a_rank)
    _require_dims("dot", [*b_sum, *b_batch], b_rank)
    if len(a_sum) != len(b_sum) or len(a_batch) != len(b_batch):
        raise SpecError(f"dot: {dims} names unequally many dims of its two inputs")
    _require_rank("dot", a, a_rank)
    _require_rank("dot", b, b_rank)
    a_free = [d for d in range(a_rank) if d not in (*a_sum, *a_batch)]
    b_free = [d for d in range(b_rank) if d not in (*b_sum, *b_batch)]

    def rule(roles: tuple[Role, ...]) -> Role:
        x, y = roles
        if isinstance(x, Copies) and isinstance(y, Copies):
            return x
        if isinstance(x, Addends) or isinstance(y, Addends):
            if isinstance(x, Copies) or isinstance(y, Copies):
                return Addends()
            if isinstance(x, Addends) and isinstance(y, Addends):
                raise ClashError("a product of two sums is not the sum of products", (1, Copies()))
            side = 0 if isinstance(x, Addends) else 1
            raise ClashError("one input holds addends where the other is split", (side, Copies()))
        for what, mine, theirs in (("contracted", a_sum, b_sum), ("batch", a_batch, b_batch)):
            pairs = list(zip(mine, theirs, strict=True))
            for p, q in pairs:
                if x == Along(p) and y == Along(q):
                    return Addends() if what == "contracted" else Along(list(a_batch).index(p))
            for p, q in pairs:
                if x == Along(p):
                    raise ClashError(f"a {what} dim is split in one input only", (1, Along(q)))
                if y == Along(q):
                    raise ClashError(f"a {what} dim is split in one input only", (0, Along(p)))
        if isinstance(x, Along) and isinstance(y, Along):
            raise ClashError("one axis splits free dims of both inputs", (1, Copies()))
        if isinstance(x, Along):
            return Along(len(a_batch) + a_free.index(x.dim))
        assert isinstance(y, Along)
        return Along(len(a_batch) + len(a_free) + b_free.index(y.dim))

    return lift("dot", [a, b], rule)


def conv(x: Layout, kernel: Layout) -> Layout:
    """A convolution of x [batch, in, space…] with kernel [out, in, space…].

    Raises:
      SpecError: a dim of space is split (its halo would be missing), or the channels of one
        input only.
    """

    def rule(roles: tuple[Role, ...]) -> Role:
        a, b = roles
        for i, role in enumerate(roles):
            if isinstance(role, Along) and role.dim >= 2:
                raise ClashError("a split dim of space lacks its neighbours' edges", (i, Copies()))
        if isinstance(a, Copies) and isinstance(b, Copies):
            return a
        if (a, b) == (Along(1), Along(1)):
            return Addends()
        if (a, b) == (Along(0), Copies()):
            return a
        if (a, b) == (Copies(), Along(0)):
            return Along(1)
        if isinstance(a, Addends) and isinstance(b, Copies):
            return a
        if isinstance(b, Addends) and isinstance(a, Copies):
            return b
        if a == Along(1):
            raise ClashError("input channels are split in one input only", (1, Along(1)))
        if b == Along(1):
            raise ClashError("input channels are split in one input only", (0, Along(1)))
        raise ClashError("the axis splits or sums both inputs at once", (1, Copies()))

    return lift("conv", [x, kernel], rule)


def take(table: Layout, ids: Layout, ids_rank: int) -> Layout:
    """An embedding lookup: rows of a table [rows, …] at ids; the result is [ids dims…, …].

    A table split over its rows gives addends: each device finds what it has, zeros else.

    Raises:
      SpecError: ids are addends, or one axis splits both the rows and the ids.
    """

    def rule(roles: tuple[Role, ...]) -> Role:
        rows, at = roles
        if isinstance(at, Addends):
            raise ClashError("ids cannot be addends", (1, Copies()))
        if isinstance(at, Along):
            if not isinstance(rows, Copies):
                raise ClashError(
                    "one axis splits or sums the table and splits the ids", (1, Copies())
                )
            return at
        if isinstance(rows, Along):
            return Addends() if rows.dim == 0 else Along(ids_rank + rows.dim - 1)
        return rows

    return lift("take", [table, ids], rule)


def scatter_add(ids: Layout, updates: Layout, ids_rank: int) -> Layout:
    """Updates [ids dims…, row dims…] added to rows of zeros: the gradient of `take`.

    Where ids and updates are split alike, the result is addends.

    Raises:
      SpecError: ids and updates are split differently, or ids are addends.
    """

    def rule(roles: tuple[Role, ...]) -> Role:
        at, value = roles
        if isinstance(at, Addends):
            raise ClashError("ids cannot be addends", (0, Copies()))
        if isinstance(value, Along) and value.dim < ids_rank:
            if at != value:
                raise ClashError("the updates are split where the ids are not", (0, value))
            return Addends()
        if isinstance(at, Along):
            mend: Role = at if isinstance(value, Copies) else Copies()
            raise ClashError("the ids are split where the updates are not", (1, mend))
        return Along(1 + value.dim - ids_rank) if isinstance(value, Along) else value

    return lift("scatter_add", [ids, updates], rule)


def reduce_sum(x: Layout, dims: Sequence[int]) -> Layout:
    """A sum (or mean) over some dims, which leave; split ones give addends.

    >>> from shardpar.spec.layout_text import layout_from_text
    >>> print(reduce_sum(layout_from_text("[0,1,2,3]{split0:2, split1:2}"), (0,)))
    [0,1,2,3]{partial:2, split0:2}
    """
    _require_dims("reduce_sum", dims)

    def rule(roles: tuple[Role, ...]) -> Role:
        role = roles[0]
        if isinstance(role, Along):
            return Addends() if role.dim in dims else Along(_without(role.dim, dims))
        return role

    return lift("reduce_sum", [x], rule)


def reduce_max(x: Layout, dims: Sequence[int]) -> Layout:
    """A maximum or minimum over some dims, which leave and must be whole.

    Raises:
      SpecError: a dim is split, or the input holds addends.
    """
    whole = _whole("reduce_max", x, dims)

    def rule(roles: tuple[Role, ...]) -> Role:
        role = roles[0]
        return Along(_without(role.dim, dims)) if isinstance(role, Along) else role

    return lift("reduce_max", [whole], rule)


def normalise(x: Layout, dims: Sequence[int]) -> Layout:
    """A softmax, a norm, or anything else that looks along some dims and keeps them.

    Raises:
      SpecError: one of these dims is split, or the input holds addends.
    """
    return _whole("normalise", x, dims)


def _whole(name: str, x: Layout, dims: Sequence[int]) -> Layout:
    _require_dims(name, dims)

    def rule(roles: tuple[Role, ...]) -> Role:
        if isinstance(roles[0], Addends):
            raise ClashError("a function that is not linear cannot take addends", (0, Copies()))
        if isinstance(roles[0], Along) and roles[0].dim in dims:
            raise ClashError(f"dim {roles[0].dim} must be whole", (0, Copies()))
        return roles[0]

    return lift(name, [x], rule)


def transpose(x: Layout, order: Sequence[int]) -> Layout:
    """Dims in another order: dim i of the result is dim `order[i]` of x."""
    _require_dims("transpose", order, len(order))
    _require_rank("transpose", x, len(order))

    def rule(roles: tuple[Role, ...]) -> Role:
        role = roles[0]
        return Along(list(order).index(role.dim)) if isinstance(role, Along) else role

    return lift("transpose", [x], rule)


def broadcast(x: Layout, dims: Sequence[int]) -> Layout:
    """New dims: dim i of x becomes dim `dims[i]` of the result. The gradient of `reduce_sum`."""
    _require_dims("broadcast", dims)
    _require_rank("broadcast", x, len(dims))

    def rule(roles: tuple[Role, ...]) -> Role:
        role = roles[0]
        return Along(dims[role.dim]) if isinstance(role, Along) else role

    return lift("broadcast", [x], rule)


def slice_(x: Layout, dims: Sequence[int]) -> Layout:
    """A part of some dims, which must be whole; the others stay as they are.

    Raises:
      SpecError: one of these dims is split.
    """
    return _untouched("slice", [x], dims)


def pad(x: Layout, dims: Sequence[int]) -> Layout:
    """Zeros around some dims, which must be whole: the gradient of `slice_`.

    Raises:
      SpecError: one of these dims is split.
    """
    return _untouched("pad", [x], dims)


def concatenate(parts: Sequence[Layout], dim: int) -> Layout:
    """Arrays end to end along a dim, which must be whole; otherwise they lie alike.

    Raises:
      SpecError: the dim is split, or the arrays lie differently.
    """
    return _untouched("concatenate", list(parts), (dim,))


def _untouched(name: str, parts: list[Layout], dims: Sequence[int]) -> Layout:
    _require_dims(name, dims)
    if not parts:
        raise SpecError(f"{name}: there are no arrays; give at least one")

    def rule(roles: tuple[Role, ...]) -> Role:
        for i, role in enumerate(roles):
            if isinstance(role, Along) and role.dim in dims:
                raise ClashError(f"dim {role.dim} must be whole", (i, Copies()))
        for i, role in enumerate(roles):
            if role != roles[0]:
                raise ClashError("the inputs lie differently", (i, roles[0]))
        return roles[0]

    return lift(name, parts, rule)


def reshape(x: Layout, old: Shape, new: Shape) -> Layout:
    """The same elements in another shape.

    A split survives where it cuts the same runs of elements: along a dim that stays, or the
    first of those that are merged, or into the first of those that a dim is cut into.

    Raises:
      SpecError: the shapes differ in size, or a split does not survive.
    """
    if math.prod(old) != math.prod(new):
        raise SpecError(
            f"reshape: {old} has {math.prod(old)} elements and {new} has {math.prod(new)}; "
            "they must be equal"
        )
    _require_fit("reshape", (x, old))
    homes = _homes(old, new)

    def rule(roles: tuple[Role, ...]) -> Role:
        role = roles[0]
        if not isinstance(role, Along):
            return role
        home = homes[role.dim]
        if home is None:
            raise ClashError(
                f"dim {role.dim} is not the first of the dims it is merged with", (0, Copies())
            )
        return Along(home)

    out = lift("reshape", [x], rule)
    if isinstance(out.across, SplitAcross) and isinstance(x.across, SplitAcross):
        size, now = old[x.across.dim], new[out.across.dim]
        if any(block.extent * now % size for block in out.across.blocks):
            raise error_of("reshape", [x], "a block across groups is cut apart", ())
        blocks = tuple(
            replace(block, extent=block.extent * now // size) for block in out.across.blocks
        )
        out = replace(out, across=replace(out.across, blocks=blocks))
    try:
        out.pieces(new)
    except SpecError as error:
        raise error_of("reshape", [x], f"a split does not survive: {error}", ()) from None
    return out


def _homes(old: Shape, new: Shape) -> list[int | None]:
    """For each old dim the new dim that a split of it becomes; None where there is none."""
    homes: list[int | None] = [None] * len(old)
    i = j = 0
    while i < len(old) and j < len(new):
        i_end, j_end, a, b = i + 1, j + 1, old[i], new[j]
        while a != b:
            if a < b:
                a, i_end = a * old[i_end], i_end + 1
            else:
                b, j_end = b * new[j_end], j_end + 1
        # Dims of one index in front do not matter.
        first = next((d for d in range(i, i_end) if old[d] > 1), i)
        target = next((d for d in range(j, j_end) if new[d] > 1), j)
        homes[first] = target
        i, j = i_end, j_end
    return homes


def _without(dim: int, gone: Sequence[int]) -> int:
    return dim - sum(d < dim for d in gone)
