"""Layouts over groups: validation, text, pieces; against jax's NamedSharding and NumPy."""

from __future__ import annotations

import contextlib
import random

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import SpecError
from shardpar.lowering.shardings import group_of, group_sharding, named_sharding
from shardpar.spec.layout import Block, Group, Layout, Partial, Replicate, Split, SplitAcross
from shardpar.spec.layout_text import layout_from_text
from shardpar.spec.mesh import GroupLayout
from tests.lowering.layouts import SHAPES, numpy_pieces, random_layout, whole
from tests.spec.values import dealt, meshes

seeds = st.integers(0, 10**6)


def some_layout(seed: int) -> tuple[Layout, tuple[int, ...]]:
    draw = random.Random(seed)
    shape = draw.choice(SHAPES)
    return random_layout(draw, shape), shape


@given(seeds)
def test_the_text_of_a_layout_reads_back_equal(seed):
    layout, _ = some_layout(seed)
    assert layout_from_text(str(layout)) == layout
    assert hash(layout_from_text(str(layout))) == hash(layout)


@pytest.mark.parametrize(
    "text",
    [
        "[0,1,2,3]{split0:2, dup:2} + [4,5]{split1:2} across partial",
        "[0,1]{partial:2}",
        "[0,1]{split0:2} + [2]{} across split0(5,3)",
        "[0]{} + [1]{} across dup",
        "[0,1]{split0:2} + [2]{} across split0(0:2,1:2,0:2,1:2)",
    ],
)
def test_the_notation_of_the_field_round_trips_as_it_is(text):
    assert str(layout_from_text(text)) == text


def test_blanks_and_empty_braces_may_be_left_out_or_put_in():
    same = layout_from_text("[0,1]{split0:2}+[2]across split0(5,3)")
    assert (
        layout_from_text(" [ 0 , 1 ] { split0 : 2 } + [ 2 ] { } across split0 ( 5 , 3 ) ") == same
    )


@given(seeds)
def test_the_pieces_of_a_layout_are_the_array(seed):
    layout, shape = some_layout(seed)
    value = np.random.default_rng(seed).integers(-99, 99, shape)
    assert np.array_equal(whole(layout, shape, numpy_pieces(layout, value, seed)), value)


@st.composite
def named_groups(draw):
    """A layout over named axes, a shape it divides, and devices for it in any order."""
    mesh = draw(meshes(most=8))
    *dims, partial = draw(dealt(mesh, draw(st.integers(1, 3))))
    shape = tuple(mesh.size_of(axes) * draw(st.integers(1, 3)) for axes in dims)
    devices = tuple(draw(st.permutations(range(8)))[: mesh.num_devices])
    return GroupLayout(mesh, tuple(dims), partial), shape, devices


def jax_mesh(devices, mesh):
    chosen = np.array([jax.devices()[d] for d in devices], dtype=object)
    return jax.sharding.Mesh(chosen.reshape(mesh.sizes), mesh.names)


@settings(deadline=None, max_examples=150)
@given(named_groups())
def test_a_group_has_its_pieces_where_jax_puts_them(case):
    named, shape, devices = case
    sharding = named_sharding(jax_mesh(devices, named.mesh), named)
    expected = {
        device.id: tuple((s.indices(n)[0], s.indices(n)[1]) for s, n in zip(at, shape, strict=True))
        for device, at in sharding.devices_indices_map(shape).items()
    }
    group = Group.of(devices, named)
    got = {p.device: tuple(spans[0] for spans in p.spans) for p in group.pieces(shape)}
    assert got == expected


@settings(deadline=None, max_examples=150)
@given(named_groups())
def test_a_group_becomes_a_named_sharding_and_back(case):
    named, shape, devices = case
    group = Group.of(devices, named)
    sharding = group_sharding(group, len(shape), jax.devices())
    again = group_of(sharding, jax.devices())
    assert again.pieces(shape) == group.pieces(shape)
    assert again == group or not group.entries
    if not named.partial:
        theirs = named_sharding(jax_mesh(devices, named.mesh), named)
        assert sharding.is_equivalent_to(theirs, len(shape)) or (
            sharding.devices_indices_map(shape) == theirs.devices_indices_map(shape)
        )
    else:
        assert len(sharding.spec.unreduced) == sum(isinstance(e, Partial) for e in group.entries)


WRONG = {
    "overlap": ("[0,1]{split0:2} + [1]{} across dup", "device 1 is in group 0 and in group 1"),
    "device twice": ("[0,0]{dup:2}", "lists device 0 twice"),
    "too few places": ("[0,1,2]{split0:2}", "has 3 devices, but its entries make 2 places"),
    "one part": ("[0]{split0:1}", "split0:1 has 1 part; write 2 or more, or leave it out"),
    "across one group": ("[0,1]{dup:2} across partial", "one group has nothing to be across"),
    "no across": ("[0]{} + [1]{}", 'column 14: expected "+" or "across dup"'),
    "extents of too few": ("[0] + [1] + [2] across split0(5,3)", "give each group its extent"),
    "extent 0": ("[0] + [1] across split0(0,8)", "an extent is 0; write 1 or more"),
    "two in a row": ("[0]+[1] across split0(0:2,0:3,1:3)", "two blocks in a row; write their sum"),
    "unknown entry": (
        "[0,1]{shard0:2}",
        'column 7: expected split0:2, dup:2 or partial:2, got "sh',
    ),
    "no brackets": ("0,1{dup:2}", 'column 1: expected a group such as [0,1]{split0:2}, got "0"'),
    "nothing": ("", "column 1: expected a group such as [0,1]{split0:2}, got the end"),
    "rest": ("[0]{} x", 'column 7: expected nothing more, got "x"'),
    "sign": ("[0]{} - [1]", 'column 7: expected a layout, got "-"'),
    "negative": ("[-1]", 'column 2: expected a layout, got "-"'),
    "huge": ("[99999999999]", "a device number below a thousand million"),
    "open": ("[0,1]{split0:2", 'expected "}" after the entries, got the end'),
    "no dim": ("[0,1]{split:2}", "expected a dim after"),
}


@pytest.mark.parametrize("case", WRONG)
def test_text_that_is_no_layout_is_refused_in_one_line(case):
    text, message = WRONG[case]
    with pytest.raises(SpecError) as error:
        layout_from_text(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


MISFITS = {
    "rank": ("[0,1]{split2:2}", "splits dim 2, but the array has 2 dims"),
    "indivisible": ("[0,1,2]{split0:3}", "3 parts, which do not divide its 8 indices"),
    "top rank": ("[0] + [1] across split2(4,4)", "shape (8, 8) has 2 dims"),
    "sum": ("[0] + [1] across split0(5,4)", "add up to 9, but dim 0 of shape (8, 8) has 8"),
    "block": ("[0,1]{split0:2} + [2]{} across split0(5,3)", "do not divide its 5 indices"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_layout_that_does_not_fit_the_array_says_why(case):
    text, message = MISFITS[case]
    with pytest.raises(SpecError) as error:
        layout_from_text(text).pieces((8, 8))
    assert message in str(error.value)


def test_layouts_are_values():
    layout = Layout((Group((0,)), Group((1,))), SplitAcross(0, (Block(0, 5), Block(1, 3))))
    with pytest.raises(AttributeError):
        layout.across = "dup"
    assert {layout: 1}[layout_from_text(str(layout))] == 1
    with pytest.raises(SpecError, match="across 'sum'; write dup, partial or a SplitAcross"):
        Layout((Group((0,)), Group((1,))), "sum")


def test_an_empty_dim_is_refused():
    with pytest.raises(SpecError, match="has a dim without indices"):
        layout_from_text("[0]").pieces((0, 3))


def test_replicate_and_split_of_every_rank_have_names():
    group = Group((0, 1, 2, 3), (Replicate(2), Split(1, 2)))
    assert group.named(3).dims == ((), ("b",), ())


WORDS = st.sampled_from(
    ["[", "]", "{", "}", "(", ")", ",", ":", "+", "0", "1", "2", "7", "split", "split0", "dup",
     "partial", "across", " ", "9" * 12, "x", "é", "-", "\n"]
)  # fmt: skip


def only_spec_errors(text: str) -> None:
    with contextlib.suppress(SpecError):
        layout_from_text(text).pieces((4, 4))


@settings(deadline=None, max_examples=3000)
@given(st.text(max_size=60) | st.lists(WORDS, max_size=25).map("".join))
def test_garbage_is_a_spec_error_and_nothing_else(text):
    only_spec_errors(text)


@pytest.mark.slow
def test_a_hundred_thousand_broken_texts_are_spec_errors_and_nothing_else():
    draw = random.Random(0)
    good = [str(some_layout(seed)[0]) for seed in range(200)]
    alphabet = "[]{}(),:+ 0123456789abcdefilnoprstuxé-\n\t"
    for _ in range(100_000):
        text = list(draw.choice(good))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(text) + 1)
            cut = draw.choice((0, 0, 1, 1, 3))
            text[at : at + cut] = draw.choice((draw.choice(alphabet), "", "split", "9" * 10))
        only_spec_errors("".join(text))
