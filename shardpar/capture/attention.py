"""Where a layer multiplies activations with activations, as attention does, and which is which.

Splitting the sequence over devices leaves everything else in a transformer alone; in
these products a query meets the keys of other devices. Dims are told by tracing twice
more: what grows with the batch is the batch, what shrinks with the length the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from shardpar.capture._compat import (
    as_function,
    call_jaxpr,
    contains,
    is_literal,
    run_equation,
)
from shardpar.spec.graph import Product

Place = Callable[[int, Any, list[Any], bool], list[Any]]
"""Given a product's number, its equation and its operands or, when it is done, its result,
returns them laid out."""

_CALLS = ("jit", "pjit", "closed_call", "core_call")
_KERNELS = ("dot_product_attention", "pallas_call", "ffi_call", "custom_call")

Labels = tuple[frozenset[str], ...]
"""For each dim of a value, the sequences it runs along: "queries", "keys"."""


def products_of(closed: Any, grown: Any, longer: Any) -> tuple[Product, ...] | None:
    """A layer's products of activations, in the order they are computed.

    Args:
      closed: the layer's jaxpr.
      grown: the same layer for another batch size; None if it could not be traced so.
      longer: the same for another length.

    Returns:
      The products; None where the layer has some that are not understood, so that its
      sequence must not be split.
    """
    if grown is None or longer is None or contains(closed, _is_kernel):
        return None
    listed = [list(_products(one)) for one in (closed, grown, longer)]
    if len({len(found) for found in listed}) != 1:
        return None
    if len(listed[0]) != _count(closed):
        return None
    found = [_dims(*eqns) for eqns in zip(*listed, strict=True)]
    known = [product for product in found if product is not None]
    return _with_keys(closed, listed[0], known) if len(known) == len(found) else None


def with_products(closed: Any, place: Place) -> Callable[..., list[Any]]:
    """A layer as a function of its flat inputs, `place` told of each product on the way."""

    def run(closed: Any, inputs: Sequence[Any], count: Iterator[int]) -> list[Any]:
        jaxpr = closed.jaxpr
        env = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            if _is_product(eqn):
                number = next(count)
                operands = place(number, eqn, [read(v) for v in eqn.invars], False)
                result = eqn.primitive.bind(*operands, **eqn.params)
                (env[eqn.outvars[0]],) = place(number, eqn, [result], True)
            elif eqn.primitive.name in _CALLS and contains(call_jaxpr(eqn), _is_product):
                values = run(call_jaxpr(eqn), [read(v) for v in eqn.invars], count)
                env.update(zip(eqn.outvars, values, strict=True))
            else:
                env.update(run_equation(closed, eqn, read))
        return [read(v) for v in jaxpr.outvars]

    if not contains(closed, _is_product):
        return as_function(closed)
    return lambda *inputs: run(closed, inputs, iter(range(1 << 30)))


def result_dims(product: Product, eqn: Any) -> tuple[int, int | None, int]:
    """Dims of a product's result: batch, heads, and the queries' sequence."""
    contracted, batch = eqn.params["dimension_numbers"]
    side = 0 if product.keys == "right" else 1
    free = [
        [d for d in range(len(v.aval.shape)) if d not in (*contracted[i], *batch[i])]
        for i, v in enumerate(eqn.invars)
    ]
    before = len(batch[0]) + (len(free[0]) if side else 0)
    return product.batch, product.heads, before + free[side].index(product.query_dim)


def operand_dims(product: Product, eqn: Any) -> tuple[tuple[int, int | None], ...]:
    """Per operand of a product: its dims of the batch and of the heads."""
    _, batch = eqn.params["dimension_numbers"]
    return tuple(
        (batch[i][product.batch], None if product.heads is None else batch[i][product.heads])
        for i in range(2)
    )


def _is_product(eqn: Any) -> bool:
    return eqn.primitive.name == "dot_general" and bool(eqn.params["dimension_numbers"][1][0])


def _is_kernel(eqn: Any) -> bool:
    return any(kernel in eqn.primitive.name for kernel in _KERNELS)


def _products(closed: Any) -> Iterator[Any]:
    for eqn in closed.jaxpr.eqns:
        if _is_product(eqn):
            yield eqn
        elif eqn.primitive.name in _CALLS:
            yield from _products(call_jaxpr(eqn))


def _count(closed: Any) -> int:
    """Products at any depth, also where they cannot be reached."""
    seen = []
    contains(closed, lambda eqn: bool(_is_product(eqn) and seen.append(eqn)))
    return len(seen)


def _dims(eqn: Any, grown: Any, longer: Any) -> Product | None:
    """A product's dims; its `keys` a guess where both operands have a free sequence."""
    contracted, batch = eqn.params["dimension_numbers"]
    shapes = [v.aval.shape for v in eqn.invars]
    along = [
        [
            [d for d, (a, b) in enumerate(zip(shape, v.aval.shape, strict=True)) if a != b]
            for shape, v in zip(shapes, other.invars, strict=True)
        ]
        for other in (grown, longer)
    ]
    batches, sequences = along
    if not any(sequences):
        return Product()
    at = [[batch[i].index(d) for d in batches[i] if d in batch[i]] for i in range(2)]
    if [len(x) for x in batches] != [1, 1] or at[0] != at[1] or not at[0]:
        return None
    others = [i for i in range(len(batch[0])) if i != at[0][0]]
    heads = max(others, key=lambda i: shapes[0][batch[0][i]], default=None)
    sizes = [v.aval.size * v.aval.dtype.itemsize for v in (*eqn.invars, *eqn.outvars)]
    common = Product(
        batch=at[0][0], heads=heads, num_heads=1 if heads is None else shapes[0][batch[0][heads]]
    )
    free = [[d for d in sequences[i] if d not in contracted[i]] for i in range(2)]
    if [len(x) for x in sequences] == [1, 1] and [len(x) for x in free] == [1, 1]:
        return replace(
            common, keys="right", query_dim=free[0][0], key_dim=free[1][0], scores=True,
            moved_bytes=sizes[0] + sizes[1], key_bytes=sizes[1],
        )  # fmt: skip
    for i in range(2):
        weights, values = sequences[i], sequences[1 - i]
        if len(weights) == 2 and len(free[i]) == 1 and len(values) == 1 and not free[1 - i]:
            side: Literal["left", "right"] = "left" if i else "right"
            return replace(
                common, keys=side, query_dim=free[i][0], key_dim=values[0],
                moved_bytes=sizes[1 - i] + sizes[2], key_bytes=sizes[1 - i],
            )  # fmt: skip
    return None


def _with_keys(
    closed: Any, eqns: Sequence[Any], found: list[Product]
) -> tuple[Product, ...] | None:
    """Says of each product of two free sequences which is the keys': the one contracted later."""
    numbers = {id(eqn): i for i, eqn in enumerate(eqns)}
    out = list(found)
    sides: dict[int, Literal["left", "right"]] = {}
    _follow(closed, [()] * len(closed.jaxpr.invars), numbers, found, sides)
    for i, product in enumerate(found):
        if not product.scores:
            continue
        if i not in sides:
            return None
        if sides[i] == "left":
            sizes = [v.aval.size * v.aval.dtype.itemsize for v in eqns[i].invars]
            out[i] = replace(
                product, keys="left", query_dim=product.key_dim, key_dim=product.query_dim,
                key_bytes=sizes[0],
            )  # fmt: skip
    return tuple(out)


def _follow(
    closed: Any,
    given: Sequence[Labels],
    numbers: Mapping[int, int],
    found: Sequence[Product],
    sides: dict[int, Literal["left", "right"]],
) -> list[Labels]:
    """Carries each score's two sequences along to the product that contracts one of them.

    A label is "3l": of product 3, its left operand's sequence.
    """
    jaxpr = closed.jaxpr
    env: dict[Any, Labels] = {
        v: labels for v, labels in zip(jaxpr.invars, given, strict=True) if labels
    }

    def labels_of(atom: Any) -> Labels:
        none: Labels = (frozenset(),) * len(getattr(atom.aval, "shape", ()))
        return none if is_literal(atom) else env.get(atom, none)

    for eqn in jaxpr.eqns:
        if _is_product(eqn):
            number = numbers[id(eqn)]
            product = found[number]
            if product.keys is None:
                continue
            if product.scores:
                rank = len(eqn.outvars[0].aval.shape)
                new = [frozenset[str]()] * rank
                _, _, left = result_dims(replace(product, keys="right"), eqn)
                _, _, right = result_dims(
                    replace(product, keys="left", query_dim=product.key_dim), eqn
                )
                new[left], new[right] = frozenset({f"{number}l"}), frozenset({f"{number}r"})
                env[eqn.outvars[0]] = tuple(new)
            else:
                i = 0 if product.keys == "right" else 1
                contracted = eqn.params["dimension_numbers"][0][i]
                for dim in contracted:
                    for label in labels_of(eqn.invars[i])[dim]:
                        sides[int(label[:-1])] = "left" if label[-1] == "l" else "right"
        elif eqn.primitive.name in _CALLS:
            inner = _follow(
                call_jaxpr(eqn), [labels_of(v) for v in eqn.invars], numbers, found, sides
            )
            env.update((v, x) for v, x in zip(eqn.outvars, inner, strict=True))
        else:
            for v in eqn.outvars:
                env[v] = _carried(eqn, v, labels_of)
    return [labels_of(v) for v in jaxpr.outvars]


def _carried(eqn: Any, out: Any, labels_of: Callable[[Any], Labels]) -> Labels:
    """Labels of a result, from those of what it is computed from, dim by dim."""
    name, shape = eqn.primitive.name, getattr(out.aval, "shape", ())
    none: Labels = (frozenset(),) * len(shape)
    arrays = [v for v in eqn.invars if any(labels_of(v))]
    if not arrays:
        return none
    source, labels = arrays[0], labels_of(arrays[0])
    if name == "transpose":
        return tuple(labels[d] for d in eqn.params["permutation"])
    if name == "broadcast_in_dim":
        new = list(none)
        for dim, to in enumerate(eqn.params["broadcast_dimensions"]):
            new[to] = labels[dim]
        return tuple(new)
    if name == "squeeze":
        return tuple(x for d, x in enumerate(labels) if d not in eqn.params["dimensions"])
    if name.startswith("reduce_"):
        return tuple(x for d, x in enumerate(labels) if d not in eqn.params["axes"])
    if name == "reshape":
        return _reshaped(source.aval.shape, labels, shape)
    if all(_spreads_to(v.aval.shape, shape) for v in eqn.invars):
        return tuple(
            frozenset().union(*(labels_of(v)[d] for v in arrays if v.aval.shape != ()))
            for d in range(len(shape))
        )
    return none


def _spreads_to(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an operand of an elementwise operation is a scalar or of the result's rank."""
    return not shape or (
        len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True))
    )


def _reshaped(before: tuple[int, ...], labels: Labels, after: tuple[int, ...]) -> Labels:
    """Labels through a reshape that only adds or drops dims of 1, or joins and parts others."""
    out: list[frozenset[str]] = [frozenset()] * len(after)
    i = j = 0
    while i < len(before) and j < len(after):
        if before[i] == after[j]:
            out[j] = labels[i]
            i, j = i + 1, j + 1
        elif before[i] == 1:
            i += 1
        elif after[j] == 1:
            j += 1
        else:
            # Joined dims are not told apart; skip to where both sides agree again.
            left, right = before[i], after[j]
            i, j = i + 1, j + 1
            while left != right:
                if left < right:
                    left, i = left * before[i], i + 1
                else:
                    right, j = right * after[j], j + 1
    return tuple(out)
