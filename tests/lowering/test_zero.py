"""Pipelines that keep the optimizer state once between them, against the same model on one device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import optax
import pytest

from shardpar.errors import PlanError
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.pipelined import PipelinedProgram
from shardpar.lowering.program import Program
from shardpar.lowering.switch import Programs
from shardpar.run.checkpoints import Checkpoints
from shardpar.spec.plan import Pipeline
from shardpar.spec.zero import holdings
from tests.lowering.test_pipelined import (
    assert_states_close,
    bits_of,
    host,
    plan_over,
    stage,
    trained,
)
from tests.lowering.test_rescue import poisoned
from tests.lowering.tiny import BATCH, batches, captured, uniform

SIZES = {"layers": 2, "width": 32}
STEPS = 3
OPTIONS = ProgramOptions(gradient_clip=0.5)


def unequal(zero="pipelines"):
    """TP2 by two stages beside single devices by three; the first splits its state by zero1 too."""
    wide = (
        stage([0, 1], "embed..blocks[0]", tensor=("a",)),
        stage([2, 3], "blocks[1]..outside", zero1=("a",)),
    )
    thin = (
        stage([4], "embed"),
        stage([5], "blocks[0:2]", recompute="full"),
        stage([6], "head..outside"),
    )
    return replace(plan_over(Pipeline(6, 2, wide), Pipeline(2, 1, thin)), zero=zero)


def rule():
    return optax.adamw(3e-3, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params))


@cache
def single():
    """Losses and gradient norms, and the state, of one device that clips by the global norm."""
    program = Program(captured(**SIZES), uniform(1), rule(), OPTIONS)
    return trained(program, STEPS)


@cache
def programs():
    return Programs(captured(**SIZES), rule(), OPTIONS)


@cache
def run():
    return trained(programs().program(unequal()), STEPS)


def on_device(tree, device):
    """Bytes of a tree's pieces on a device."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


def test_losses_and_clipped_gradient_norms_are_those_of_one_device():
    _, seen = run()
    assert single()[1][:, 1].min() > OPTIONS.gradient_clip
    np.testing.assert_allclose(seen, single()[1], rtol=2e-5)


def test_the_state_is_that_of_one_device_and_parameters_are_equal_in_every_copy():
    program, (state, _) = programs().program(unequal()), run()
    assert_states_close(program, state, single()[0], rtol=2e-3, atol=2e-4)
    for name, union in state.params.items():
        assert len({np.asarray(array).tobytes() for array in union.arrays}) == 1, name


def test_the_optimizer_state_lies_once_over_the_pipelines():
    program, (state, _) = programs().program(unequal()), run()
    sizes = {name: leaf.size for name, leaf in captured(**SIZES).model.params.items()}
    for moments in (state.optimizer[0].mu, state.optimizer[0].nu):
        for name, union in moments.items():
            assert len(union.arrays) > 1, name
            assert sum(array.size for array in union.arrays) == sizes[name], name
    every = programs().program(unequal("none")).init(0)
    copies = sum(array.size for u in every.optimizer[0].mu.values() for array in u.arrays)
    # The tied table lies in the first and the last stage of both pipelines.
    table = sizes["embed.table"]
    assert copies == 2 * sum(sizes.values()) + 2 * table
