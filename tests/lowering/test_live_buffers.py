"""Bytes alive on each device through a step, against the schedule's bound on micro-batches."""

from __future__ import annotations

import math
from collections import Counter

import jax
import optax
import pytest

from shardpar.lowering.pipelined import PipelinedProgram
from shardpar.lowering.step_under_way import StepUnderWay
from shardpar.spec.plan import Pipeline
from shardpar.spec.schedule import held
from tests.lowering.test_pipelined import plan_over, stage
from tests.lowering.test_zero import BATCH, batches, net

ENDS = (stage([0, 1], "embed..blocks[0]", tensor=("a",)), stage([2], "blocks[1]..outside"))
ROUND = (
    stage([0, 1], "embed", tensor=("a",)),
    stage([2], "blocks[0]"),
    stage([0, 1], "blocks[1]"),
    stage([2], "head..outside"),
)
PLANS = {
    "1f1b": Pipeline(BATCH, 1, ENDS, "1f1b"),
    "gpipe": Pipeline(BATCH, 1, ENDS, "gpipe"),
    "interleaved": Pipeline(BATCH, 2, ROUND, "interleaved"),
}


def alive(arrays):
    """Bytes by device; a buffer that several arrays show counts once."""
    buffers = {
        (shard.device, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
        for array in arrays
        if not array.is_deleted() and not jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended)
        for shard in array.addressable_shards
    }
    found = Counter()
    for (device, _), size in buffers.items():
        found[device] += size
    return found


def every(boxes):
    return [x for box in boxes.values() for x in (box.values() if isinstance(box, dict) else box)]


def peaks_of(program, monkeypatch):
    """By device, the most bytes alive after a task that were not when the step began.

    Without what has arrived and waits for its task: the plan's bound is about what waits for
    its backward.
    """
    do, start, peaks = StepUnderWay.do, [], Counter()

    def watched(step, task):
        if not start:
            start.append(alive(jax.live_arrays()))
        do(step, task)
        waiting = alive([*every(step.arrived), *every(step.returned)])
        now = alive(jax.live_arrays())
        for device in program.used_devices:
            grown = now[device] - start[0][device] - waiting[device]
            peaks[device] = max(peaks[device], grown)

    state, batch = program.init(0), batches(1)[0]
    state, _ = program.step(state, batch)
    monkeypatch.setattr(StepUnderWay, "do", watched)
    program.step(state, batch)
    monkeypatch.undo()
    return peaks


def bound_of(program):
    """By device, the bytes of as many micro-batches as the schedule lets wait for a backward."""
    (pipeline,) = program.plan.pipelines
    found = Counter()
    for number in range(len(pipeline.stages)):
        programs = program.groups[number % pipeline.num_groups].stages[number]
        one = sum(
            math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize
            for leaf, s in zip(programs._traced.saved, programs._saved_shapes, strict=True)
            if leaf.source != "batch"
        )
        group, chunk = number % pipeline.num_groups, number // pipeline.num_groups
        most = held(
            pipeline.schedule, pipeline.num_groups, group, pipeline.num_microbatches,
            pipeline.chunks, chunk,
        )  # fmt: skip
        for device in pipeline.stages[number].devices:
            found[program.devices[device]] += most * one
    return found


@pytest.mark.parametrize("name", PLANS)
def test_live_bytes_are_those_of_as_many_micro_batches_as_the_schedule_says(name, monkeypatch):
    program = PipelinedProgram(net(), plan_over(PLANS[name]), optax.sgd(0.1))
    peaks, bounds = peaks_of(program, monkeypatch), bound_of(program)
    assert all(peaks[d] <= bounds[d] for d in program.used_devices), (peaks, bounds)
    if name != "interleaved":
        # Chunks of one group are not all at their most at once; a lone one is.
        assert peaks == bounds
