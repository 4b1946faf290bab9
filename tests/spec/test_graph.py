"""Layer graphs: what they add up, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardpar.errors import SpecError
from shardpar.spec.graph import Activation, Layer, LayerGraph, Parameter
from tests.spec.values import DOWN, LENGTH, SCALE, TABLE, UP, gpt_like, layer_class

GRAPH = gpt_like(blocks=3)


def test_parameters_are_counted_once_however_often_they_are_read():
    table, block, head = 96 * 64, 2 * 64 * 256 + 64, 64
    assert GRAPH.num_parameters == table + 3 * block + head
    assert [name for name, _, _ in GRAPH.parameters] == [
        "embed.table",
        *(f"blocks.{i}.{name}" for i in range(3) for name in ("down", "norm.scale", "up")),
        "head.norm.scale",
    ]
    assert sum(parameter.size for _, _, parameter in GRAPH.parameters) == GRAPH.num_parameters


def test_the_owner_of_a_parameter_stands_beside_it():
    owners = {name: layer.name for name, layer, _ in GRAPH.parameters}
    assert owners["blocks.1.up"] == "blocks[1]"
    assert Layer("outside", "", "outside").parameter_name(TABLE) == "table"


def test_model_flops_leave_out_the_masked_half_of_attention():
    # Each class of the hand-made graph has 3e6 FLOPs of products, 1e6 of them attention.
    tokens, layers = 8 * LENGTH, 6
    assert GRAPH.tokens == tokens
    assert GRAPH.flops_per_token == 3 * layers * 2.5e6 / tokens
    assert replace(GRAPH, causal=False).flops_per_token == 3 * layers * 3e6 / tokens


def test_full_recompute_keeps_the_inputs_that_grow_with_the_batch():
    mask = Activation((16, 16), "bool")
    stream = Activation((8, 16, 64), "bfloat16", 0, 1)
    cls = layer_class(
        "Block", inputs=(stream, mask), saved_bytes=(("none", 9.0), ("selective", 4.0))
    )
    entering = 8 * 16 * 64 * 2
    assert cls.input_bytes == entering
    assert [cls.saved(r) - entering for r in ("none", "selective", "full")] == [9.0, 4.0, 0.0]


STREAM_BYTES = 8 * LENGTH * 64 * 4


def test_where_weights_are_gathered_what_is_made_of_them_is_not_kept():
    cls = layer_class(
        "Block",
        saved_bytes=(("none", 9.0), ("gathered", 7.0), ("selective", 4.0)),
        whole_bytes=(("none", 3.0), ("gathered", 2.0), ("selective", 1.0)),
    )
    choices = ("none", "selective", "full")
    for gathers, saved, whole in (
        (False, [9.0, 4.0, 0.0], [3.0, 1.0, 0.0]),
        (True, [7.0, 4.0, 0.0], [2.0, 1.0, 0.0]),
    ):
        assert [cls.saved(r, gathers) - STREAM_BYTES for r in choices] == saved
        assert [cls.whole(r, gathers) for r in choices] == whole


def test_without_figures_for_gathered_weights_those_of_none_count():
    cls = layer_class("Block", saved_bytes=(("none", 9.0), ("selective", 4.0)))
    assert cls.saved("none", gathers=True) == cls.saved("none") == STREAM_BYTES + 9.0
    assert [cls.whole(r, g) for r in ("none", "full") for g in (True, False)] == [0.0] * 4


def test_scratch_is_the_chains_for_a_choice_and_the_layers_where_that_is_unknown():
    cls = layer_class("Block", temp_bytes=5.0, scratch_bytes=(("none", 3.0), ("full", 8.0)))
    assert [cls.scratch(r) for r in ("none", "selective", "full")] == [3.0, 5.0, 8.0]
    assert layer_class("Block", temp_bytes=5.0).scratch("full") == 5.0


def test_bytes_follow_shape_and_dtype():
    assert UP.num_bytes == DOWN.num_bytes == 64 * 256 * 4
    assert Parameter("scalar", (), "bfloat16", ()).num_bytes == 2
    assert Activation((3, 5), "bool").num_bytes == 15


BLOCK = layer_class("Block")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Parameter("up", (4, 4), "float32", ("embed",)),
            "parameter up: 1 logical names ('embed',) for shape (4, 4); "
            "give one name or None per dim",
        ),
        (
            lambda: LayerGraph(
                "m", 1, 1, "float32", (BLOCK,), (Layer("a", "a", "Block"), Layer("a", "b", "Block"))
            ),
            "two layers have one name: ['a', 'a']",
        ),
        (
            lambda: LayerGraph("m", 1, 1, "float32", (BLOCK,), (Layer("a", "a", "Blok"),)),
            'layer a: there is no layer class "Blok"',
        ),
        (
            lambda: LayerGraph("m", 0, 4, "float32", (BLOCK,), ()),
            "graph of m: batch is 0 and tokens 4; both must be at least 1",
        ),
        (
            lambda: layer_class("Block", saved_bytes=(("none", 1.0),)),
            "layer class Block: saved_bytes has none; write the bytes for none and for selective",
        ),
        (
            lambda: layer_class("Block", saved_bytes=()),
            "layer class Block: saved_bytes has nothing; "
            "write the bytes for none and for selective",
        ),
        (
            lambda: layer_class(
                "Block", saved_bytes=(("none", 1.0), ("gathered", 1.0), ("full", 1.0))
            ),
            "layer class Block: saved_bytes has none, gathered, full; "
            "write the bytes for none and for selective",
        ),
    ],
)
def test_a_graph_that_cannot_be_is_refused(build, message):
    with pytest.raises(SpecError) as error:
        build()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: Parameter("up", (4,), "float7", (None,)), "parameter up"),
        (lambda: Activation((4, 2), "float7"), "an activation of shape (4, 2)"),
    ],
)
def test_a_dtype_of_unknown_size_is_refused_at_once(build, what):
    with pytest.raises(SpecError) as error:
        build()
    assert str(error.value).startswith(f"{what} has dtype float7, whose bytes are unknown; ")
    assert "bfloat16" in str(error.value)


def test_classes_are_found_by_layer():
    assert GRAPH.class_of(GRAPH.layers[1]).parameters == (DOWN, SCALE, UP)
