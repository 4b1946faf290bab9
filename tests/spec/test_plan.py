"""The plan's own values: what each of them refuses, with the whole message."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardpar.errors import PlanError, SpecError
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Objective, Pipeline, Plan, Stage

ALL = (LayerStrategy("all"),)
ONE = Stage((0,), Mesh(), ALL)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: LayerStrategy("embed", tensor=("a",), fsdp=("b",), zero1=("a",)),
            "layers embed: an axis is used twice in tensor ['a'], fsdp ['b'], zero1 ['a']; "
            "each axis may serve one of them",
        ),
        (
            lambda: LayerStrategy("embed", fsdp=("a",), sequence_parallel=True),
            "layers embed: sequence_parallel splits over the tensor axes, and there are none; "
            "drop it or give tensor axes",
        ),
        (
            lambda: LayerStrategy("embed", recompute="all"),
            "layers embed: recompute is 'all'; write none, selective or full",
        ),
        (lambda: Stage((1, 0, 1), Mesh(), ALL), "a stage lists a device twice: [1, 0, 1]"),
        (
            lambda: Stage((0, -1), Mesh.factored(2), ALL),
            "a stage lists device -1; the first device is 0",
        ),
        (
            lambda: Stage((0, 1, 2), Mesh.factored(2), ALL),
            "a stage has 3 devices but its mesh {a: 2} holds 2; their numbers must agree",
        ),
        (
            lambda: Stage((), Mesh(), ALL),
            "a stage has 0 devices but its mesh {} holds 1; their numbers must agree",
        ),
        (lambda: Stage((4,), Mesh(), ()), "the stage on devices [4] has no layers"),
        (
            lambda: Stage((0, 1), Mesh.factored(2), (LayerStrategy("all", zero1=("b",)),)),
            'the mesh has no axis "b"; its axes are a',
        ),
        (
            lambda: Pipeline(8, 0, (ONE,)),
            "a pipeline has 8 sequences in micro-batches of 0; both must be at least 1",
        ),
        (
            lambda: Pipeline(8, 3, (ONE,)),
            "a pipeline's 8 sequences cannot be cut into micro-batches of 3; use a divisor of 8",
        ),
        (
            lambda: Pipeline(8, 8, (ONE,), "zigzag"),
            "schedule is 'zigzag'; write 1f1b, gpipe, interleaved or single_jit",
        ),
        (lambda: Pipeline(8, 8, ()), "a pipeline has no stages"),
        (lambda: Plan("x", 0, ()), "a plan has no pipelines; give it at least one"),
        (
            lambda: Plan("x", 8, (Pipeline(4, 2, (ONE,)), Pipeline(2, 1, (ONE,)))),
            "the pipelines take 4 + 2 = 6 sequences, but global_batch is 8",
        ),
        (
            lambda: Plan("x", 6, (Pipeline(4, 2, (ONE,)), Pipeline(2, 1, (ONE,)))),
            "devices [0] belong to more than one stage",
        ),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(build, message):
    with pytest.raises(SpecError) as error:
        build()
    assert str(error.value) == message
    assert isinstance(error.value, PlanError) or "mesh has no axis" in message


def on(*devices, mesh=None):
    return Stage(devices, mesh or Mesh.factored(len(devices)), ALL)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            (on(0), on(1)),
            "an interleaved pipeline has 2 stages on 2 groups of devices; let stage s be on the "
            "devices of stage s - 2, at least twice around, or write schedule: 1f1b",
        ),
        (
            (on(0), on(1), on(0)),
            "an interleaved pipeline has 3 stages on 2 groups of devices; let stage s be on the "
            "devices of stage s - 2, at least twice around, or write schedule: 1f1b",
        ),
        (
            (on(0), on(1), on(1), on(0)),
            "an interleaved pipeline has 4 stages on 2 groups of devices; let stage s be on the "
            "devices of stage s - 2, at least twice around, or write schedule: 1f1b",
        ),
        (
            (on(0, 1), on(2), on(1, 0), on(2)),
            "an interleaved pipeline has 4 stages on 3 groups of devices; let stage s be on the "
            "devices of stage s - 3, at least twice around, or write schedule: 1f1b",
        ),
        (
            (on(0, 1, 2, 3), on(0, 1, 2, 3, mesh=Mesh((("a", 4),)))),
            "the stages on devices [0, 1, 2, 3] have meshes {a: 2, b: 2} and {a: 4}; give them "
            "one mesh",
        ),
        (
            (on(0), on(1), on(2)) * 2,
            "an interleaved pipeline on 3 groups of devices has 8 micro-batches; use a multiple "
            "of 3",
        ),
    ],
)
def test_an_interleaved_pipeline_goes_around_its_groups_of_devices(stages, message):
    with pytest.raises(PlanError) as error:
        Pipeline(8, 1, stages, "interleaved")
    assert str(error.value) == message


def test_groups_chunks_and_devices_of_an_interleaved_pipeline():
    pipeline = Pipeline(8, 2, (on(4, 5), on(0)) * 3, "interleaved")
    assert (pipeline.num_groups, pipeline.chunks, pipeline.num_microbatches) == (2, 3, 4)
    plan = Plan("x", 10, (pipeline, Pipeline(2, 1, (on(6), on(7)))))
    assert plan.devices == (4, 5, 0, 6, 7)
    assert (plan.pipelines[1].num_groups, plan.pipelines[1].chunks) == (2, 1)


def test_stages_that_share_devices_without_being_interleaved_are_refused():
    with pytest.raises(PlanError, match=r"devices \[0, 1\] belong to more than one stage"):
        Plan("x", 8, (Pipeline(8, 1, (on(0), on(1), on(0), on(1))),))


def test_the_batch_is_split_by_all_axes_but_the_tensor_ones():
    mesh = Mesh.factored(8)
    assert LayerStrategy("x", fsdp=("c",), zero1=("b",)).data_axes(mesh) == ("a", "b", "c")
    assert LayerStrategy("x", tensor=("c", "a")).data_axes(mesh) == ("b",)


def test_microbatches_and_devices_are_derived():
    two = Stage((5, 3), Mesh.factored(2), ALL)
    plan = Plan("x", 14, (Pipeline(12, 3, (ONE, two)), Pipeline(2, 1, (Stage((7,), Mesh(), ALL),))))
    assert [p.num_microbatches for p in plan.pipelines] == [4, 2]
    assert plan.devices == (0, 5, 3, 7)


@pytest.mark.parametrize(
    ("step_s", "bound", "gap"),
    [(2.0, 1.5, 0.25), (2.0, 2.0, 0.0), (1.0, 2.0, 0.0), (0.0, 0.0, 0.0)],
)
def test_the_gap_is_what_another_plan_could_save_at_most(step_s, bound, gap):
    assert Objective(step_s, bound, 0.0).gap == gap


def test_equal_plans_are_equal_and_hash_alike():
    assert len({Plan("x", 4, (Pipeline(4, 2, (ONE,)),)) for _ in range(2)}) == 1


def test_a_plan_on_other_devices_is_the_same_plan():
    there = Stage((1,), Mesh(), ALL)
    plan = Plan("c", 3, (Pipeline(2, 1, (ONE,)), Pipeline(1, 1, (there,))))
    moved = plan.on((5, 2, 9))
    assert moved.devices == (5, 2)
    assert [p.sequences for p in moved.pipelines] == [2, 1]
    assert plan.on((0, 1)) == plan


def test_a_plan_on_too_few_devices_is_refused():
    plan = Plan("c", 1, (Pipeline(1, 1, (replace(ONE, devices=(3,)),)),))
    with pytest.raises(PlanError) as error:
        plan.on((4, 5))
    assert str(error.value) == (
        "the plan uses device 3, but only 2 devices are given to put it on; name one for each "
        "that it uses"
    )
