"""Every rule between a plan, its graph and its cluster, with the whole message it gives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardpar.errors import PlanError
from shardpar.spec.check import check
from shardpar.spec.graph import Activation, Parameter
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from tests.spec.values import STREAM, cluster_of, gpt_like, layer_class, uniform_plan

GRAPH = gpt_like(blocks=4)


def stage(first: int, *selectors: str, devices: int = 1, **axes) -> Stage:
    layers = tuple(LayerStrategy(selector, **axes) for selector in selectors)
    return Stage(tuple(range(first, first + devices)), Mesh.factored(devices), layers)


def plan_of(*pipelines: Pipeline) -> Plan:
    return Plan("hand", sum(p.sequences for p in pipelines), pipelines)


def pipeline(*stages: Stage, microbatch: int = 4) -> Pipeline:
    return Pipeline(4, microbatch, stages)


def message(plan, graph=GRAPH, cluster=None) -> str:
    with pytest.raises(PlanError) as error:
        check(plan, graph, cluster)
    return str(error.value)


@pytest.mark.parametrize(
    "plan",
    [
        uniform_plan(8),
        uniform_plan(8, fsdp=("a",), tensor=("b", "c"), sequence_parallel=True),
        uniform_plan(8, zero1=("a", "b"), tensor=("c",)),
        uniform_plan(1, microbatch=1, recompute="full"),
        plan_of(pipeline(stage(0, "head..outside", "blocks", "embed"))),
        plan_of(pipeline(stage(0, "embed..blocks[1]"), stage(1, "blocks[2:4]..outside"))),
        plan_of(
            pipeline(stage(0, "embed..outside")),
            pipeline(stage(1, "embed..blocks[0]"), stage(2, "blocks[1]..outside", devices=4)),
        ),
    ],
)
def test_a_plan_that_can_run_passes(plan):
    check(plan, GRAPH)
    check(plan, GRAPH, cluster_of(devices=8))


def test_devices_that_the_cluster_does_not_have_are_refused():
    plan = uniform_plan(8)
    assert message(plan, cluster=cluster_of(devices=4)) == (
        'the plan uses devices 0-7 but cluster "x" has 4 (0 to 3); '
        "plan again for this cluster, or start with more devices"
    )
    scattered = plan_of(pipeline(stage(0, "embed..blocks"), stage(9, "head..outside", devices=2)))
    assert message(scattered, cluster=cluster_of(devices=10)) == (
        'the plan uses devices 0,9-10 but cluster "x" has 10 (0 to 9); '
        "plan again for this cluster, or start with more devices"
    )
    check(scattered, GRAPH, cluster_of(devices=11))


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        (("embed..head",), "outside has no strategy; add an entry under layers"),
        (
            ("embed", "blocks[0:2]"),
            "blocks[2:4], head, outside have no strategy; add an entry under layers",
        ),
        (
            ("blocks..outside",),
            "embed has no strategy; add an entry under layers",
        ),
        (
            ("embed", "blocks[0:2]", "head..outside"),
            "blocks[2:4] have no strategy; add an entry under layers",
        ),
        (
            ("embed..blocks[2]", "blocks[1:4]"),
            'layer blocks[1] is in both "embed..blocks[2]" and "blocks[1:4]"; '
            "each layer has one strategy",
        ),
        (
            ("embed..blocks[7]",),
            'layers "blocks[7]": the model has no such layer; its layers are embed, blocks[0:4], '
            'head, outside; did you mean "blocks[3]"?',
        ),
    ],
)
def test_a_plan_that_leaves_out_or_repeats_a_layer_is_refused(selectors, expected):
    assert message(plan_of(pipeline(stage(3, *selectors)))) == expected


def test_stages_out_of_model_order_are_refused():
    plan = plan_of(pipeline(stage(0, "blocks[2:4]..outside"), stage(1, "embed..blocks[1]")))
    assert message(plan) == (
        "the stage on devices 0 has layers blocks[2:4], head, outside, but the next 4 layers of "
        "the model are embed, blocks[0:3]; blocks[3], head, outside are out of place"
    )


def test_a_layer_in_two_stages_is_refused():
    plan = plan_of(pipeline(stage(0, "embed..blocks[2]"), stage(1, "blocks[2:4]..outside")))
    assert message(plan) == (
        "the stage on devices 1 has layers blocks[2:4], head, outside, but the next 4 layers of "
        "the model are blocks[3], head, outside; blocks[2] is out of place"
    )


def test_a_fault_in_one_of_several_pipelines_says_which():
    plan = plan_of(pipeline(stage(0, "embed..outside")), pipeline(stage(1, "embed..blocks")))
    assert message(plan) == (
        "pipeline 1: head, outside have no strategy; add an entry under layers"
    )


def test_a_microbatch_that_cannot_be_split_over_the_data_shards_is_refused():
    assert message(uniform_plan(8, microbatch=2, tensor=("c",))) == (
        "layer embed: micro-batches of 2 sequences cannot be split over 4 data shards "
        "(axes a,b); use a multiple of 4"
    )
    check(uniform_plan(8, microbatch=2, tensor=("b", "c")), GRAPH)
    assert message(uniform_plan(4, batch=6)) == (
        "layer embed: micro-batches of 6 sequences cannot be split over 4 data shards "
        "(axes a,b); use a multiple of 4"
    )


def test_each_layer_is_held_to_its_own_strategy():
    entries = (
        LayerStrategy("embed..blocks[1]", tensor=("b", "c")),
        LayerStrategy("blocks[2:4]..outside", tensor=("c",)),
    )
    plan = plan_of(Pipeline(4, 2, (Stage(tuple(range(8)), Mesh.factored(8), entries),)))
    assert message(plan) == (
        "layer blocks[2]: micro-batches of 2 sequences cannot be split over 4 data shards "
        "(axes a,b); use a multiple of 4"
    )


def test_a_sequence_the_tensor_axes_do_not_divide_is_refused_under_sequence_parallelism():
    graph = gpt_like(length=18)
    axes = {"tensor": ("b", "c")}
    check(uniform_plan(8, **axes), graph)
    assert message(uniform_plan(8, **axes, sequence_parallel=True), graph) == (
        "layer embed: sequence length 18 is not divisible by tensor axes b,c (4); "
        "set sequence_parallel: false"
    )


def test_a_flattened_batch_and_sequence_is_not_held_to_the_sequence_rule():
    flat = Activation((6, 4), "float32", 0, 0)
    graph = replace(
        gpt_like(), classes=(layer_class("Block", inputs=(flat,), outputs=(flat,)),),
        layers=(replace(gpt_like().layers[1], name="b"),),
    )  # fmt: skip
    check(uniform_plan(8, layers="b", tensor=("b", "c"), sequence_parallel=True), graph)


@pytest.mark.parametrize("kind", ["parameters", "tied"])
def test_a_parameter_the_tensor_axes_do_not_divide_is_refused(kind):
    odd = Parameter("table", (97, 64), "float32", ("vocab", "embed"))
    head = layer_class("Head", **{kind: (odd,)})
    graph = replace(GRAPH, classes=(*(c for c in GRAPH.classes if c.name != "Head"), head))
    assert message(uniform_plan(8, tensor=("b", "c")), graph) == (
        'layer head: table dim 0 "vocab" (97) is not divisible by tensor axes b,c (4); '
        "use a tensor degree of 1, or pad the dim to 100"
    )


def test_what_does_not_grow_with_the_batch_is_held_to_no_rule():
    mask = Activation((3, 5), "bool", None, 1)
    cls = layer_class("Block", inputs=(STREAM, mask))
    graph = replace(GRAPH, classes=(*(c for c in GRAPH.classes if c.name != "Block"), cls))
    check(uniform_plan(8, tensor=("b", "c"), sequence_parallel=True), graph)


def test_a_layer_left_out_is_named_rather_than_those_after_it():
    plan = plan_of(pipeline(stage(0, "embed", "blocks[1:4]", "head..outside")))
    assert message(plan) == "blocks[0] has no strategy; add an entry under layers"


def test_a_tensor_dim_that_no_parameter_has_is_refused():
    plan = replace(uniform_plan(8, tensor=("a",)), tensor_dims=("mpl",))
    assert message(plan).startswith(
        f'tensor_dims has "mpl", which no parameter of {GRAPH.model} has; did you mean "mlp"?'
    )
