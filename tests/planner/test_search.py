"""The search against all plans and against all chains; its errors and its plan as whole texts."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from functools import cache

import pytest

from shardpar.errors import InfeasibleError, PlanError
from shardpar.planner.cost import plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.pipeline import Problem
from shardpar.planner.search import RESCORE_WITHIN, memory_limit, search
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import simulate
from shardpar.planner.strategies import Pins
from shardpar.planner.uniform import best_uniform
from shardpar.spec.check import check
from shardpar.spec.cluster import Hosts
from shardpar.spec.graph import Activation, Layer, LayerClass, LayerGraph, Parameter
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import Objective
from shardpar.spec.select import strategies
from shardpar.spec.text import plan_from_text, plan_to_text
from tests.planner.cases import GOLDEN, cluster_of, gpt, uniform
from tests.planner.oracle import every_plan, fastest_by_chains, strategies_of

WORK = Workload(16)
EXACT = 1e-9


def assert_is_consistent(result, graph, cluster, work, options=SearchOptions()):
    """The plan is legal, fits, and says of itself what its price says."""
    plan = result.plan
    check(plan, graph, cluster)
    cost = plan_cost(plan, graph, cluster, work)
    assert cost == result.cost
    assert plan.objective.step_s == pytest.approx(cost.step_s, rel=EXACT)
    limit = memory_limit(cluster, options)
    assert result.limit_bytes == limit
    stages = [stage for pipeline in plan.pipelines for stage in pipeline.stages]
    for stage, priced in zip(stages, cost.stages, strict=True):
        assert stage.peak_bytes == pytest.approx(priced.peak_bytes, rel=EXACT)
        assert priced.peak_bytes <= limit * (1 + EXACT)


# Against brute force over all plans


def small_model(seed: int, blocks: int, *, outside: bool) -> LayerGraph:
    """A few layers whose costs are drawn: what is fast is not what is small."""
    draw = random.Random(seed)
    stream = Activation((4, 16, 64), "float32", 0, 1)
    up = Parameter("up", (128, 256), "float32", ("embed", "mlp"))
    down = Parameter("down", (256, 128), "float32", ("mlp", "embed"))
    table = Parameter("table", (256, 128), "float32", ("vocab", "embed"))

    def drawn(name, *parameters):
        flops, traffic = draw.uniform(2e6, 2e7), draw.uniform(1e5, 1e6)
        none, selective = draw.uniform(1e6, 3e6), draw.uniform(1e5, 1e6)
        return LayerClass(
            name, parameters, (), (stream,), (stream,), flops, 2 * flops, traffic, 2 * traffic,
            (("none", none), ("gathered", none * 0.9), ("selective", selective)),
            draw.uniform(1e5, 1e6),
            whole_bytes=(("none", none / 3), ("gathered", none / 4), ("selective", selective / 2)),
            scratch_bytes=tuple((k, draw.uniform(1e5, 1e6)) for k in ("none", "selective", "full")),
        )  # fmt: skip

    classes = [drawn("Block", up, down), drawn("Head", table)]
    layers = [Layer(f"blocks[{i}]", f"blocks.{i}", "Block") for i in range(blocks)]
    layers.append(Layer("head", "head", "Head"))
    if outside:
        classes.append(replace(drawn("outside"), name="outside"))
        layers.append(Layer("outside", "", "outside"))
    return LayerGraph("small", 4, 64, "float32", tuple(classes), tuple(layers))


FREE, ONE, TWO = SearchOptions(), SearchOptions(stages=1), SearchOptions(stages=2)
CASES = {
    # Two devices, every strategy of each of three layers, one stage and two.
    "two devices": (0, 2, 2, False, Workload(4), FREE),
    "two devices, bf16": (1, 2, 2, False, Workload(4, "bfloat16"), FREE),
    # One strategy of each kind for more layers.
    "no recompute": (
        2, 3, 2, True, Workload(4), SearchOptions(recompute="none", sequence_parallel=False),
    ),
    "two stages of one device": (3, 3, 2, True, Workload(4, loops=False), TWO),
    "two stages of two devices": (
        4, 2, 4, False, Workload(4), replace(TWO, sequence_parallel=True, recompute="selective"),
    ),
    "one stage of four devices": (5, 1, 4, False, Workload(4), replace(ONE, recompute="none")),
    "two hosts": (6, 1, 4, False, Workload(8), replace(ONE, zero1=1, sequence_parallel=False)),
    "three stages": (7, 3, 3, False, Workload(6), SearchOptions(stages=3)),
    "some layers fixed": (
        8, 2, 2, True, Workload(4),
        SearchOptions(fix="blocks[1] tensor=2 recompute=full; head..outside zero1=1 fsdp=1"),
    ),
    "pinned micro-batch": (9, 2, 2, True, Workload(8), SearchOptions(microbatch=2, tensor=1)),
}  # fmt: skip


@cache
def case(name):
    """A model, where it is to run, and all its plans with their prices, the fastest first."""
    seed, blocks, devices, outside, work, options = CASES[name]
    # The oracle knows no interleaved plans; test_interleave.py is about those.
    options = replace(options, interleave=False)
    graph = small_model(seed, blocks, outside=outside)
    hosts = 2 if name == "two hosts" else 1
    cluster = cluster_of(devices // hosts, hosts)
    every = [
        (cost.step_s, cost.peak_bytes, plan)
        for plan, cost in every_plan(graph, cluster, work, options)
    ]
    return graph, cluster, work, options, sorted(every, key=lambda entry: entry[0])


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_the_plan_found_is_the_best_of_all_that_fit(name, share):
    graph, cluster, work, options, every = case(name)
    peaks = sorted(peak for _, peak, _ in every)
    assert len(set(peaks)) > 20
    limit = peaks[int(share * (len(peaks) - 1))] * (1 + 1e-6)
    kind = replace(cluster.kinds[0], memory_bytes=limit / options.memory_fraction)
    cluster = replace(cluster, kinds=(kind,))
    best_s = next(step_s for step_s, peak, _ in every if peak <= limit)
    formula = search(graph, cluster, work, replace(options, rescore=1))
    assert_is_consistent(formula, graph, cluster, work, options)
    assert formula.cost.step_s == pytest.approx(best_s, rel=EXACT)
    assert formula.plan.objective.gap <= EXACT
    # The simulator may prefer another plan; the bound is still the formula's.
    result = search(graph, cluster, work, options)
    assert_is_consistent(result, graph, cluster, work, options)
    assert result.plan.objective.lower_bound_s == pytest.approx(best_s, rel=EXACT)
    assert result.cost.step_s <= best_s * (1 + RESCORE_WITHIN)
    assert result.simulated_s == simulate(result.plan, result.cost).step_s
    assert result.simulated_s <= formula.simulated_s


@pytest.mark.parametrize("name", CASES)
def test_below_the_smallest_of_all_plans_nothing_fits(name):
    graph, cluster, work, options, every = case(name)
    smallest = min(peak for _, peak, _ in every)
    options = replace(options, memory_fraction=1.0)

    def on(memory_bytes):
        return replace(cluster, kinds=(replace(cluster.kinds[0], memory_bytes=memory_bytes),))

    tight = search(graph, on(smallest * (1 + EXACT)), work, options)
    assert tight.cost.peak_bytes == pytest.approx(smallest, rel=EXACT)
    with pytest.raises(InfeasibleError) as error:
        search(graph, on(smallest - 1000), work, options)
    assert error.value.missing_bytes == pytest.approx(1000, abs=1)


@pytest.mark.parametrize("epsilon", [0.02, 0.2])
@pytest.mark.parametrize("name", ["two devices", "some layers fixed", "three stages"])
def test_with_an_epsilon_the_gap_is_true_and_no_larger(name, epsilon):
    graph, cluster, work, options, every = case(name)
    peaks = sorted(peak for _, peak, _ in every)
    options = replace(options, epsilon=epsilon, memory_fraction=1.0, rescore=1)
    for share in (0.05, 0.3):
        limit = peaks[int(share * (len(peaks) - 1))]
        small = replace(cluster, kinds=(replace(cluster.kinds[0], memory_bytes=limit),))
        best_s = next(step_s for step_s, peak, _ in every if peak <= limit)
        result = search(graph, small, work, options)
        assert_is_consistent(result, graph, small, work, options)
        objective = result.plan.objective
        assert objective.lower_bound_s <= best_s * (1 + EXACT)
        assert best_s <= objective.step_s * (1 + EXACT)
        assert objective.gap <= epsilon


# The simulator's word


def test_the_simulator_decides_between_plans_that_the_formula_finds_alike():
    """Two stages that are behind one by the formula are ahead when simulated."""
    graph, cluster, work, options, every = case("two devices, bf16")
    limit = sorted(peak for _, peak, _ in every)[len(every) // 10]
    kind = replace(cluster.kinds[0], memory_bytes=limit)
    cluster = replace(cluster, kinds=(kind,))
    options = replace(options, memory_fraction=1.0)
    formula = search(graph, cluster, work, replace(options, rescore=1))
    found = search(graph, cluster, work, options)
    assert found.cost.step_s > formula.cost.step_s * 1.01
    assert found.simulated_s < formula.simulated_s * 0.99
    # The certificate is of the formula: it says that the formula knows a faster plan, and which.
    objective = found.plan.objective
    assert objective.lower_bound_s == pytest.approx(formula.cost.step_s, rel=EXACT)
    assert objective.gap == pytest.approx(1 - formula.cost.step_s / found.cost.step_s)
    assert formula.description in [other.description for other in found.runners_up]


def test_among_plans_of_one_stage_the_formula_decides():
    graph, cluster, work, options, _ = case("one stage of four devices")
    formula = search(graph, cluster, work, replace(options, rescore=1))
    found = search(graph, cluster, work, options)
    assert found.plan == formula.plan
    assert found.simulated_s == pytest.approx(found.cost.step_s, rel=EXACT)


# Against all chains of layers, where plans are too many


@pytest.mark.parametrize(
    ("devices", "hosts", "memory", "work", "options"),
    [
        (8, 1, 3e7, Workload(64), FREE),
        (8, 2, 6e7, Workload(16), FREE),
        (4, 1, 1e8, Workload(8), FREE),
        (8, 4, 3e7, Workload(16, "bfloat16"), FREE),
        (12, 3, 2.5e7, Workload(12), FREE),
        (8, 1, 4e7, Workload(16, loops=False), ONE),
        (
            8,
            2,
            5e7,
            Workload(32),
            SearchOptions(tensor=2, fix="blocks[1:3] fsdp=2; embed tensor=1"),
        ),
    ],
)
def test_the_plan_for_a_gpt_is_the_best_of_all_chains(devices, hosts, memory, work, options):
    cluster = cluster_of(devices // hosts, hosts, memory)
    result = search(gpt(), cluster, work, replace(options, interleave=False))
    assert_is_consistent(result, gpt(), cluster, work, options)
    best_s = fastest_by_chains(gpt(), cluster, work, options)
    assert result.cost.step_s == pytest.approx(best_s, rel=EXACT)
    assert result.plan.objective.gap <= EXACT


@pytest.mark.parametrize(
    ("seed", "devices", "memory", "pins"),
    [
        (0, 4, 6e6, SearchOptions(recompute="none")),
        (1, 3, 1e7, SearchOptions(tensor=1)),
        (3, 4, 6e6, SearchOptions(recompute="none")),
    ],
)
def test_with_an_epsilon_no_shape_that_was_left_out_is_better_than_the_bound(
    seed, devices, memory, pins
):
    graph = small_model(seed, 3, outside=devices == 4)
    cluster, work = cluster_of(devices, memory_bytes=memory), Workload(8)
    best_s = fastest_by_chains(graph, cluster, work, pins)
    worse = []
    for epsilon in (0.05, 0.2, 0.5):
        options = replace(pins, epsilon=epsilon, interleave=False)
        result = search(graph, cluster, work, options)
        assert_is_consistent(result, graph, cluster, work, options)
        objective = result.plan.objective
        assert objective.lower_bound_s <= best_s * (1 + EXACT)
        assert objective.gap <= epsilon
        worse.append(objective.step_s > best_s * (1 + EXACT))
    assert any(worse)


def test_both_oracles_agree():
    graph, cluster, work, options, every = case("some layers fixed")
    for position in (0, len(every) // 3, len(every) - 1):
        limit = every[position][1] * (1 + EXACT)
        small = replace(cluster, kinds=(replace(cluster.kinds[0], memory_bytes=limit),))
        whole = replace(options, memory_fraction=1.0)
        best_s = next(step_s for step_s, peak, _ in every if peak <= limit)
        assert fastest_by_chains(graph, small, work, whole) == pytest.approx(best_s, rel=EXACT)


# One strategy for all


@pytest.mark.parametrize("recompute", [None, "none", "selective", "full"])
@pytest.mark.parametrize(("devices", "memory"), [(8, 4e7), (8, 1e9), (4, 8e7), (1, 3e8)])
def test_the_best_uniform_plan_is_the_best_of_all_uniform_plans(devices, memory, recompute):
    graph, cluster = gpt(), cluster_of(devices, memory_bytes=memory)
    options = SearchOptions(recompute=recompute)
    limit, mesh = memory_limit(cluster, options), Mesh.factored(devices)
    priced = []
    for microbatch in (16, 8, 4, 2, 1):
        pins = {layer.name: Pins(recompute=recompute) for layer in graph.layers}
        for s in strategies_of(graph, 1, mesh, pins, microbatch, devices):
            plan = uniform(
                graph, devices, microbatch, 16, tensor=s.tensor, fsdp=s.fsdp, zero1=s.zero1,
                sequence_parallel=s.sequence_parallel, recompute=s.recompute,
            )  # fmt: skip
            try:
                check(plan, graph, cluster)
            except PlanError:
                continue
            cost = plan_cost(plan, graph, cluster, WORK)
            if cost.peak_bytes <= limit:
                priced.append((cost.step_s, cost.peak_bytes))
    found = best_uniform(Problem(graph, cluster, WORK, options))
    if not priced:
        assert found is None
        return
    (stage,) = found.pipeline.stages
    assert (found.step_s, stage.peak_bytes) == pytest.approx(min(priced), rel=EXACT)


@pytest.mark.parametrize("memory", [3e7, 5e7, 1e8, 1e9])
@pytest.mark.parametrize("options", [FREE, ONE, SearchOptions(tensor=2)])
def test_one_strategy_for_all_is_never_faster_than_the_search(memory, options):
    cluster = cluster_of(8, memory_bytes=memory)
    found = best_uniform(Problem(gpt(), cluster, WORK, options))
    result = search(gpt(), cluster, WORK, options)
    if found is not None:
        assert result.cost.step_s <= found.step_s * (1 + EXACT)
        slower = found.step_s > result.cost.step_s * (1 + EXACT)
        assert slower == any(
            scored.step_s == pytest.approx(found.step_s, rel=EXACT) for scored in result.runners_up
        )
    steps = [scored.step_s for scored in result.runners_up]
    assert steps == sorted(steps)
    assert all(step_s >= result.cost.step_s * (1 - EXACT) for step_s in steps)


# Pins


def test_pins_are_kept_by_every_layer():
    options = SearchOptions(
        data=2, fsdp=2, tensor=2, sequence_parallel=True, microbatch=2, stages=1
    )
    result = search(gpt(), cluster_of(8), WORK, options)
    (stage,) = result.plan.pipelines[0].stages
    for strategy in stage.layers:
        own = (strategy.fsdp, strategy.tensor, strategy.sequence_parallel)
        assert own == (("b",), ("c",), True)
    assert result.plan.pipelines[0].microbatch == 8
    assert result.description.startswith(("dp2 fsdp2 tp2 sp", "zero1-2 fsdp2 tp2 sp"))


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_number_of_stages_can_be_pinned(stages):
    result = search(gpt(), cluster_of(8), WORK, SearchOptions(stages=stages))
    assert len(result.plan.pipelines[0].stages) == stages


def test_what_is_fixed_is_kept_and_the_rest_is_completed():
    options = SearchOptions(
        stages=1, recompute="none",
        fix="embed tensor=2; blocks[0] tensor=1 fsdp=4 zero1=2; blocks[1] tensor=4 "
        "sequence_parallel=true recompute=full; blocks[2] data=2; head tensor=1 zero1=8",
    )  # fmt: skip
    cluster = cluster_of(8)
    result = search(gpt(), cluster, WORK, options)
    assert_is_consistent(result, gpt(), cluster, WORK, options)
    (stage,) = result.plan.pipelines[0].stages
    chosen = strategies(stage, gpt())
    size = stage.mesh.size_of

    def degrees(name):
        s = chosen[name]
        data = size(stage.mesh.without((*s.tensor, *s.fsdp)))
        return data, size(s.zero1), size(s.fsdp), size(s.tensor), s.sequence_parallel, s.recompute

    assert degrees("embed")[3] == 2
    assert degrees("blocks[0]") == (2, 2, 4, 1, False, "none")
    assert degrees("blocks[1]")[3:] == (4, True, "full")
    assert degrees("blocks[2]")[0] == 2
    assert degrees("head") == (8, 8, 1, 1, False, "none")
    others = {chosen[name].recompute for name in chosen} - {chosen["blocks[1]"].recompute}
    assert others == {"none"}


@pytest.mark.parametrize(
    ("fix", "message"),
    [
        (
            "blocks recompute",
            'plan.fix: "blocks recompute": recompute is not one of data, fsdp, tensor, zero1, '
            "context, recompute, sequence_parallel, attention with a value; "
            'did you mean "recompute"?',
        ),
        (
            "blocks[0:9] fsdp=2",
            'plan.fix: layers "blocks[0:9]": the model has blocks[0:4]; write a range inside it',
        ),
        (
            "blocks[0] tensor=3",
            "no way to lay 16 sequences over 8 devices with plan.fix=blocks[0] tensor=3; "
            "data x fsdp x tensor must be 8, and train.global_batch a multiple of "
            "data x fsdp x microbatch",
        ),
        (
            "blocks[2] tensor=8",
            'no candidate is legal: layer blocks[2]: out dim 0 "heads" (4) is not divisible by '
            "tensor axes a,b,c (8); use a tensor degree of 2 or 4, or pad the dim to 8",
        ),
    ],
)
def test_what_cannot_be_fixed_is_said(fix, message):
    with pytest.raises(PlanError) as error:
        search(gpt(), cluster_of(8), WORK, SearchOptions(fix=fix, stages=1))
    assert str(error.value) == message.replace("plan.fix=", "plan.stages=1, plan.fix=")
    assert not isinstance(error.value, InfeasibleError)


# The result


def test_of_equally_fast_plans_the_largest_microbatch_is_taken():
    # Costs that do not depend on the micro-batch: no bytes, no weights.
    graph = gpt()
    free = [
        replace(c, parameters=(), tied=(), forward_bytes=0.0, backward_bytes=0.0)
        for c in graph.classes
    ]
    graph = replace(graph, classes=tuple(free))
    result = search(graph, cluster_of(1), Workload(16), SearchOptions(recompute="none"))
    assert result.plan.pipelines[0].microbatch == 16


def test_the_plan_for_a_gpt_on_eight_devices_is_this_text():
    cluster = cluster_of(8, memory_bytes=3e7)
    plan = search(gpt(), cluster, Workload(64)).plan
    text = plan_to_text(plan)
    assert text == (GOLDEN / "gpt_plan_8_devices.txt").read_text()
    assert plan_from_text(text) == plan


def test_the_plan_is_told_in_one_line():
    result = search(gpt(), cluster_of(8, memory_bytes=3e7), Workload(64))
    assert result.description == (
        "zero1-2 embed; zero1-2, recompute selective blocks[0] | tp2, recompute selective "
        "blocks[1] | tp2 blocks[2] | zero1-2 blocks[3]; fsdp2 head; dp2 "
        "outside, micro-batch 2"
    )


def test_a_search_is_a_pure_function():
    graph, cluster, options = gpt(), cluster_of(8), SearchOptions(recompute="full")
    before = [repr(x) for x in (graph, cluster, WORK, options)]
    first, second = (search(graph, cluster, WORK, options) for _ in range(2))
    assert first == second
    assert repr(first) == repr(second)
    assert [repr(x) for x in (graph, cluster, WORK, options)] == before


def test_the_searchs_own_seconds_are_left_to_the_caller():
    objective = search(gpt(), cluster_of(8), WORK).plan.objective
    assert objective == Objective(objective.step_s, objective.step_s, 0.0)


def test_only_devices_that_are_there_limit_the_memory():
    cluster = cluster_of(2, memory_bytes=10e9)
    tiny = replace(cluster.kinds[0], name="tiny", memory_bytes=1.0)
    both = replace(cluster, kinds=(*cluster.kinds, tiny))
    assert memory_limit(both, SearchOptions(memory_fraction=0.5)) == 5e9
    used = replace(both, hosts=(*both.hosts, Hosts("tiny", 1)))
    assert memory_limit(used, SearchOptions(memory_fraction=0.5)) == 0.5


def with_odd_vocabulary():
    graph = gpt()
    odd = Parameter("table", (257, 256), "float32", ("vocab", "embed"))
    classes = tuple(
        replace(c, parameters=(c.parameters[0], odd)) if c.name == "Embed" else c
        for c in graph.classes
    )
    return replace(graph, classes=classes)


def test_what_was_rejected_is_counted_by_its_reason():
    options = SearchOptions(recompute="none", stages=1)
    result = search(with_odd_vocabulary(), cluster_of(2), WORK, options)
    assert result.rejected == (
        (
            'layer embed: table dim 0 "vocab" (257) is not divisible by tensor axes a (2); '
            "use a tensor degree of 1, or pad the dim to 258",
            # With and without sequence parallelism, for each of five micro-batches.
            10,
        ),
    )


@pytest.mark.parametrize(
    ("devices", "work", "options"),
    [
        # Micro-batches of 4, 2 and 1 cannot be split over 8 devices.
        (8, Workload(8), SearchOptions(stages=1, tensor=1)),
        # Eight stages are more than there are layers.
        (8, Workload(16), SearchOptions()),
    ],
)
def test_what_cannot_run_is_not_counted_as_too_big(devices, work, options):
    result = search(gpt(), cluster_of(devices, memory_bytes=1e12), work, options)
    assert result.too_big == 0


def test_what_is_too_big_is_counted():
    # One stage of one device: micro-batches of 16 down to 1, of which the larger do not fit.
    options = SearchOptions(recompute="none", memory_fraction=1.0)
    peaks = {
        m: plan_cost(uniform(gpt(), 1, m, 16), gpt(), cluster_of(1), WORK).peak_bytes
        for m in (16, 8, 4, 2, 1)
    }
    assert len(set(peaks.values())) == 5
    for fitting in (1, 2, 4, 8, 16):
        result = search(gpt(), cluster_of(1, memory_bytes=peaks[fitting]), WORK, options)
        assert result.shapes == 5
        assert result.too_big == sum(peak > peaks[fitting] for peak in peaks.values())


# Errors


def infeasible(graph, cluster, work, options=SearchOptions()) -> InfeasibleError:
    with pytest.raises(InfeasibleError) as error:
        search(graph, cluster, work, options)
    return error.value


def test_a_model_that_fits_nowhere_says_by_how_much_and_where_it_would():
    error = infeasible(gpt(), cluster_of(2, memory_bytes=2.5e7), WORK)
    assert str(error) == (
        "nothing fits: the smallest plan (tp2 sp, recompute full; tp2 sp, recompute selective; "
        "tp2 sp, micro-batch 1) needs 0.04 GiB per device (state 0.04, activations 0.00, scratch "
        "0.00) and 0.02 GiB may be used on unit-1x2: 0.02 GiB (19555212 bytes) are missing; "
        "it would fit on 8 such devices"
    )
    assert (error.missing_bytes, error.suggestion) == (19555212, "it would fit on 8 such devices")
    # On 4 it would only with tensor parallelism between hosts, which has to be asked for.
    work, two_hosts = Workload(16), cluster_of(2, hosts=2, memory_bytes=2.5e7)
    infeasible(gpt(), two_hosts, work)
    search(gpt(), two_hosts, work, SearchOptions(tensor=4))


def on(count, cluster):
    """The cluster with its hosts copied until it has so many devices."""
    times = count // cluster.num_devices
    return replace(cluster, hosts=tuple(replace(h, count=h.count * times) for h in cluster.hosts))


PINNED = SearchOptions(data=2, fsdp=1, tensor=1)


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        (1e7, FREE),
        (1.5e7, FREE),
        (2.5e7, FREE),
        (3e7, FREE),
        (1.5e7, PINNED),
        (3e7, PINNED),
        (2e7, SearchOptions(fsdp=2, zero1=1)),
        (2.5e7, replace(ONE, recompute="none")),
        (3e7, TWO),
        (2.5e7, SearchOptions(fix="blocks[1] zero1=1 fsdp=1")),
    ],
)
def test_what_an_infeasible_search_suggests_is_true(memory, options):
    cluster = cluster_of(2, memory_bytes=memory)
    error = infeasible(gpt(), cluster, WORK, options)
    assert error.suggestion in str(error)
    assert f"({error.missing_bytes} bytes)" in str(error)
    free = SearchOptions(memory_fraction=options.memory_fraction)
    if error.suggestion == "it fits without the pins in section plan":
        search(gpt(), cluster, WORK, free)
    elif found := re.fullmatch(
        r"it would fit on (\d+) such devices( without the pins in section plan)?", error.suggestion
    ):
        assert bool(found[2]) == (options != free)
        search(gpt(), on(int(found[1]), cluster), WORK, free)
        with pytest.raises(InfeasibleError):
            search(gpt(), on(int(found[1]) // 2, cluster), WORK, free)
    else:
        found = re.fullmatch(r"it would fit on devices with ([\d.]+) GiB each", error.suggestion)
        search(gpt(), cluster_of(2, memory_bytes=float(found[1]) * 2**30), WORK, options)
    # A device with just the missing bytes more, after the reserve, does fit.
    enough = memory + (error.missing_bytes + 1) / options.memory_fraction
    search(gpt(), cluster_of(2, memory_bytes=enough), WORK, options)
    almost = memory + (error.missing_bytes - 1) / options.memory_fraction
    infeasible(gpt(), cluster_of(2, memory_bytes=almost), WORK, options)


def test_when_no_number_of_devices_helps_bigger_ones_are_suggested():
    cluster = cluster_of(2, memory_bytes=1e5)
    error = infeasible(gpt(), cluster, WORK)
    found = re.fullmatch(r"it would fit on devices with ([\d.]+) GiB each", error.suggestion)
    assert found
    search(gpt(), cluster_of(2, memory_bytes=float(found[1]) * 2**30), WORK)


@pytest.mark.parametrize(
    ("devices", "batch", "options", "message"),
    [
        (
            8, 16, SearchOptions(data=3),
            "no way to lay 16 sequences over 8 devices with plan.data=3; data x fsdp x tensor must "
            "be 8, and train.global_batch a multiple of data x fsdp x microbatch",
        ),
        (
            8, 16,
            SearchOptions(data=2, fsdp=2, tensor=4, microbatch=2, recompute="full", zero1=2),
            "no way to lay 16 sequences over 8 devices with plan.data=2, plan.fsdp=2, "
            "plan.tensor=4, plan.zero1=2, plan.microbatch=2, plan.recompute=full; "
            "data x fsdp x tensor must be 8, and train.global_batch a multiple of "
            "data x fsdp x microbatch",
        ),
        (
            2, 3, SearchOptions(tensor=1, stages=1),
            "no way to lay 3 sequences over 2 devices with plan.tensor=1, plan.stages=1; "
            "data x fsdp x tensor must be 2, and train.global_batch a multiple of "
            "data x fsdp x microbatch",
        ),
        (
            8, 16, SearchOptions(tensor=8),
            'no candidate is legal: layer blocks[0]: out dim 0 "heads" (4) is not divisible by '
            "tensor axes a,b,c (8); use a tensor degree of 2 or 4, or pad the dim to 8",
        ),
    ],
)  # fmt: skip
def test_pins_that_leave_nothing_are_refused(devices, batch, options, message):
    with pytest.raises(PlanError) as error:
        search(gpt(), cluster_of(devices), Workload(batch), options)
    assert str(error.value) == message
    assert not isinstance(error.value, InfeasibleError)
