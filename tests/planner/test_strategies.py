"""What a layer may do: every strategy once, and only what the pins allow."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.errors import PlanError
from shardpar.planner.options import SearchOptions
from shardpar.planner.strategies import Pins, describe, layer_strategies, pins_of
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy
from tests.planner.cases import gpt


def degrees(strategy, mesh):
    """(plain, zero1, fsdp, tensor, sequence parallel, recompute)."""
    own = (*strategy.zero1, *strategy.fsdp, *strategy.tensor)
    return (
        mesh.size_of(mesh.without(own)),
        *(mesh.size_of(axes) for axes in (strategy.zero1, strategy.fsdp, strategy.tensor)),
        strategy.sequence_parallel,
        strategy.recompute,
    )


def brute_force(devices, pins):
    """Every way to cut the mesh's axes into plain, zero1, fsdp and tensor ones, in that order."""
    sizes = Mesh.factored(devices).sizes
    cuts = range(len(sizes) + 1)
    for i in cuts:
        for j in cuts[i:]:
            for k in cuts[j:]:
                plain, zero1, fsdp, tensor = (
                    math.prod(part) for part in (sizes[:i], sizes[i:j], sizes[j:k], sizes[k:])
                )
                for parallel in (False, True):
                    for recompute in ("none", "selective", "full"):
                        chosen = {
                            "data": plain * zero1, "fsdp": fsdp, "tensor": tensor, "zero1": zero1,
                            "recompute": recompute,
                        }  # fmt: skip
                        if parallel and tensor == 1:
                            continue
                        # On one tensor shard there is no sequence to split: the pin says nothing.
                        if tensor > 1 and pins.sequence_parallel not in (None, parallel):
                            continue
                        if any(getattr(pins, key) not in (None, v) for key, v in chosen.items()):
                            continue
                        yield (plain, zero1, fsdp, tensor, parallel, recompute)


def pinned(values):
    return st.none() | st.sampled_from(values)


all_pins = st.builds(
    Pins,
    data=pinned([1, 2, 3, 4, 8]),
    fsdp=pinned([1, 2, 3, 4, 8]),
    tensor=pinned([1, 2, 3, 4, 8]),
    zero1=pinned([1, 2, 4]),
    sequence_parallel=pinned([True, False]),
    recompute=pinned(["none", "selective", "full"]),
)


@given(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]), all_pins)
def test_strategies_are_all_that_the_pins_allow_and_each_once(devices, pins):
    mesh = Mesh.factored(devices)
    found = list(layer_strategies(mesh, pins))
    assert len(set(found)) == len(found)
    assert sorted(degrees(s, mesh) for s in found) == sorted(brute_force(devices, pins))


def test_tensor_parallelism_takes_the_fastest_links_then_fsdp_then_zero1():
    pins = Pins(data=4, fsdp=2, tensor=2, zero1=2, recompute="none", sequence_parallel=True)
    assert list(layer_strategies(Mesh.factored(16), pins)) == [
        LayerStrategy("", ("d",), ("c",), ("b",), sequence_parallel=True)
    ]


def test_pins_of_the_options_hold_for_every_layer():
    options = SearchOptions(
        data=4, fsdp=1, tensor=2, zero1=2, sequence_parallel=False, recompute="full", microbatch=3
    )
    assert pins_of(gpt(), options) == {
        layer.name: Pins(4, 1, 2, 2, False, "full", 3) for layer in gpt().layers
    }
    assert set(pins_of(gpt(), SearchOptions()).values()) == {Pins()}


def test_what_is_fixed_holds_for_its_layers_on_top_of_the_pins():
    options = SearchOptions(
        tensor=4, recompute="selective",
        fix="blocks[1:3] tensor=2 sequence_parallel=False; head zero1=4 data=8 fsdp=1 ;"
        " blocks[2]..head recompute=full;",
    )  # fmt: skip
    common = Pins(tensor=4, recompute="selective")
    assert pins_of(gpt(), options) == {
        "embed": common,
        "blocks[0]": common,
        "blocks[1]": Pins(tensor=2, sequence_parallel=False, recompute="selective"),
        "blocks[2]": Pins(tensor=2, sequence_parallel=False, recompute="full"),
        "blocks[3]": Pins(tensor=4, recompute="full"),
        "head": Pins(tensor=4, zero1=4, data=8, fsdp=1, recompute="full"),
        "outside": common,
    }


def test_of_two_that_fix_one_thing_the_last_holds():
    options = SearchOptions(fix="blocks tensor=2 fsdp=4; blocks[3] tensor=1")
    pins = pins_of(gpt(), options)
    assert pins["blocks[2]"] == Pins(tensor=2, fsdp=4)
    assert pins["blocks[3]"] == Pins(tensor=1, fsdp=4)


@pytest.mark.parametrize("text", [None, "", " ; ;"])
def test_nothing_may_be_fixed(text):
    assert set(pins_of(gpt(), SearchOptions(fix=text)).values()) == {Pins()}


KEYS = "data, fsdp, tensor, zero1, context, recompute, sequence_parallel, attention"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "blocks",
            'plan.fix: "blocks" fixes nothing; write layers, then what holds for them: '
            '"blocks[0:4] tensor=2 recompute=full"',
        ),
        (
            "head fsdp=1; tensor=2",
            'plan.fix: "tensor=2" fixes nothing; write layers, then what holds for them: '
            '"blocks[0:4] tensor=2 recompute=full"',
        ),
        (
            "blocks tensors=2",
            f'plan.fix: "blocks tensors=2": tensors=2 is not one of {KEYS} with a value; '
            'did you mean "tensor"?',
        ),
        (
            "blocks tensor",
            f'plan.fix: "blocks tensor": tensor is not one of {KEYS} with a value; '
            'did you mean "tensor"?',
        ),
        (
            "blocks microbatch=2",
            f'plan.fix: "blocks microbatch=2": microbatch=2 is not one of {KEYS} with a value',
        ),
        (
            "blocks tensor=0",
            'plan.fix: "blocks tensor=0": tensor is "0"; write a degree, 1 or more',
        ),
        (
            "blocks zero1=two",
            'plan.fix: "blocks zero1=two": zero1 is "two"; write a degree, 1 or more',
        ),
        (
            "blocks recompute=some",
            'plan.fix: "blocks recompute=some": recompute is "some"; '
            "write none or selective or full",
        ),
        (
            "blocks sequence_parallel=yes",
            'plan.fix: "blocks sequence_parallel=yes": sequence_parallel is "yes"; '
            "write true or false",
        ),
        (
            "block[0] tensor=2",
            'plan.fix: layers "block[0]": the model has no such layer; its layers are embed, '
            'blocks[0:4], head, outside; did you mean "blocks[0]"?',
        ),
        (
            "blocks[2:9] tensor=2",
            'plan.fix: layers "blocks[2:9]": the model has blocks[0:4]; write a range inside it',
        ),
    ],
)
def test_what_cannot_be_fixed_is_said(text, message):
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        pins_of(gpt(), SearchOptions(fix=text))


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        ({}, "dp8"),
        ({"recompute": "full"}, "dp8, recompute full"),
        ({"fsdp": ("a", "b", "c")}, "fsdp8"),
        ({"zero1": ("a", "b", "c")}, "zero1-8"),
        ({"zero1": ("a",), "tensor": ("c",)}, "dp2 zero1-2 tp2"),
        (
            {"fsdp": ("b",), "tensor": ("c",), "sequence_parallel": True, "recompute": "full"},
            "dp2 fsdp2 tp2 sp, recompute full",
        ),
    ],
)
def test_a_strategy_is_described_as_people_write_it(strategy, text):
    assert describe(LayerStrategy("all", **strategy), Mesh.factored(8)) == text


def test_a_strategy_for_one_device_says_so():
    assert describe(LayerStrategy("all"), Mesh()) == "one device"
