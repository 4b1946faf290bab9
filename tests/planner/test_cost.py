"""What the cost model says, against arithmetic done by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.planner.cost import plan_cost
from shardpar.planner.prices import LayerCost
from shardpar.planner.setting import Workload
from shardpar.planner.traffic import _moved_shares, _ring_s, border_axes, predicted_collectives
from shardpar.spec.cluster import Link
from shardpar.spec.graph import Activation, Layer, LayerClass, LayerGraph, Parameter
from shardpar.spec.mesh import GroupLayout, Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from tests.planner.cases import ADAM, cluster_of, gpt, priced, uniform

MIB = 2**20
RATE, MEMORY = 0.5e12, 1e11  # FLOP/s and bytes/s of a device of `cluster_of`
WIRE, HOP = 1e10, 1e-5  # of its links inside a host


def one_layer(*parameters: Parameter, **costs) -> LayerGraph:
    """A graph of one layer that costs nothing but what a test gives it."""
    stream = Activation((8, 16, 256), "float32", 0, 1)
    free = dict.fromkeys(
        ("forward_flops", "backward_flops", "forward_bytes", "backward_bytes", "temp_bytes"), 0.0
    )
    free["saved_bytes"] = (("none", 0.0), ("selective", 0.0))
    cls = LayerClass("Only", parameters, (), (stream,), (stream,), **{**free, **costs})
    return LayerGraph("one", 8, 128, "float32", (cls,), (Layer("only", "only", "Only"),))


UP = Parameter("up", (512, 2048), "float32", ("embed", "mlp"))  # 4 MiB
DOWN = Parameter("down", (2048, 512), "float32", ("mlp", "embed"))
STREAM = 8 * 16 * 256 * 4


def only(cost) -> LayerCost:
    ((_, layer),) = cost.stages[0].layers
    return layer


# Memory


@pytest.mark.parametrize(
    ("dtype", "loops", "microbatches", "bytes_per_parameter", "if_looped"),
    [
        # weights, gradient, two Adam moments
        ("float32", False, 1, 4 + 4 + 8, 0),
        # … and a second, summed gradient
        ("float32", False, 2, 4 + (4 + 4) + 8, 0),
        # … and the loop's stacked copy of its layers' weights
        ("float32", True, 1, 4 + 4 + 8, 4),
        ("float32", True, 2, 4 + (4 + 4) + 8, 4),
        # masters and their bf16 cast; bf16 gradient; moments. The cast is what the loop reads,
        ("bfloat16", False, 1, (4 + 2) + 2 + 8, 0),
        ("bfloat16", True, 1, (4 + 2) + 2 + 8, 0),
        # but several micro-batches stack it anew, and sum their gradients in float32.
        ("bfloat16", False, 4, (4 + 2) + (2 + 4) + 8, 0),
        ("bfloat16", True, 4, (4 + 2) + (2 + 4) + 8, 2),
    ],
)
def test_adams_state_has_the_bytes_counted_by_hand(
    dtype, loops, microbatches, bytes_per_parameter, if_looped
):
    work = Workload(8, dtype, 2.0, loops)
    cost = priced(gpt(), 1, work, microbatch=8 // microbatches)
    # Of a link of a chain the output can be the next one's input: so it is of the blocks, and
    # here of the head, whose logits are as wide as the stream.
    looped = 4 * (12 * 256 * 256 + 13 * 256) + 2 * 256
    parameters = 256 * 256 + 128 * 256 + looped
    assert parameters == gpt().num_parameters
    assert cost.stages[0].state_bytes == bytes_per_parameter * parameters + if_looped * looped


@pytest.mark.parametrize(
    ("strategy", "devices", "expected"),
    [
        ({}, 8, (4, 4, 8)),
        ({"fsdp": ("a", "b", "c")}, 8, (4 / 8, 4 / 8, 8 / 8)),
        ({"fsdp": ("c",)}, 8, (4 / 2, 4 / 2, 8 / 2)),
        ({"tensor": ("b", "c")}, 8, (4 / 4, 4 / 4, 8 / 4)),
        ({"tensor": ("c",), "fsdp": ("a", "b")}, 8, (4 / 8, 4 / 8, 8 / 8)),
        ({"zero1": ("a", "b")}, 8, (4, 4, 8 / 4)),
        ({"zero1": ("a", "b"), "tensor": ("c",)}, 8, (4 / 2, 4 / 2, 8 / 8)),
    ],
)
@pytest.mark.parametrize("slots", [0.0, 1.0, 2.0])
def test_each_axis_divides_its_part_of_the_state(strategy, devices, expected, slots):
    layer = only(
        priced(one_layer(UP, DOWN), devices, Workload(8, "float32", slots, False), **strategy)
    )
    elements = UP.size + DOWN.size
    weights, gradients, moments = expected
    assert layer.parameter_bytes == weights * elements
    assert layer.gradient_bytes == gradients * elements
    assert layer.optimizer_bytes == moments * elements * slots / 2


def test_activations_shrink_with_every_axis_and_inputs_with_those_that_split_them():
    saved = {"saved_bytes": (("none", 8e6), ("selective", 2e6)), "temp_bytes": 1e6}
    graph = one_layer(UP, **saved)

    def bytes_of(**strategy):
        layer = only(priced(graph, 8, **strategy))
        return layer.saved_bytes, layer.scratch_bytes

    for recompute, kept in (("none", 8e6), ("selective", 2e6), ("full", 0.0)):
        chosen = {"recompute": recompute}
        assert bytes_of(**chosen) == (kept / 8 + STREAM / 8, 1e6 / 8)
        # Without sequence parallelism each tensor shard keeps the whole input.
        tensor = {"tensor": ("b", "c"), **chosen}
        assert bytes_of(**tensor) == (kept / 8 + STREAM / 2, 1e6 / 8)
        tensor["sequence_parallel"] = True
        assert bytes_of(**tensor) == (kept / 8 + STREAM / 8, 1e6 / 8)


def test_tensor_parallelism_leaves_whole_what_its_weights_do_not_split():
    graph = one_layer(
        UP,
        saved_bytes=(("none", 8e6), ("gathered", 6e6), ("selective", 2e6)),
        whole_bytes=(("none", 3e6), ("gathered", 1e6), ("selective", 5e5)),
        scratch_bytes=(("none", 4e6), ("selective", 2e6), ("full", 1e6)),
        temp_bytes=9e9,
    )

    def bytes_of(**strategy):
        layer = only(priced(graph, 8, **strategy))
        return layer.saved_bytes, layer.scratch_bytes

    # Without tensor axes the whole layer is split over the batch, and nothing else matters.
    assert bytes_of() == (8e6 / 8 + STREAM / 8, 4e6 / 8)
    # Two data shards, each of four tensor shards: 3 of 8 MB are as in each data shard.
    tensor = {"tensor": ("b", "c")}
    share = 3 / 8 / 2 + 5 / 8 / 8
    assert bytes_of(**tensor) == (3e6 / 2 + 5e6 / 8 + STREAM / 2, 4e6 * share)
    selective = bytes_of(**tensor, recompute="selective")
    assert selective == (5e5 / 2 + 1.5e6 / 8 + STREAM / 2, 2e6 * share)
    assert bytes_of(**tensor, recompute="full") == (STREAM / 2, 1e6 * share)
    # Where weights or sequences are gathered, nothing gathered is kept.
    share = 1 / 6 / 2 + 5 / 6 / 8
    parallel = bytes_of(**tensor, sequence_parallel=True)
    assert parallel == (1e6 / 2 + 5e6 / 8 + STREAM / 8, pytest.approx(4e6 * share))
    saved, scratch = bytes_of(tensor=("c",), fsdp=("a", "b"))
    assert saved == 1e6 / 4 + 5e6 / 8 + STREAM / 4
    weights = 2 * 4 * (UP.size / 2 - UP.size / 8)
    assert scratch == pytest.approx(4e6 * (1 / 6 / 4 + 5 / 6 / 8) + weights)


def test_what_the_loss_keeps_is_gone_before_any_layer_goes_back():
    graph = one_layer(UP, saved_bytes=(("none", 8e6), ("selective", 2e6)), temp_bytes=1e6)
    outside = replace(graph.classes[0], name="outside")
    graph = replace(graph, classes=(outside,), layers=(Layer("only", "only", "outside"),))
    layer = only(priced(graph, 8))
    assert (layer.saved_bytes, layer.scratch_bytes) == (0.0, (1e6 + 8e6 + STREAM) / 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_backend_that_holds_extra_copies_is_charged_for_what_the_optimizer_keeps(dtype):
    work = Workload(8, dtype, 2.0, loops=False)
    plan = uniform(one_layer(UP), 8, fsdp=("c",), zero1=("b",))
    cluster = cluster_of(8)
    greedy = replace(cluster, kinds=(replace(cluster.kinds[0], extra_copies=1.5),))
    usual, more = (
        only(plan_cost(plan, one_layer(UP), c, work)).parameter_bytes for c in (cluster, greedy)
    )
    # Two moments, in float32 whatever the weights are computed in, and in quarters.
    assert more - usual == 1.5 * 2 * UP.size / 4 * 4


@pytest.mark.parametrize(
    ("schedule", "in_flight"), [("1f1b", (3, 2, 1)), ("gpipe", (4, 4, 4))]
)  # fmt: skip
def test_each_stage_holds_the_activations_of_its_microbatches_in_flight(schedule, in_flight):
    graph = gpt()
    selectors = ("embed..blocks[0]", "blocks[1:3]", "blocks[3]..outside")
    stages = tuple(Stage((i,), Mesh(), (LayerStrategy(x),)) for i, x in enumerate(selectors))
    plan = Plan("hand", 8, (Pipeline(8, 2, stages, schedule),))
    cost = plan_cost(plan, graph, cluster_of(3), ADAM)
    for stage, held in zip(cost.stages, in_flight, strict=True):
        assert stage.saved_bytes == held * sum(layer.saved_bytes for _, layer in stage.layers)
        assert stage.peak_bytes == stage.state_bytes + stage.saved_bytes + stage.scratch_bytes
    assert cost.peak_bytes == max(stage.peak_bytes for stage in cost.stages)


def test_a_group_with_several_stages_holds_all_of_them_and_waits_for_one_of_each_other():
    runs = ("embed..blocks[0]", "blocks[1]", "blocks[2]", "blocks[3]..outside")
    stages = tuple(Stage((s % 2,), Mesh(), (LayerStrategy(run),)) for s, run in enumerate(runs))
    plan = Plan("hand", 8, (Pipeline(8, 2, stages, "interleaved"),))
    cost = plan_cost(plan, gpt(), cluster_of(2), ADAM)
    assert cost.peak_bytes == max(stage.peak_bytes for stage in cost.stages)
    for group in (0, 1):
        mine = cost.stages[group::2]
        held = sum(stage.state_bytes + stage.saved_bytes for stage in mine)
        fullest = held + max(stage.scratch_bytes for stage in mine)
        assert [stage.peak_bytes for stage in mine] == pytest.approx([fullest] * 2)
    times = [stage.microbatch_s for stage in cost.stages]
    first, second = times[0] + times[2], times[1] + times[3]
    others = max(times[1], times[3]) if first > second else max(times[0], times[2])
    assert cost.step_s == pytest.approx(4 * max(first, second) + others)


def test_fsdp_needs_room_for_the_gathered_weights_and_their_gradient():
    layer = only(priced(one_layer(UP), 8, fsdp=("a", "b", "c")))
    assert layer.scratch_bytes == 2 * 4 * (UP.size - UP.size / 8)


def test_a_stage_holds_all_layers_state_and_inputs_but_one_layers_scratch():
    cost = priced(gpt(), 8, fsdp=("a", "b", "c")).stages[0]
    layers = [layer for _, layer in cost.layers]
    assert len(layers) == 7
    assert cost.state_bytes == sum(
        x.parameter_bytes + x.gradient_bytes + x.optimizer_bytes for x in layers
    )
    assert cost.saved_bytes == sum(x.saved_bytes for x in layers)
    assert cost.scratch_bytes == max(x.scratch_bytes for x in layers)
    assert cost.peak_bytes == cost.state_bytes + cost.saved_bytes + cost.scratch_bytes


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_more_tensor_parallelism_takes_fewer_bytes(recompute):
    costs = [
        priced(gpt(), 8, tensor=axes, recompute=recompute).stages[0]
        for axes in [(), ("c",), ("b", "c")]
    ]
    states = [cost.state_bytes for cost in costs]
    assert states[0] > states[1] > states[2] > states[0] / 4


def test_more_fsdp_takes_fewer_bytes():
    states = [
        priced(gpt(), 8, fsdp=axes).stages[0].state_bytes
        for axes in [(), ("c",), ("b", "c"), ("a", "b", "c")]
    ]
    assert states == sorted(states, reverse=True)
    assert len(set(states)) == 4


@pytest.mark.parametrize(
    "strategy", [{}, {"fsdp": ("a",)}, {"tensor": ("c",)}, {"tensor": ("c",), "fsdp": ("b",)}]
)
def test_recompute_trades_bytes_for_seconds(strategy):
    none, selective, full = (
        priced(gpt(), 8, **strategy, recompute=recompute)
        for recompute in ("none", "selective", "full")
    )
    assert full.peak_bytes < selective.peak_bytes < none.peak_bytes
    assert none.step_s < selective.step_s < full.step_s


def test_smaller_microbatches_keep_fewer_activations():
    saved = [priced(gpt(), 1, microbatch=m).stages[0].saved_bytes for m in (8, 4, 2, 1)]
    assert saved == [saved[0] / k for k in (1, 2, 4, 8)]


# Seconds


@given(st.floats(0, 1e12), st.integers(1, 64), st.floats(1e6, 1e12), st.floats(0, 1e-3))
def test_a_ring_sends_all_but_its_own_part_and_waits_at_each_hop(num_bytes, parts, rate, delay):
    steps = sum(num_bytes / parts / rate + delay for _ in range(parts - 1))
    assert _ring_s(num_bytes, parts, Link(rate, delay)) == pytest.approx(steps, rel=1e-9, abs=1e-12)


def test_compute_is_the_slower_of_arithmetic_and_memory():
    work = Workload(8, "float32", 0.0, loops=False)
    flops = {"forward_flops": 4e9, "backward_flops": 8e9, "forward_bytes": 1e6}
    layer = only(priced(one_layer(**flops), 1, work))
    assert (layer.forward_s, layer.backward_s) == (4e9 / RATE, 8e9 / RATE)
    slow = {"forward_flops": 1e3, "forward_bytes": 5e8, "backward_bytes": 9e8}
    layer = only(priced(one_layer(**slow), 1, work))
    assert (layer.forward_s, layer.backward_s) == (5e8 / MEMORY, 9e8 / MEMORY)
    quarter = only(priced(one_layer(**flops), 8, work, microbatch=4, tensor=("c",)))
    assert quarter.forward_s == pytest.approx(4e9 / 16 / RATE)


def test_weights_are_read_whole_however_small_the_microbatch():
    work = Workload(8, "float32", 0.0, loops=False)
    layer = only(priced(one_layer(UP, forward_bytes=8e6), 1, work, microbatch=1))
    assert layer.forward_s == 4 * MIB / MEMORY
    # forward's read twice, and the gradient is summed: read, read and written
    assert layer.backward_s == pytest.approx((2 * 4 + 3 * 4) * MIB / MEMORY)


def test_full_recompute_runs_the_forward_again_and_selective_its_memory_traffic():
    graph = one_layer(forward_flops=4e9, backward_flops=8e9, forward_bytes=1e7)
    backward = [only(priced(graph, recompute=r)).backward_s for r in ("none", "selective", "full")]
    assert backward == [8e9 / RATE, 8e9 / RATE + 1e7 / MEMORY, 12e9 / RATE]


@pytest.mark.parametrize(
    ("strategy", "gather", "sync"),
    [
        # all-reduce of the whole gradient over eight: twice (n-1)/n of it
        ({}, 0.0, 8 * MIB * 7 / 8 / WIRE + 7 * HOP),
        # gathered for forward and backward; its gradient reduce-scattered
        (
            {"fsdp": ("a", "b", "c")},
            2 * (4 * MIB * 7 / 8 / WIRE + 7 * HOP),
            4 * MIB * 7 / 8 / WIRE + 7 * HOP,
        ),
        # the shard that fsdp leaves is then all-reduced over the other four
        (
            {"fsdp": ("c",)},
            2 * (4 * MIB / 2 / WIRE + HOP),
            4 * MIB / 2 / WIRE + HOP + (2 * 2 * MIB * 3 / 4 / WIRE + 3 * HOP),
        ),
        ({"tensor": ("b", "c")}, 0.0, 2 * MIB / 2 / WIRE + HOP),
        ({"tensor": ("a", "b", "c")}, 0.0, 0.0),
    ],
)
def test_gradients_and_weights_travel_as_counted_by_hand(strategy, gather, sync):
    layer = only(priced(one_layer(UP), 8, **strategy))
    assert layer.gather_s == pytest.approx(gather)
    assert layer.sync_s == pytest.approx(sync)


def test_bf16_halves_the_traffic():
    work = Workload(8, "bfloat16", 2.0, loops=False)
    layer = only(priced(one_layer(UP), 8, work))
    assert layer.sync_s == pytest.approx(4 * MIB * 7 / 8 / WIRE + 7 * HOP)


def test_the_update_reads_and_writes_the_state_it_holds():
    plain = only(priced(one_layer(UP), 8, ADAM))
    assert plain.update_s == pytest.approx(4 * MIB * (3 + 2 * 2) / MEMORY)
    zero = only(priced(one_layer(UP), 8, ADAM, zero1=("a", "b", "c")))
    gathered = 4 * MIB * 7 / 8 / WIRE + 7 * HOP
    assert zero.update_s == pytest.approx(plain.update_s / 8 + gathered)


@pytest.mark.parametrize(("parameters", "sums"), [((UP,), 0), ((UP, DOWN), 1), ((DOWN, DOWN), 2)])
def test_each_product_over_a_split_dim_is_summed_forward_and_backward(parameters, sums):
    renamed = tuple(replace(p, name=f"p{i}") for i, p in enumerate(parameters))
    seconds = [
        only(priced(one_layer(*renamed), 8, tensor=("b", "c"), recompute=recompute)).tensor_s
        for recompute in ("none", "full")
    ]
    border = STREAM / 2  # two data shards
    once = 2 * sums * (2 * border * 3 / 4 / WIRE + 3 * HOP)
    assert seconds == [pytest.approx(once), pytest.approx(1.5 * once)]


def test_sequence_parallelism_gathers_thrice_over_the_tensor_axes():
    graph = one_layer(UP, DOWN)
    plain, parallel = (
        only(priced(graph, 8, tensor=("b", "c"), sequence_parallel=sp)).tensor_s
        for sp in (False, True)
    )
    border = STREAM / 2
    assert parallel - plain == pytest.approx(3 * (border * 3 / 4 / WIRE + 3 * HOP))


def test_gradients_of_several_pipelines_cross_the_network_once_a_step():
    graph, work = one_layer(UP), replace(ADAM, global_batch=16)

    def cross_s(pipelines, **strategy):
        entry, each = LayerStrategy("only", **strategy), 16 // pipelines
        stages = [
            Stage((2 * p, 2 * p + 1), Mesh.factored(2), (entry,)) for p in range(pipelines)
        ]  # fmt: skip
        plan = Plan("hand", 16, tuple(Pipeline(each, each, (stage,)) for stage in stages))
        cost = plan_cost(plan, graph, cluster_of(8), work)
        layer = only(cost)
        assert cost.stages[0].cross_s == layer.cross_s
        # Once a step, like the update.
        once = layer.update_s + layer.cross_s
        assert cost.step_s == pytest.approx(layer.microbatch_s(0.5) + once)
        return layer.cross_s

    assert cross_s(1) == 0.0
    # An all-reduce in float32 over the links between hosts, a device's part each.
    assert cross_s(2) == pytest.approx(2 * 4 * MIB / 1e9 + 1e-4)
    assert cross_s(4, zero1=("a",)) == pytest.approx(2 * 2 * MIB / 1e9 + 1e-4)


def test_links_between_hosts_are_slower():
    graph = one_layer(UP)
    for axes, link in ((("c",), Link(1e10, 1e-5)), (("a",), Link(1e9, 1e-4))):
        entry = LayerStrategy("only", fsdp=axes, tensor=tuple(a for a in "abc" if a not in axes))
        stage = Stage(tuple(range(8)), Mesh.factored(8), (entry,))
        plan = Plan("two hosts", 8, (Pipeline(8, 8, (stage,)),))
        layer = only(plan_cost(plan, graph, cluster_of(4, hosts=2), ADAM))
        assert layer.sync_s == pytest.approx(MIB / 2 / link.bandwidth + link.latency_s)


def test_half_of_the_weights_traffic_hides_behind_compute():
    cost = replace(
        only(priced(one_layer())), forward_s=2.0, backward_s=4.0, tensor_s=1.0, gather_s=3.0,
        sync_s=5.0, update_s=100.0,
    )  # fmt: skip
    assert cost.microbatch_s(0.5) == 6 + 1 + 8 - 4
    assert cost.microbatch_s(0.0) == 15
    assert replace(cost, forward_s=0.0, backward_s=1.0).microbatch_s(0.5) == 1 + 1 + 8 - 1


def test_a_step_is_all_its_microbatches_and_one_update():
    stage = priced(gpt(), 2, microbatch=2, fsdp=("a",)).stages[0]
    layers = [layer for _, layer in stage.layers]
    expected = 4 * sum(x.microbatch_s(0.5) for x in layers) + sum(x.update_s for x in layers)
    assert stage.step_s == pytest.approx(expected)


def test_pipelines_run_side_by_side_and_stages_one_after_another():
    graph, work = gpt(), replace(ADAM, global_batch=12)

    def stage(device, selector):
        return Stage((device,), Mesh(), (LayerStrategy(selector),))

    plan = Plan(
        "two",
        12,
        (
            Pipeline(8, 4, (stage(0, "embed..blocks[1]"), stage(1, "blocks[2:4]..outside"))),
            Pipeline(4, 4, (stage(2, "embed..outside"),)),
        ),
    )
    cost = plan_cost(plan, graph, cluster_of(3), work)
    first, second, alone = cost.stages
    times = first.microbatch_s, second.microbatch_s
    # Two micro-batches: the first goes through both stages, then the slower one paces.
    assert cost.step_s == max(sum(times) + max(times), alone.microbatch_s)
    assert [s.step_s for s in cost.stages] == [2 * times[0], 2 * times[1], alone.microbatch_s]
    assert cost.peak_bytes == max(s.peak_bytes for s in cost.stages)
    assert [len(s.layers) for s in cost.stages] == [3, 4, 7]


def test_a_stage_on_unequal_devices_goes_at_the_pace_of_the_slowest():
    fast = cluster_of(2)
    slow = replace(fast.kinds[0], name="slow", matmul_flops=(("float32", 1e11),))
    mixed = replace(
        fast,
        kinds=(fast.kinds[0], slow),
        hosts=(fast.hosts[0], replace(fast.hosts[0], kind="slow")),
    )
    graph = one_layer(forward_flops=4e9, backward_flops=8e9)

    def forward(devices):
        stage = Stage(devices, Mesh.factored(2), (LayerStrategy("only"),))
        return only(
            plan_cost(Plan("m", 8, (Pipeline(8, 8, (stage,)),)), graph, mixed, ADAM)
        ).forward_s

    assert forward((0, 1)) == 4e9 / 2 / RATE
    assert forward((1, 2)) == forward((2, 3)) == 4e9 / 2 / (1e11 * 0.5)


def test_a_microbatch_is_its_two_ways_and_its_parts_of_what_is_done_once():
    stages = (
        Stage((0, 1), Mesh.factored(2), (LayerStrategy("embed..blocks[1]", fsdp=("a",)),)),
        Stage(
            (2, 3), Mesh.factored(2),
            (LayerStrategy("blocks[2]", ("a",)), LayerStrategy("blocks[3]..outside", zero1=("a",))),
        ),
    )  # fmt: skip
    plan = Plan("hand", 8, (Pipeline(8, 2, stages),))
    cost = plan_cost(plan, gpt(), cluster_of(4), ADAM)
    for stage in cost.stages:
        once = (stage.update_s + stage.cross_s) / 4
        ways = stage.forward_s + stage.backward_s
        assert stage.microbatch_s == pytest.approx(ways + once + stage.sent_s)
        assert stage.update_s == pytest.approx(sum(layer.update_s for _, layer in stage.layers))
    first, second = cost.stages
    assert (first.moves_s, first.sent_s) == (0.0, 0.0)
    assert second.moves_s > 0 < second.sent_s


# Moves between layouts


def two_layers(before, after, devices=8, hosts=1, microbatch=8):
    """The seconds of the move between two layers that compute nothing."""
    graph = one_layer()
    graph = replace(graph, layers=tuple(Layer(n, n, "Only") for n in ("first", "second")))
    entries = LayerStrategy("first", **before), LayerStrategy("second", **after)
    stage = Stage(tuple(range(devices)), Mesh.factored(devices), entries)
    plan = Plan("hand", 8, (Pipeline(8, microbatch, (stage,)),))
    cost = plan_cost(plan, graph, cluster_of(devices // hosts, hosts), ADAM)
    (stage,) = cost.stages
    own = sum(layer.microbatch_s(0.5) for _, layer in stage.layers)
    assert stage.microbatch_s == pytest.approx(own + stage.moves_s)
    return stage.moves_s


SPLIT = {"tensor": ("c",), "sequence_parallel": True}


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        # An eighth of the batch becomes a quarter: the other half of it is missing.
        ({}, {"tensor": ("c",)}, 1 / 8),
        ({}, {"tensor": ("b", "c")}, 1 / 2 - 1 / 8),
        # Half of a quarter's sequences becomes all of them.
        (SPLIT, {"tensor": ("c",)}, 1 / 8),
        # An eighth of the batch becomes half the sequence of a quarter: half of it is there,
        # and as much is missing on the way back.
        ({}, SPLIT, 2 / 16),
    ],
)
def test_a_move_between_layouts_brings_what_a_device_lacks(before, after, share):
    expected = pytest.approx(share * STREAM / WIRE + 2 * HOP)
    assert two_layers(before, after) == expected
    assert two_layers(after, before) == expected  # the gradient goes the other way


def test_a_smaller_microbatch_moves_less():
    moves_s = two_layers(SPLIT, {"tensor": ("c",)}, microbatch=4)
    assert moves_s == pytest.approx(1 / 8 * STREAM / 2 / WIRE + 2 * HOP)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"fsdp": ("a", "b")}),
        ({"zero1": ("c",)}, {"recompute": "full"}),
        ({"tensor": ("c",)}, {"tensor": ("c",), "fsdp": ("b",)}),
        (SPLIT, {**SPLIT, "recompute": "selective"}),
    ],
)
def test_layers_that_lay_activations_out_alike_move_nothing(before, after):
    assert two_layers(before, after) == 0.0


def test_a_move_over_axes_inside_a_host_does_not_wait_for_the_network():
    inside = two_layers({}, {"tensor": ("c",)}, hosts=2)
    assert inside == pytest.approx(STREAM / 8 / WIRE + 2 * HOP)
    across = two_layers({}, {"tensor": ("a", "b", "c")}, hosts=2)
    assert across == pytest.approx(STREAM * 7 / 8 / 1e9 + 2 * 1e-4)


axis_sets = st.lists(st.sampled_from("abc"), unique=True, max_size=3).map(
    lambda names: tuple(sorted(names))
)


@given(st.sampled_from([4, 8, 12]), axis_sets, axis_sets, st.booleans(), st.booleans())
def test_what_is_missing_is_what_is_counted_element_by_element(devices, first, second, p, q):
    mesh = Mesh.factored(devices)
    borders = []
    for tensor, parallel in ((first, p), (second, q)):
        tensor = tuple(a for a in tensor if a in mesh.names)
        strategy = LayerStrategy("x", tensor, sequence_parallel=parallel and bool(tensor))
        borders.append(border_axes(strategy, mesh))
    owned = []
    for batch, sequence in borders:
        layout = GroupLayout(mesh, (batch, sequence))
        arrays = []
        for piece in layout.slices((24, 24)):
            array = np.zeros((24, 24), bool)
            array[piece] = True
            arrays.append(array)
        owned.append(arrays)
    there, back = (
        max(np.sum(b & ~a) for a, b in zip(source, target, strict=True)) / 24**2
        for source, target in (owned, owned[::-1])
    )
    assert _moved_shares(mesh, *borders) == pytest.approx((there, back))


@pytest.mark.parametrize(("hosts", "link"), [(1, (WIRE, HOP)), (3, (1e9, 1e-4))])
def test_what_arrives_is_shared_by_all_pairs_of_devices(hosts, link):
    graph = replace(one_layer(), layers=tuple(Layer(n, n, "Only") for n in ("first", "second")))
    stages = (
        Stage((0, 1), Mesh.factored(2), (LayerStrategy("first"),)),
        Stage((2, 3, 4, 5), Mesh.factored(4), (LayerStrategy("second"),)),
    )
    plan = Plan("hand", 8, (Pipeline(8, 4, stages),))
    cost = plan_cost(plan, graph, cluster_of(6 // hosts, hosts), ADAM)
    # Half the batch, there and, as its gradient, back.
    each = STREAM / 2 / 2 / link[0] + link[1]
    assert [s.sent_s for s in cost.stages] == [0.0, pytest.approx(2 * each)]
    assert cost.step_s == pytest.approx(2 * each + 2 * each)


# What is moved, as counts and bytes


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (
            {"fsdp": ("c",)},
            # Two micro-batches: gathered twice each; the halves are summed over the other four.
            [
                ("all-gather", 2, 4, 4 * 4 * MIB),
                ("all-reduce", 4, 2, 2 * 2 * MIB),
                ("reduce-scatter", 2, 2, 2 * 2 * MIB),
            ],
        ),
        (
            {"zero1": ("b", "c")},
            # The new weights are gathered once a step, in float32.
            [
                ("all-gather", 4, 1, 4 * MIB),
                ("all-reduce", 2, 2, 2 * MIB),
                ("reduce-scatter", 4, 2, 2 * MIB),
            ],
        ),
        ({}, [("all-reduce", 8, 2, 2 * 4 * MIB)]),
        ({"tensor": ("a", "b", "c")}, []),
    ],
)
def test_predicted_collectives_are_those_counted_by_hand(strategy, expected):
    graph = one_layer(UP)
    plan = uniform(graph, 8, 8, 16, **strategy)
    work = replace(ADAM, global_batch=16)
    assert list(predicted_collectives(plan, graph, cluster_of(8), work)) == expected


def test_predicted_collectives_of_tensor_parallelism_are_those_counted_by_hand():
    graph = one_layer(UP, DOWN)
    plan = uniform(graph, 8, 8, 8, tensor=("a", "b", "c"), sequence_parallel=True, recompute="full")
    # One sum forward, again for the recomputed forward, and one backward.
    assert predicted_collectives(plan, graph, cluster_of(8), ADAM) == (
        ("all-gather", 8, 3, 3 * STREAM),
        ("all-reduce", 8, 3, 3 * STREAM),
    )
