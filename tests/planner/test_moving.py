"""Bytes that a change of plan moves, against counting every element of every array."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.planner.moving import moving
from shardpar.planner.setting import Workload
from shardpar.spec.mesh import Mesh
from shardpar.spec.parameters import optimizer_layout, parameter_layout
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.select import strategies
from tests.planner.cases import cluster_of
from tests.planner.test_rebalance import WAYS, pipeline_of
from tests.spec.values import gpt_like

GRAPH = gpt_like(blocks=4)
WORK = Workload(8, loops=False)
CLUSTER = cluster_of(4, 2)


def boxes(plan, which):
    """device -> {(parameter, box)}: what it holds, each box as a tuple of ranges."""
    held = {}
    for pipeline in plan.pipelines:
        for stage in pipeline.stages:
            chosen = strategies(stage, GRAPH)
            for name, layer, parameter in GRAPH.parameters:
                # A stage that reads another one's parameter has a copy too.
                tied = [x.name for x in GRAPH.layers if name in dict(x.tied).values()]
                here = [n for n in (layer.name, *tied) if n in chosen]
                if not here:
                    continue
                layout = which(parameter, chosen[here[0]], stage.mesh, plan.tensor_dims)
                for device, piece in zip(
                    stage.devices, layout.slices(parameter.shape), strict=True
                ):
                    held.setdefault(device, {})[name] = tuple((s.start, s.stop) for s in piece)
    return held


def overlap(a, b):
    size = 1
    for (start, stop), (first, last) in zip(a, b, strict=True):
        size *= max(0, min(stop, last) - max(start, first))
    return size


def lacking(old, new, lost=()):
    """Elements times four bytes that devices of the new plan lack, by what they are of."""
    total = Counter()
    for weight, which in ((1, parameter_layout), (2, optimizer_layout)):
        before, after = boxes(old, which), boxes(new, which)
        for device, names in after.items():
            for name, box in names.items():
                mine = before.get(device, {}).get(name)
                have = 0 if mine is None or device in lost else overlap(mine, box)
                total[name] += 4 * weight * (overlap(box, box) - have)
    return total


@st.composite
def plans(draw):
    pipelines, free = [], list(draw(st.permutations(range(8))))
    for _ in range(draw(st.integers(1, 2))):
        sizes = draw(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=2))
        cut = draw(st.integers(1, 6))
        cuts = (0, 7) if len(sizes) == 1 else (0, cut, 7)
        ways = [draw(st.sampled_from([*WAYS, lambda names: {"zero1": names}])) for _ in sizes]
        pipelines.append(pipeline_of(0, sizes, cuts, 4, 4, ways))
        used, free = free[: sum(sizes)], free[sum(sizes) :]
        stages = Plan("c", 4, (pipelines.pop(),)).on(used).pipelines
        pipelines += stages
    return Plan("hand", 4 * len(pipelines), tuple(pipelines))


@settings(max_examples=80, deadline=None)
@given(plans(), plans())
def test_what_a_device_lacks_is_what_moves(old, new):
    found = moving(old, new, GRAPH, CLUSTER, WORK)
    assert found.moved_bytes == sum(lacking(old, new).values())
    assert found.restored_bytes == 0
    assert (found.move_s > 0) == (found.moved_bytes > 0)
    # No link is faster than those of a host, and each device sends and receives by its own.
    assert found.move_s >= found.moved_bytes / 8 / CLUSTER.intra_host.bandwidth * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(plans(), plans(), st.data())
def test_what_only_lost_devices_had_is_restored(old, new, data):
    lost = data.draw(st.sets(st.sampled_from(old.devices), max_size=3))
    if lost & set(new.devices):
        return
    found = moving(old, new, GRAPH, CLUSTER, WORK, lost)
    assert found.moved_bytes + found.restored_bytes == sum(lacking(old, new, lost).values())
    gone = 0
    for weight, which in ((1, parameter_layout), (2, optimizer_layout)):
        before, after = boxes(old, which), boxes(new, which)
        for names in after.values():
            for name, box in names.items():
                for cell in itertools.product(*(range(*span) for span in box)):
                    if cell[-1] % 32 or cell[0] % 8:
                        continue  # One element stands for those around it, as splits are coarser.
                    unit = tuple((i, i + 1) for i in cell)
                    owners = [
                        d for d, held in before.items()
                        if d not in lost and name in held and overlap(held[name], unit)
                    ]  # fmt: skip
                    step = 32 * (8 if len(cell) > 1 else 1)
                    gone += 0 if owners else 4 * weight * step
    assert found.restored_bytes == gone


def test_a_plan_that_stays_moves_nothing():
    plan = Plan("c", 4, (pipeline_of(0, [2, 1], (0, 3, 7), 4, 4, WAYS[:2]),))
    found = moving(plan, plan, GRAPH, CLUSTER, WORK)
    assert (found.moved_bytes, found.restored_bytes, found.move_s) == (0, 0, 0)


def whole(device):
    return Plan("c", 1, (Pipeline(1, 1, (Stage((device,), Mesh(), (
        LayerStrategy("embed..outside"),)),)),))  # fmt: skip


def test_the_busiest_link_takes_its_bytes_over_its_bandwidth():
    state = 12 * GRAPH.num_parameters
    near, far = (moving(whole(0), whole(d), GRAPH, CLUSTER, WORK) for d in (1, 5))
    assert near.moved_bytes == far.moved_bytes == state
    assert near.move_s == pytest.approx(state / 1e10)
    assert far.move_s == pytest.approx(state / 1e9)


def test_a_lost_device_takes_its_state_with_it():
    state = 12 * GRAPH.num_parameters
    found = moving(whole(0), whole(1), GRAPH, CLUSTER, WORK, lost={0}, restore_bandwidth=2e6)
    assert (found.moved_bytes, found.restored_bytes) == (0, state)
    assert found.move_s == pytest.approx(state / 2e6)


def test_a_receiver_of_many_is_as_busy_as_it_is():
    """Two devices send a half each to one: it receives both."""
    half = {"fsdp": ("a",)}
    split = Plan("c", 2, (Pipeline(2, 2, (Stage((0, 1), Mesh.factored(2), (
        LayerStrategy("embed..outside", **half),)),)),))  # fmt: skip
    found = moving(split, whole(2), GRAPH, CLUSTER, WORK)
    assert found.move_s == pytest.approx(found.moved_bytes / 1e10)
