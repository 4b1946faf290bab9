"""Dispatched steps against one device that is given the same sequences, a padded row each."""

from __future__ import annotations

import os
from functools import cache

import jax
import numpy as np
import optax
import pytest

from models import gpt
from shardpar.capture.trace import trace
from shardpar.errors import PlanError
from shardpar.lowering.pipelined import PipelinedProgram
from shardpar.lowering.program import Program
from shardpar.planner.dispatch import PipelineSpeed
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.train.buckets import padded
from shardpar.train.data import train_batches
from shardpar.train.dispatching import Dispatched
from shardpar.train.documents import Documents
from shardpar.train.packing import empty_rows

LONG_ONLY = pytest.mark.skipif(
    "SHARDPAR_LONG" not in os.environ, reason="half a minute; set SHARDPAR_LONG=1"
)
LONG, SHORT = 24, 8
OPTIONS = gpt.GPTOptions(vocab_size=16, layers=2, width=16, heads=2, max_length=LONG, mlp_ratio=1)
# The second step has nothing for the pipeline of short rows, the third is twice as large.
STEPS = ((20, 5, 4, 3, 9, 6, 2), (24, 20, 17, 9), (4, 3, 5, 22, 2, 8, 4, 6, 4, 15, 3, 4, 5, 7))
SPEEDS = (PipelineSpeed(LONG, token_s=1.0), PipelineSpeed(SHORT, token_s=1.5, fixed_s=3.0))


@cache
def captured(length, *names):
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in empty_rows(2, length).items()
        if not names or name in names
    }
    return trace(gpt.loss, lambda rngs: gpt.build(OPTIONS, rngs), batch, causal=True)


def stage(device, layers):
    return Stage((device,), Mesh(), (LayerStrategy(layers),))


def unequal(schedule):
    """One stage on device 0, or two times two on devices 0 and 1, beside one on device 2."""
    cuts = {
        "1f1b": ("embed..outside",),
        "interleaved": ("embed", "blocks[0]", "blocks[1]", "head..outside"),
    }[schedule]
    deep = tuple(stage(n % 2, layers) for n, layers in enumerate(cuts))
    return Plan("test", 4, (
        Pipeline(2, 1, deep, schedule), Pipeline(2, 2, (stage(2, "embed..outside"),)),
    ))  # fmt: skip


def sequences():
    random = np.random.default_rng(0)
    return [[random.integers(0, 16, n + 1) for n in lengths] for lengths in STEPS]


@cache
def expected():
    """Loss and gradient norm of each step on one device."""
    found = []
    names = ("inputs", "targets", "weights")
    plan = Plan("test", 14, (Pipeline(14, 14, (stage(0, "embed..outside"),)),))
    program = Program(captured(LONG, *names), plan, optax.sgd(0.5))
    state = program.init(0)
    for step in sequences():
        state, metrics = program.step(state, padded(step, LONG, rows=14))
        found.append([float(metrics[name]) for name in ("loss", "grad_norm", "weight")])
    return np.array(found)


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("interleaved", marks=LONG_ONLY)])
def test_losses_are_those_of_one_device_whatever_the_pipelines_get(schedule):
    plan = unequal(schedule)
    program = PipelinedProgram(
        captured(LONG), plan, optax.sgd(0.5), of_pipelines=(captured(LONG), captured(SHORT))
    )
    stepping = Dispatched(program, SPEEDS)
    state, found, counts = program.init(0), [], []
    for step in sequences():
        batch = stepping.assigned({"sequences": step})
        state, metrics = stepping.step(state, batch)
        found.append([float(metrics[name]) for name in ("loss", "grad_norm", "weight")])
        told = stepping.tokens(batch)
        assert told["tokens"] == sum(len(ids) - 1 for ids in step)
        assert told["pipeline_0_tokens"] + told["pipeline_1_tokens"] == told["tokens"]
        counts.append([told[f"pipeline_{p}_microbatches"] for p in (0, 1)])
    np.testing.assert_allclose(found, expected(), rtol=2e-5)
    assert counts[1][1] == 0
    assert len({tuple(row) for row in counts}) == 3
    if schedule == "interleaved":
        assert not any(first % 2 for first, _ in counts)


def test_assignments_made_ahead_do_not_move_the_position():
    ends = np.cumsum([3, 5, 4, 9, 6, 3, 7, 4, 8, 3])
    documents = Documents(np.arange(ends[-1]) % 16, ends, LONG)
    program = PipelinedProgram(
        captured(LONG), unequal("1f1b"), optax.sgd(0.5),
        of_pipelines=(captured(LONG), captured(SHORT)),
    )  # fmt: skip
    stepping = Dispatched(program, SPEEDS)
    with train_batches(documents, 3, seed=0) as batches:
        feed = stepping.feed(batches)
        first, position = next(feed), feed.position
        later = [next(feed)["sample"].tolist() for _ in range(3)]
        assert position["samples"] == 3
        feed.restore(position)
        assert [next(feed)["sample"].tolist() for _ in range(3)] == later
        assert first["sample"].tolist() != later[0]
        feed.close()
    with train_batches(documents, 3, seed=0) as plain:
        assert [next(plain)["sample"].tolist() for _ in range(4)] == [
            first["sample"].tolist(), *later,
        ]  # fmt: skip


def test_shares_that_are_no_whole_micro_batches_are_refused():
    program = PipelinedProgram(
        captured(LONG), unequal("1f1b"), optax.sgd(0.5),
        of_pipelines=(captured(LONG), captured(SHORT)),
    )  # fmt: skip
    state = program.init(0)
    for shares, message in (
        (
            [empty_rows(1, LONG), empty_rows(3, SHORT)],
            "pipeline 1 was given 3 sequences, and takes them 2 at a time; fill up with rows "
            "whose weights are 0",
        ),
        (
            [empty_rows(0, LONG), {}],
            "a step of no sequences was asked for; give one or more",
        ),
        (
            [empty_rows(1, LONG)],
            "1 shares of a step were given to 2 pipelines; give one for each, of no sequences "
            "where a pipeline gets none",
        ),
    ):
        with pytest.raises(PlanError) as caught:
            program.step_shares(state, shares)
        assert str(caught.value) == message
