"""The exported trace against the simulated step: the same events, and none that overlap."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import pytest

from shardpar.planner.cost import plan_cost
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import Timeline, simulate
from shardpar.planner.trace_export import perfetto_trace
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from tests.planner.cases import cluster_of, gpt

ROUNDING_US = 1 / 16


def two_pipelines() -> Plan:
    def stage(first: int, layers: str) -> Stage:
        devices = tuple(range(first, first + 2))
        return Stage(devices, Mesh.factored(2), (LayerStrategy(layers),))

    halves = (stage(0, "embed..blocks[1]"), stage(2, "blocks[2]..outside"))
    thirds = (
        stage(4, "embed..blocks[0]"), stage(6, "blocks[1]..blocks[2]"),
        stage(8, "blocks[3]..outside"),
    )  # fmt: skip
    pipelines = (Pipeline(24, 4, halves), Pipeline(16, 2, thirds, "gpipe"))
    return Plan('unit "<2>"', 40, pipelines)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return two_pipelines()


@pytest.fixture(scope="module")
def timeline(plan: Plan) -> Timeline:
    return simulate(plan, plan_cost(plan, gpt(), cluster_of(8, 2), Workload(40)))


def trace_of(plan: Plan, timeline: Timeline) -> tuple[dict, list[dict], list[dict]]:
    trace = json.loads(perfetto_trace(plan, timeline))
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    return (
        trace,
        [event for event in events if event["ph"] == "M"],
        [event for event in events if event["ph"] == "X"],
    )


def test_every_event_of_the_timeline_is_in_the_trace(plan, timeline):
    _, names, events = trace_of(plan, timeline)
    threads = {
        (name["pid"], name["tid"]): name["args"]["name"]
        for name in names
        if name["name"] == "thread_name"
    }
    assert len(events) == len(timeline.events) > 60
    for event, written in zip(timeline.events, events, strict=True):
        assert written["pid"] == event.pipeline + 1
        assert threads[written["pid"], written["tid"]].startswith(f"stage {event.stage}: ")
        assert written["cat"] == event.kind
        if event.microbatch >= 0:
            assert written["name"] == f"{event.kind} {event.microbatch}"
            assert written["args"] == {"microbatch": event.microbatch}
        else:
            assert written["name"] == event.kind
        assert written["ts"] == pytest.approx(event.start_s * 1e6, abs=ROUNDING_US)
        end_us = written["ts"] + written["dur"]
        assert end_us == pytest.approx(event.end_s * 1e6, abs=ROUNDING_US)


def assert_none_overlap(events: list[dict]) -> None:
    of_thread = defaultdict(list)
    for event in events:
        # As a viewer reads it: microseconds become whole nanoseconds, cut off.
        start_ns, took_ns = int(event["ts"] * 1000), int(event["dur"] * 1000)
        assert took_ns >= 0
        of_thread[event["pid"], event["tid"]].append((start_ns, start_ns + took_ns))
    for spans in of_thread.values():
        for (_, end_ns), (start_ns, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
            assert end_ns <= start_ns


# Times that binary fractions cannot hold are where a viewer would see overlaps.
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1e-3, 7e4])
def test_events_of_a_thread_never_overlap(plan, timeline, scale):
    stretched = tuple(
        replace(event, start_s=event.start_s * scale, end_s=event.end_s * scale)
        for event in timeline.events
    )
    _, _, events = trace_of(plan, replace(timeline, events=stretched))
    assert_none_overlap(events)


def test_pipelines_are_processes_and_stages_are_threads(plan, timeline):
    _, names, events = trace_of(plan, timeline)
    told = [(n["name"], n["pid"], n.get("tid"), n["args"].get("name")) for n in names]
    assert [entry for entry in told if not entry[0].endswith("sort_index")] == [
        ("process_name", 1, None, "pipeline 0: 1f1b, 6 micro-batches of 4"),
        ("thread_name", 1, 3, "stage 0: devices 0, 1"),
        ("thread_name", 1, 4, "stage 1: devices 2, 3"),
        ("process_name", 2, None, "pipeline 1: gpipe, 8 micro-batches of 2"),
        ("thread_name", 2, 5, "stage 0: devices 4, 5"),
        ("thread_name", 2, 6, "stage 1: devices 6, 7"),
        ("thread_name", 2, 7, "stage 2: devices 8, 9"),
    ]
    order = {
        (n["pid"], n["tid"]): n["args"]["sort_index"]
        for n in names
        if n["name"] == "thread_sort_index"
    }
    assert order == {(1, 3): 0, (1, 4): 1, (2, 5): 0, (2, 6): 1, (2, 7): 2}
    assert {(event["pid"], event["tid"]) for event in events} == set(order)


def test_the_step_is_told_with_the_trace(plan, timeline):
    trace, _, _ = trace_of(plan, timeline)
    assert trace["otherData"] == {
        "cluster": 'unit "<2>"', "global_batch": 40,
        "step_s": timeline.step_s, "bubble": timeline.bubble,
    }  # fmt: skip
    assert trace["displayTimeUnit"] == "ms"
