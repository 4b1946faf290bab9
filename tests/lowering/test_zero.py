"""Pipelines that keep the optimizer state once between them, against one device."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardpar
from shardpar.capture.trace import trace
from shardpar.errors import PlanError
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.pipelined import PipelinedProgram
from shardpar.lowering.program import Program
from shardpar.lowering.switch import Programs
from shardpar.planner.cost import plan_cost
from shardpar.planner.setting import Workload
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
from tests.planner.cases import cluster_of

STEPS = 3
OPTIONS = ProgramOptions(gradient_clip=0.01)
BATCH, LENGTH, VOCAB, WIDTH, HIDDEN = 8, 4, 10, 6, 8


def array(rngs, shape, names):
    return nnx.Param(jax.random.normal(rngs.params(), shape) * 0.5, out_sharding=names)


@shardpar.layer
class Embed(nnx.Module):
    """A table that the head reads too."""

    def __init__(self, rngs):
        self.table = array(rngs, (VOCAB, WIDTH), ("vocab", "embed"))

    def __call__(self, ids):
        return self.table[...][ids]


@shardpar.layer
class Block(nnx.Module):
    """Two products that tensor parallelism can split."""

    def __init__(self, rngs):
        self.up = array(rngs, (WIDTH, HIDDEN), ("embed", "mlp"))
        self.down = array(rngs, (HIDDEN, WIDTH), ("mlp", "embed"))
        self.bias = array(rngs, (WIDTH,), ("embed",))

    def __call__(self, x):
        return x + nnx.tanh(x @ self.up[...]) @ self.down[...] + self.bias[...]


@shardpar.layer
class Head(nnx.Module):
    """Logits, and a factor with one index, which nothing can cut."""

    def __init__(self, rngs):
        self.heat = nnx.Param(jnp.ones((1,)))

    def __call__(self, x, table):
        return x @ table.T * self.heat[...]


class Net(nnx.Module):
    """What is trained."""

    def __init__(self, rngs):
        self.embed, self.head = Embed(rngs), Head(rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x, self.embed.table[...])


def loss(model, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["ids"]), batch["next"])
    return jnp.sum(losses * batch["counts"]), jnp.sum(batch["counts"])


def batches(count):
    rng = np.random.default_rng(3)
    shape = (BATCH, LENGTH)
    return [
        {
            "ids": rng.integers(0, VOCAB, shape).astype(np.int32),
            "next": rng.integers(0, VOCAB, shape).astype(np.int32),
            "counts": rng.integers(0, 3, shape).astype(np.float32),
        }
        for _ in range(count)
    ]


@cache
def net():
    return trace(loss, Net, batches(1)[0])


def unequal(zero="pipelines"):
    """TP2 by two stages beside single devices by three; tokens count unequally."""
    wide = (
        stage([0, 1], "embed..blocks[0]", tensor=("a",)),
        stage([2, 3], "blocks[1]..outside", tensor=("a",)),
    )
    thin = (
        stage([4], "embed"),
        stage([5], "blocks[0:2]", recompute="full"),
        stage([6], "head..outside"),
    )
    return replace(plan_over(Pipeline(6, 2, wide), Pipeline(2, 1, thin)), zero=zero)


def one_device():
    return plan_over(Pipeline(BATCH, BATCH, (stage([0], "embed..outside"),)))


def rule():
    return optax.adamw(3e-3, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params))


@cache
def one_device_program():
    return Program(net(), one_device(), rule(), OPTIONS)


@cache
def single():
    """The state, losses and gradient norms of one device that clips by the global norm."""
    return trained(one_device_program(), source=batches(STEPS))


@cache
def programs():
    return Programs(net(), rule(), OPTIONS)


@cache
def run():
    return trained(programs().program(unequal()), source=batches(STEPS))


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


def test_the_optimizer_state_lies_once_over_the_pipelines_but_for_what_has_one_index():
    state, _ = run()
    sizes = {name: leaf.size for name, leaf in net().model.params.items()}
    for moments in (state.optimizer[0].mu, state.optimizer[0].nu):
        held = {name: sum(array.size for array in u.arrays) for name, u in moments.items()}
        assert held == {**sizes, "head.heat": 2}
    # Without, each group keeps all; the tied table is in the first and the last of both.
    homes = programs().program(unequal("none")).homes.leaves
    for name in sizes:
        groups = homes[f".optimizer[0].mu['{name}']"].groups
        assert len(groups) == (4 if name == "embed.table" else 2), name


def test_each_device_has_the_bytes_of_optimizer_state_that_the_layouts_say():
    program, (state, _) = programs().program(unequal()), run()
    found = holdings(program.plan, program.captured.graph)
    for device in program.plan.devices:
        expected = sum(
            4 * math.prod(piece.shape)
            for holding in found.values()
            for group in holding.in_optimizer.pieces(holding.parameter.shape)
            for piece in group
            if piece.device == device
        )
        got = on_device(state.optimizer[0].mu, program.devices[device])
        assert got == expected, device


def everything(program, state):
    """Bytes of each leaf as a checkpoint holds it."""
    return [host(leaf).tobytes() for leaf in jax.tree.leaves(program.to_saved(state))]


def test_a_checkpoint_brings_slices_and_copies_back_bit_for_bit(tmp_path):
    program, (state, _) = programs().program(unequal()), run()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(STEPS, program.to_saved(state))
        checkpoints.wait()
        restored = checkpoints.restore(None, program.saved_shapes).state
        again = program.from_saved(restored)
        alone = one_device_program()
        elsewhere = checkpoints.restore(None, alone.saved_shapes).state
    assert bits_of(again) == bits_of(state)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert one.sharding == other.sharding
    assert everything(alone, elsewhere) == everything(program, state)


def test_a_switch_to_copies_and_back_changes_no_bit_and_the_run_goes_on():
    program, source = programs().program(unequal()), batches(2)
    state, _ = program.step(program.init(0), source[0])
    before = everything(program, state)
    there = programs().switch(program, state, unequal("none"))
    assert everything(there.program, there.state) == before
    back = programs().switch(there.program, there.state, unequal())
    assert back.program is program
    assert everything(program, back.state) == before
    _, metrics = program.step(back.state, source[1])
    seen = [float(metrics[key]) for key in ("loss", "grad_norm")]
    np.testing.assert_allclose(seen, single()[1][1], rtol=2e-5)


def test_a_slice_whose_only_owner_is_lost_is_missing_and_parameters_are_not():
    program, (state, _) = programs().program(unequal()), run()
    lost = {5}
    left = plan_over(Pipeline(BATCH, BATCH, (stage([0], "embed..outside"),)))
    rescued = programs().rescue(program, poisoned(program, state, lost), left, lost)
    blocks = [name for name in net().model.params if name.startswith("blocks")]
    assert set(rescued.missing) == {
        f".optimizer[0].{moment}['{name}']" for moment in ("mu", "nu") for name in blocks
    }
    saved = program.to_saved(state).params
    for name, value in saved.items():
        assert np.array_equal(rescued.found[f".params['{name}']"].arrays[0], value), name


def test_batches_gathered_one_by_one_give_one_update_as_on_one_device():
    found = []
    for program in (programs().program(unequal()), one_device_program()):
        state, gathered = program.init(0), None
        for batch in batches(2):
            gathered = program.accumulate(state, batch, gathered)
        state, metrics = program.apply(state, gathered)
        found.append((program, state, [float(metrics[k]) for k in ("loss", "grad_norm", "weight")]))
    (program, state, seen), (_, expected, wanted) = found
    np.testing.assert_allclose(seen, wanted, rtol=1e-5)
    assert_states_close(program, state, expected, rtol=1e-3, atol=1e-5)


def test_a_gradient_that_is_not_finite_leaves_every_bit_of_the_state_alone():
    program = programs().program(unequal())
    state = program.init(0)
    before = bits_of(state)
    batch = {**batches(1)[0], "counts": np.full((BATCH, LENGTH), np.nan, np.float32)}
    state, metrics = program.step(state, batch)
    assert float(metrics["skipped"]) == 1
    after = bits_of(replace(state, step=program.init(0).step))
    assert after == before


def test_an_optimizer_that_needs_whole_parameters_is_refused_in_words():
    with pytest.raises(PlanError, match=r'for one element reads others \(by "reduce_sum"\)'):
        PipelinedProgram(net(), unequal(), optax.lamb(1e-2))
    PipelinedProgram(net(), unequal("none"), optax.lamb(1e-2))


def test_the_planner_predicts_the_bytes_of_optimizer_state_on_each_device():
    program, (state, _) = programs().program(unequal()), run()
    graph, plan = program.captured.graph, program.plan
    cost = plan_cost(plan, graph, cluster_of(7), Workload(BATCH, loops=False))
    table = holdings(plan, graph)["embed.table"].in_optimizer.pieces((VOCAB, WIDTH))
    size = {p.device: math.prod(p.shape) for pieces in table for p in pieces}
    stages = [of for pipeline in plan.pipelines for of in pipeline.stages]
    for of, priced in zip(stages, cost.stages, strict=True):
        predicted = sum(layer.optimizer_bytes for _, layer in priced.layers)
        if "head" in [name for name, _ in priced.layers]:
            # A tied reader's copy of a parameter is in no prediction; it has a slice of it too.
            predicted += 2 * 4 * size[of.devices[0]]
        moments = state.optimizer[0]
        got = [on_device((moments.mu, moments.nu), program.devices[d]) for d in of.devices]
        assert got == [predicted] * len(of.devices)


def test_other_plans_compute_and_the_shared_optimizer_state_does_not_move():
    program, kept = programs().program(unequal()), programs()
    state, seen = program.init(0), []
    for batch in batches(2):
        before = {id(x) for x in jax.tree.leaves(state)}
        gathered = kept.accumulate(program, state, one_device(), batch)
        assert {id(x) for x in jax.tree.leaves(state)} == before
        state, metrics = program.apply(state, gathered)
        seen.append([float(metrics[key]) for key in ("loss", "grad_norm")])
    np.testing.assert_allclose(seen, single()[1][:2], rtol=2e-5)
    lent = [move for (_, _, kind), move in kept._moves.items() if kind == "weights"]
    sizes = sum(leaf.size for leaf in net().model.params.values())
    # Float32 parameters and nothing else go to the device that computes.
    assert [move.resolved.bytes_received[0] for move in lent] == [4 * sizes - on_owner(program)]


def on_owner(program):
    """Bytes of parameters that device 0 has already."""
    return sum(
        4 * math.prod(piece.shape)
        for holding in holdings(program.plan, program.captured.graph).values()
        for pieces in holding.at_rest.pieces(holding.parameter.shape)
        for piece in pieces
        if piece.device == 0
    )
