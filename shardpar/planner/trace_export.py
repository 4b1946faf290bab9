"""A simulated step as Chrome trace events, which ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import json
from typing import Any

from shardpar.planner.simulate import Event, Timeline
from shardpar.spec.plan import Plan

_TICKS_PER_S = 8_000_000


def perfetto_trace(plan: Plan, timeline: Timeline) -> str:
    """Writes a simulated step as a trace: a process per pipeline, a thread per stage.

    Args:
      plan: the plan.
      timeline: its step, from `simulate`.

    Returns:
      JSON of the trace event format. Times are microseconds, rounded to eighths of one, which
      floats hold exactly: viewers drop an event that begins even a nanosecond before the
      last one of its thread has ended.
    """
    threads = _threads(plan)
    trace = {
        "displayTimeUnit": "ms",
        "otherData": {
            "cluster": plan.cluster,
            "global_batch": plan.global_batch,
            "step_s": timeline.step_s,
            "bubble": timeline.bubble,
        },
        "traceEvents": [
            *_names(plan, threads),
            *(_complete(event, threads[event.pipeline, event.stage]) for event in timeline.events),
        ],
    }
    return json.dumps(trace, separators=(",", ":")) + "\n"


def ranges_text(numbers: tuple[int, ...]) -> str:
    """Numbers of devices, or of anything else in order, as people write them.

    >>> ranges_text((0, 1, 2, 3)), ranges_text((5,)), ranges_text((0, 1, 4, 5, 6))
    ('0-3', '5', '0, 1, 4-6')
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)


def _threads(plan: Plan) -> dict[tuple[int, int], int]:
    # No number is 0, which viewers take for the idle thread, and none is a process's,
    # which would make it that process's main thread.
    first = len(plan.pipelines) + 1
    places = (
        (p, s) for p, pipeline in enumerate(plan.pipelines) for s in range(len(pipeline.stages))
    )
    return {place: number for number, place in enumerate(places, first)}


def _names(plan: Plan, threads: dict[tuple[int, int], int]) -> list[dict[str, Any]]:
    found = []
    for p, pipeline in enumerate(plan.pipelines):
        text = (
            f"pipeline {p}: {pipeline.schedule}, "
            f"{pipeline.num_microbatches} micro-batches of {pipeline.microbatch}"
        )
        found.append(_metadata("process_name", p + 1, {"name": text}))
        found.append(_metadata("process_sort_index", p + 1, {"sort_index": p}))
        for s, stage in enumerate(pipeline.stages):
            tid = threads[p, s]
            name = f"stage {s}: devices {ranges_text(stage.devices)}"
            found.append(_metadata("thread_name", p + 1, {"name": name}) | {"tid": tid})
            found.append(_metadata("thread_sort_index", p + 1, {"sort_index": s}) | {"tid": tid})
    return found


def _metadata(name: str, pid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "args": args}


def _complete(event: Event, tid: int) -> dict[str, Any]:
    start, end = (round(at_s * _TICKS_PER_S) for at_s in (event.start_s, event.end_s))
    once = event.microbatch < 0
    return {
        "ph": "X",
        "name": event.kind if once else f"{event.kind} {event.microbatch}",
        "cat": event.kind,
        "pid": event.pipeline + 1,
        "tid": tid,
        "ts": start / 8,
        "dur": (end - start) / 8,
        "args": {} if once else {"microbatch": event.microbatch},
    }
