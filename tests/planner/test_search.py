"""The search against brute force; its errors and its plan as whole texts."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import InfeasibleError, PlanError
from shardpar.planner.cost import Workload, plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.search import memory_limit, search
from shardpar.planner.strategies import candidates
from shardpar.spec.check import check
from shardpar.spec.cluster import Hosts
from shardpar.spec.graph import Parameter
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import Objective
from shardpar.spec.text import plan_from_text, plan_to_text
from tests.planner.cases import GOLDEN, cluster_of, gpt, uniform

WORK = Workload(16)


def brute_force(graph, cluster, work, options):
    """(seconds, bytes, plan) of every candidate that passes the check, the fastest first."""
    mesh = Mesh.factored(cluster.num_devices)
    found = []
    for candidate in candidates(graph, mesh, work.global_batch, options):
        s = candidate.strategy
        plan = uniform(
            graph, mesh.num_devices, candidate.microbatch, work.global_batch, tensor=s.tensor,
            fsdp=s.fsdp, sequence_parallel=s.sequence_parallel, recompute=s.recompute,
        )  # fmt: skip
        try:
            check(plan, graph, cluster)
        except PlanError:
            continue
        cost = plan_cost(plan, graph, cluster, work)
        found.append((cost.step_s, cost.peak_bytes, plan))
    return sorted(found, key=lambda entry: entry[0])


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.sampled_from([1, 2]),
    st.sampled_from([4, 8, 12, 24]),
    st.sampled_from(["float32", "bfloat16"]),
    st.floats(2e7, 4e8),
    st.builds(
        SearchOptions,
        recompute=st.sampled_from([None, "full"]),
        tensor=st.sampled_from([None, 1, 2]),
        memory_fraction=st.floats(0.1, 1.0),
    ),
)
def test_the_plan_found_is_the_best_of_all_that_fit(devices, hosts, batch, dtype, memory, options):
    graph, cluster = gpt(), cluster_of(devices, hosts, memory)
    work = Workload(batch, dtype)
    every = brute_force(graph, cluster, work, options)
    limit = memory * options.memory_fraction
    fitting = [entry for entry in every if entry[1] <= limit]
    if not fitting:
        with pytest.raises(PlanError) as error:
            search(graph, cluster, work, options)
        assert isinstance(error.value, InfeasibleError) == bool(every)
        if every:
            missing = min(entry[1] for entry in every) - limit
            assert 0 <= error.value.missing_bytes - missing < 1
        return
    result = search(graph, cluster, work, options)
    assert result.cost.step_s == fitting[0][0]
    assert result.cost.peak_bytes <= limit == result.limit_bytes
    assert result.too_big == len(every) - len(fitting)
    assert [s.step_s for s in result.runners_up] == [s for s, _, _ in fitting[1:6]]
    stage = result.plan.pipelines[0].stages[0]
    assert result.plan.objective == Objective(result.cost.step_s, result.cost.step_s, 0.0)
    assert stage.peak_bytes == result.cost.peak_bytes
    assert plan_cost(result.plan, graph, cluster, work).step_s == result.cost.step_s
    check(result.plan, graph, cluster)


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


def test_a_search_is_a_pure_function():
    graph, cluster, options = gpt(), cluster_of(8), SearchOptions(recompute="full")
    before = [repr(x) for x in (graph, cluster, WORK, options)]
    first, second = (search(graph, cluster, WORK, options) for _ in range(2))
    assert first == second
    assert repr(first) == repr(second)
    assert [repr(x) for x in (graph, cluster, WORK, options)] == before


def test_pins_are_kept():
    options = SearchOptions(data=2, fsdp=2, tensor=2, sequence_parallel=True, microbatch=2)
    result = search(gpt(), cluster_of(8), WORK, options)
    (stage,) = result.plan.pipelines[0].stages
    (strategy,) = stage.layers
    assert (strategy.fsdp, strategy.tensor, strategy.sequence_parallel) == (("b",), ("c",), True)
    assert result.plan.pipelines[0].microbatch == 8
    assert result.description.startswith("dp2 fsdp2 tp2 sp")


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
    result = search(with_odd_vocabulary(), cluster_of(2), WORK, SearchOptions(recompute="none"))
    assert result.rejected == (
        (
            'layer embed: table dim 0 "vocab" (257) is not divisible by tensor axes a (2); '
            "use a tensor degree of 1, or pad the dim to 258",
            10,
        ),
    )


# Errors


def infeasible(graph, cluster, work, options=SearchOptions()) -> InfeasibleError:
    with pytest.raises(InfeasibleError) as error:
        search(graph, cluster, work, options)
    return error.value


def test_a_model_that_fits_nowhere_says_by_how_much_and_where_it_would():
    error = infeasible(gpt(), cluster_of(2, memory_bytes=2.5e7), WORK)
    assert str(error) == (
        "nothing fits: the smallest plan (tp2 sp, recompute full, micro-batch 1) needs 0.04 GiB "
        "per device (state 0.04, activations 0.00, scratch 0.00) and 0.02 GiB may be used on "
        "unit-1x2: 0.02 GiB (19594336 bytes) are missing; it would fit on 4 such devices"
    )
    assert (error.missing_bytes, error.suggestion) == (
        19594336,
        "it would fit on 4 such devices",
    )


def on(count, cluster):
    """The cluster with its hosts copied until it has so many devices."""
    times = count // cluster.num_devices
    return replace(cluster, hosts=tuple(replace(h, count=h.count * times) for h in cluster.hosts))


@pytest.mark.parametrize("memory", [6e6, 1e7, 1.5e7, 2e7, 2.5e7, 3e7])
@pytest.mark.parametrize(
    "options", [SearchOptions(), SearchOptions(data=2, fsdp=1, tensor=1), SearchOptions(fsdp=2)]
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
            8, 16, SearchOptions(data=2, fsdp=2, tensor=4, microbatch=2, recompute="full"),
            "no way to lay 16 sequences over 8 devices with plan.data=2, plan.fsdp=2, "
            "plan.tensor=4, plan.microbatch=2, plan.recompute=full; data x fsdp x tensor must be "
            "8, and train.global_batch a multiple of data x fsdp x microbatch",
        ),
        (
            2, 3, SearchOptions(tensor=1),
            "no way to lay 3 sequences over 2 devices with plan.tensor=1; data x fsdp x tensor "
            "must be 2, and train.global_batch a multiple of data x fsdp x microbatch",
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
