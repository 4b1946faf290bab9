"""Selectors: which layers "embed..blocks[14]" means, and back."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.errors import PlanError
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Stage
from shardpar.spec.select import layer_name, select, strategies, summarise
from tests.spec.values import layered

MODEL = layered("embed", *(f"blocks[{i}]" for i in range(4)), "norm", "head", "blocks[1]@2")


def picked(selector, graph=MODEL):
    return [layer.name for layer in select(selector, graph)]


@pytest.mark.parametrize(
    ("selector", "layers"),
    [
        ("embed", "embed"),
        ("blocks[2]", "blocks[2]"),
        ("blocks", "blocks[0] blocks[1] blocks[2] blocks[3]"),
        ("blocks[:]", "blocks[0] blocks[1] blocks[2] blocks[3]"),
        ("blocks[1:3]", "blocks[1] blocks[2]"),
        ("blocks[2:]", "blocks[2] blocks[3]"),
        ("blocks[:2]", "blocks[0] blocks[1]"),
        ("blocks[1]@2", "blocks[1]@2"),
        ("embed..blocks[1]", "embed blocks[0] blocks[1]"),
        ("blocks[2:4] .. head", "blocks[2] blocks[3] norm head"),
        ("blocks[1]..blocks[1]", "blocks[1]"),
        ("blocks[0:2]..blocks[2:4]", "blocks[0] blocks[1] blocks[2] blocks[3]"),
        ("blocks..norm", "blocks[0] blocks[1] blocks[2] blocks[3] norm"),
    ],
)
def test_a_selector_names_layers_in_graph_order(selector, layers):
    assert picked(selector) == layers.split()


def test_a_stem_alone_means_all_of_it_wherever_its_numbers_start():
    assert picked("b", layered("b[2]", "b[3]")) == ["b[2]", "b[3]"]
    assert picked("b[:3]", layered("b[2]", "b[3]")) == ["b[2]"]


RANGE = "; write a range inside it"
LAYERS = "the model has no such layer; its layers are embed, blocks[0:4], norm, head, blocks[1]@2"


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("blocks[2:9]", f'layers "blocks[2:9]": the model has blocks[0:4]{RANGE}'),
        ("blocks[3:3]", f'layers "blocks[3:3]": the model has blocks[0:4]{RANGE}'),
        ("blocks[3:1]", f'layers "blocks[3:1]": the model has blocks[0:4]{RANGE}'),
        ("blocks[4]", f'layers "blocks[4]": {LAYERS}; did you mean "blocks[3]"?'),
        ("blocks[]", f'layers "blocks[]": {LAYERS}; did you mean "blocks[3]"?'),
        ("blocks[-1]", f'layers "blocks[-1]": {LAYERS}; did you mean "blocks[1]"?'),
        ("bloks", f'layers "bloks": {LAYERS}; did you mean "blocks[3]"?'),
        ("haed", f'layers "haed": {LAYERS}; did you mean "head"?'),
        ("", f'layers "": {LAYERS}; did you mean "embed"?'),
        ("embed..haed", f'layers "haed": {LAYERS}; did you mean "head"?'),
        ("..head", f'layers "": {LAYERS}; did you mean "embed"?'),
        (
            "head..embed",
            'layers "head..embed": head comes after embed; swap the ends',
        ),
        (
            "blocks[2]..blocks[0:2]",
            'layers "blocks[2]..blocks[0:2]": blocks[2] comes after blocks[1]; swap the ends',
        ),
    ],
)
def test_a_selector_that_names_nothing_says_what_there_is(selector, message):
    with pytest.raises(PlanError) as error:
        select(selector, MODEL)
    assert str(error.value) == message


def test_a_range_with_a_hole_is_refused():
    with pytest.raises(PlanError, match=r"the model has b\[0:3\]; write a range inside it"):
        select("b", layered("b[0]", "b[2]"))


@given(st.text(alphabet="abelocks[]:.0123456789 @", max_size=14) | st.text(max_size=12))
def test_any_text_selects_layers_or_is_a_plan_error(text):
    with contextlib.suppress(PlanError):
        assert select(text, MODEL)


stems = st.sampled_from(["a", "b", "enc.blocks", "x[1].y"])
layer_names = st.lists(
    st.builds("{}[{}]".format, stems, st.integers(0, 12)) | st.sampled_from(["a", "b@2", "head"]),
    min_size=1,
    unique=True,
)


@given(layer_names)
def test_selecting_a_summary_gives_the_layers_it_was_made_of(names):
    graph = layered(*names)
    parts = summarise(names).split(", ")
    assert [name for part in parts for name in picked(part, graph)] == names


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["b[0]", "b[1]", "b[2]"], "b[0:3]"),
        (["b[0]", "b[2]", "b[3]"], "b[0], b[2:4]"),
        (["b[1]", "b[0]"], "b[1], b[0]"),
        (["a[0]", "b[1]"], "a[0], b[1]"),
        (["embed", "b[0]", "b[1]", "head"], "embed, b[0:2], head"),
    ],
)
def test_a_summary_joins_what_follows_on(names, text):
    assert summarise(names) == text


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("blocks.3", "blocks[3]"),
        ("enc.blocks.0.attention", "enc.blocks[0].attention"),
        ("a.0.1", "a[0][1]"),
        ("layer3.b", "layer3.b"),
        ("", ""),
    ],
)
def test_a_layer_is_named_after_the_path_of_its_parameters(path, name):
    assert layer_name(path) == name


def test_each_layer_gets_the_strategy_of_the_entry_that_names_it():
    first, second = LayerStrategy("embed..blocks[1]"), LayerStrategy("blocks[2]", recompute="full")
    stage = Stage((0,), Mesh(), (second, first))
    assert strategies(stage, MODEL) == {
        "embed": first,
        "blocks[0]": first,
        "blocks[1]": first,
        "blocks[2]": second,
    }


def test_a_layer_named_twice_is_refused():
    stage = Stage((0,), Mesh(), (LayerStrategy("embed..blocks[1]"), LayerStrategy("blocks[1:3]")))
    with pytest.raises(PlanError) as error:
        strategies(stage, MODEL)
    assert str(error.value) == (
        'layer blocks[1] is in both "embed..blocks[1]" and "blocks[1:3]"; '
        "each layer has one strategy"
    )
