"""Which pipelines one program can run in lockstep, and what is said of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardpar.errors import PlanError
from shardpar.spec.check import check
from shardpar.spec.lockstep import EqualStages, equal_stages, folded
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.schedule import held
from shardpar.spec.text import plan_from_text, plan_to_text
from tests.spec.values import gpt_like, layered

GRAPH = gpt_like(blocks=6)


def stage(devices, *selectors, mesh=None, **choices):
    mesh = Mesh.factored(len(devices)) if mesh is None else mesh
    return Stage(tuple(devices), mesh, tuple(LayerStrategy(x, **choices) for x in selectors))


def pipeline(*stages, sequences=12, microbatch=2):
    return Pipeline(sequences, microbatch, stages, "single_jit")


def plan_of(*pipelines):
    return Plan("hand", sum(p.sequences for p in pipelines), pipelines)


PAIR = (stage([0, 1], "embed..blocks[2]"), stage([2, 3], "blocks[3]..outside"))
THREE = (
    stage([0], "embed", "blocks[0]", "blocks[1]"),
    stage([1], "blocks[2:4]"),
    stage([2], "blocks[4]..outside"),
)


@pytest.mark.parametrize("stages", [PAIR, THREE])
def test_first_and_last_layers_are_told_from_those_that_all_stages_have(stages):
    check(plan_of(pipeline(*stages)), GRAPH)
    each = 6 // len(stages)
    names = [f"blocks[{i}]" for i in range(6)]
    runs = tuple(tuple(names[i : i + each]) for i in range(0, 6, each))
    assert equal_stages(pipeline(*stages), GRAPH) == EqualStages(
        ("embed",), runs, ("head", "outside")
    )


def message(*pipelines, graph=GRAPH):
    with pytest.raises(PlanError) as error:
        check(plan_of(*pipelines), graph)
    return str(error.value)


UNEQUAL = "schedule single_jit needs equal stages, but "
INSTEAD = ", or write schedule: 1f1b"


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            (stage([0], "embed..blocks[1]"), stage([2], "blocks[2]..outside")),
            UNEQUAL
            + "stage 1 has blocks[4:6] besides the 2 layers that each stage has; give each stage "
            "as many layers" + INSTEAD,
        ),
        (
            (THREE[0], stage([1], "blocks[2]"), stage([2], "blocks[3]..outside")),
            UNEQUAL
            + "stage 0 has blocks[0] besides the 1 layers that each stage has; give each stage as "
            "many layers" + INSTEAD,
        ),
        (
            (PAIR[0], stage([2], "blocks[3]..outside")),
            UNEQUAL
            + "stage 0 has 2 devices as {a: 2} and stage 1 has 1 devices as {}; give all stages "
            "one mesh" + INSTEAD,
        ),
        (
            (PAIR[0], stage([2, 3], "blocks[3]..outside", tensor=("a",))),
            UNEQUAL
            + "blocks[0] of stage 0 and blocks[3] of stage 1 have different strategies; give "
            "layers at the same place of every stage one strategy" + INSTEAD,
        ),
        (
            (stage([0], "embed..blocks[5]"), stage([1], "head..outside")),
            UNEQUAL
            + "blocks[5] of stage 0 is of class Block and head, in its place in stage 1, is of "
            "class Head; cut the model so that all stages have the same layers" + INSTEAD,
        ),
        (
            (stage([0], "embed..outside"),),
            "schedule single_jit is for two or more equal stages and there is one, which is one "
            "program anyway; write schedule: 1f1b",
        ),
        (
            tuple(replace(s, mesh=Mesh((("stage", 2),))) for s in PAIR),
            "schedule single_jit needs the axis name 'stage' for itself; call the mesh's axis "
            "something else",
        ),
    ],
)
def test_stages_that_are_not_equal_are_refused_in_words(stages, expected):
    assert message(pipeline(*stages)) == expected


def test_a_model_without_a_first_layer_of_another_class_is_refused_in_words():
    graph = layered("blocks[0]", "blocks[1]")
    graph = replace(
        graph,
        classes=(*graph.classes, replace(graph.classes[0], name="Head")),
        layers=(*graph.layers, replace(graph.layers[0], name="head", class_name="Head")),
    )
    stages = stage([0], "blocks[0]"), stage([1], "blocks[1]", "head")
    assert message(pipeline(*stages, sequences=8), graph=graph) == (
        "schedule single_jit needs a layer of another class in the first stage, such as an "
        "embedding, and there is none; write schedule: 1f1b"
    )


def test_micro_batches_that_stages_cannot_share_are_refused_in_words():
    with pytest.raises(PlanError) as error:
        pipeline(*PAIR, sequences=10)
    assert str(error.value) == (
        "a single_jit pipeline of 2 stages has 5 micro-batches; use a multiple of 2"
    )


def moved(stages, by):
    return tuple(replace(s, devices=tuple(d + by for d in s.devices)) for s in stages)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (pipeline(*moved(PAIR, 4), sequences=8), "sequences 12 and 8"),
        (pipeline(*moved(PAIR, 4), microbatch=6), "microbatch 2 and 6"),
        (replace(pipeline(*moved(PAIR, 4)), schedule="1f1b"), "schedule single_jit and 1f1b"),
        (pipeline(*moved(THREE, 4)), "stages"),
    ],
)
def test_pipelines_that_are_not_equal_are_refused_in_words(other, what):
    assert message(pipeline(*PAIR), other) == (
        "schedule single_jit needs equal pipelines, but pipelines 0 and 1 have different "
        f"{what}; make them equal, or write schedule: 1f1b"
    )


def test_equal_pipelines_are_one_with_an_axis_over_them():
    one = folded(plan_of(pipeline(*PAIR), pipeline(*moved(PAIR, 4))))
    assert [s.devices for s in one.stages] == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert one.stages[0].mesh == Mesh((("pipeline", 2), ("a", 2)))
    assert (one.sequences, one.microbatch, one.num_microbatches) == (24, 4, 6)
    # The axis over pipelines splits the batch, as no strategy names it.
    assert one.stages[0].layers[0].batch_axes(one.stages[0].mesh) == ("pipeline", "a")
    check(plan_of(pipeline(*PAIR), pipeline(*moved(PAIR, 4))), GRAPH)


def test_a_plan_of_equal_stages_is_read_as_it_is_written():
    plan = plan_of(pipeline(*PAIR))
    text = plan_to_text(plan)
    assert "\n  schedule: single_jit\n" in text
    assert plan_from_text(text) == plan


def test_a_stage_in_lockstep_keeps_something_on_every_tick():
    assert [held("single_jit", 4, s, 8) for s in range(4)] == [11] * 4
