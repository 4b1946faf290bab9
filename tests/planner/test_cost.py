"""What the cost model says, against arithmetic done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.planner.cost import LayerCost, Workload, _ring_s, plan_cost
from shardpar.spec.cluster import Link
from shardpar.spec.graph import Activation, Layer, LayerClass, LayerGraph, Parameter
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from tests.planner.cases import ADAM, cluster_of, gpt, priced

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
    ("dtype", "loops", "microbatches", "bytes_per_parameter"),
    [
        # weights, gradient, two Adam moments
        ("float32", False, 1, 4 + 4 + 8),
        # … and a second, summed gradient
        ("float32", False, 2, 4 + (4 + 4) + 8),
        # … and the loop's stacked copy
        ("float32", True, 1, (4 + 4) + 4 + 8),
        # masters, bf16 weights; bf16 gradient and its float32 cast; moments
        ("bfloat16", False, 1, (4 + 2) + (2 + 4) + 8),
        ("bfloat16", False, 4, (4 + 2) + (2 + 4) + 8),
        ("bfloat16", True, 1, (4 + 2 + 2) + (2 + 4) + 8),
    ],
)
def test_adams_state_has_the_bytes_counted_by_hand(dtype, loops, microbatches, bytes_per_parameter):
    work = Workload(8, dtype, 2.0, loops)
    cost = priced(gpt(), 1, work, microbatch=8 // microbatches)
    parameters = 256 * 256 + 128 * 256 + 4 * (12 * 256 * 256 + 13 * 256) + 2 * 256
    assert parameters == gpt().num_parameters
    assert cost.stages[0].state_bytes == bytes_per_parameter * parameters


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
    assert cost.step_s == max(first.step_s + second.step_s, alone.step_s)
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
