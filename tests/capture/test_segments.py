"""Which stage runs which equation, what stages send, and what they compute again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardpar
from shardpar.capture._compat import is_literal, run_equation
from shardpar.capture.cut import cut
from shardpar.capture.segments import reads_of, segments
from shardpar.capture.trace import trace
from shardpar.errors import PlanError
from tests.capture.nets import BATCH, WIDTH, Dense, Skips, X

SHAPES = {name: jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32) for name in ("x", "keep", "y")}


class Crowded(nnx.Module):
    """A skip over all stages, a gain read between layers, a mask, and a parameter nobody reads."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Dense(rngs) for _ in range(3)])
        self.gain = nnx.Param(jnp.full(WIDTH, 0.9))
        self.unused = nnx.Param(jnp.ones(WIDTH))

    def __call__(self, x, keep):
        mask = keep > 0.0
        first = jnp.where(mask, self.blocks[0](x) * self.gain, 0.0)
        second = jnp.where(mask, self.blocks[1](first) * self.gain, 0.0)
        return jnp.where(mask, self.blocks[2](second) + first, 0.0), jnp.mean(first**2)


def crowded_loss(model, batch):
    out, aux = model(batch["x"], batch["keep"])
    return jnp.mean((out - batch["y"]) ** 2) + 0.1 * aux


@shardpar.layer
class Normed(nnx.Module):
    """A layer with batch statistics of its own."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.8, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.norm(self.linear(x)))


class TwoNormed(nnx.Module):
    """Batch statistics in each of two layers."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Normed(rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class OneNorm(nnx.Module):
    """One norm after every layer: its statistics are read and changed all over the model."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Dense(rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.8, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = self.norm(block(x))
        return x


@shardpar.layer
class Drop(nnx.Module):
    """Draws from a stream of keys that belongs to the model."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, rngs):
        return self.dropout(self.linear(x), rngs=rngs)


class OneStream(nnx.Module):
    """Every layer advances the counter that the next one draws with."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Drop(rngs) for _ in range(3)])
        self.rngs = nnx.Rngs(dropout=7)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x, self.rngs)
        return x


def squares(model, batch):
    return jnp.mean(model(batch["x"]) ** 2)


def segments_of(build, loss, stages, batch=X):
    source = trace(loss, build, batch)
    program = cut(source.model, source.loss, dict(source.batch))
    return segments(program, {f"blocks[{i}]": s for i, s in enumerate(stages)})


@pytest.fixture(scope="module")
def crowded():
    return segments_of(Crowded, crowded_loss, [0, 1, 2], SHAPES)


def test_every_equation_that_reads_data_is_run_by_exactly_one_stage(crowded):
    positions = [p for segment in crowded.stages for p in segment.positions]
    assert len(positions) == len(set(positions))
    calls = [call.position for call in crowded.program.calls]
    for stage, position in enumerate(calls):
        assert position in crowded.stages[stage].positions


def test_a_skip_is_sent_to_each_stage_that_reads_it_from_where_it_was_made(crowded):
    first, second, third = crowded.stages
    assert not first.received
    assert {stage for stage, _ in second.received} == {0}
    assert {stage for stage, _ in third.received} == {0, 1}
    sent = {v for segment in crowded.stages for v in segment.sent}
    assert {v for s in crowded.stages for _, v in s.received} == sent
    assert not third.sent


def test_a_mask_made_of_the_batch_is_computed_again_and_never_sent(crowded):
    for segment in crowded.stages:
        assert "keep" in segment.batch
        assert all(v.aval.dtype == jnp.float32 for _, v in segment.received)
        assert any(o.aval.dtype == bool for again in segment.again for o in again.outputs)


def test_stages_read_only_the_arrays_of_the_batch_and_the_parameters_that_they_need(crowded):
    assert [("x" in s.batch, "y" in s.batch) for s in crowded.stages] == [
        (True, False), (False, False), (False, True),
    ]  # fmt: skip
    assert ["gain" in s.params for s in crowded.stages] == [True, True, False]
    assert all("unused" not in s.params for s in crowded.stages)
    for n, segment in enumerate(crowded.stages):
        assert {p for p in segment.params if p.startswith("blocks")} == {
            f"blocks.{n}.linear.{leaf}" for leaf in ("bias", "kernel")
        }


def test_an_auxiliary_loss_of_an_early_stage_joins_the_loss_of_the_last(crowded):
    assert [s.gives_total for s in crowded.stages] == [False, False, True]
    assert [s.gives_weight for s in crowded.stages] == [False, False, True]
    assert () in {v.aval.shape for _, v in crowded.stages[2].received}


def test_live_values_over_several_layers_travel_once_to_each_reader():
    found = segments_of(Skips, squares, [0, 0, 1, 2])
    for segment in found.stages:
        assert len(segment.received) == len(set(segment.received))
    assert [stage for stage, _ in found.stages[2].received] == [0, 1]


def test_a_counter_of_keys_is_advanced_by_every_stage_for_itself():
    found = segments_of(OneStream, squares, [0, 1, 2])
    assert found.counters
    for n, segment in enumerate(found.stages):
        assert not segment.local
        assert segment.counters
        assert reads_of(segment) == segment.counters
        assert all(jnp.issubdtype(v.aval.dtype, jnp.floating) for _, v in segment.received)
        assert bool(segment.again) == (n > 0)
    rest = found.program
    count = next(name for name in found.counters if "count" in name)
    start = {
        name: jnp.zeros(v.aval.shape, v.aval.dtype)
        for v, (kind, name) in zip(rest.closed.jaxpr.invars, rest.inputs, strict=True)
        if kind == "rest" and not jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.prng_key)
    } | {name: jax.random.key(0) for name in found.counters if name != count}
    assert int(found.advance(start)[count]) == 3


def test_statistics_that_data_changes_belong_to_the_stage_of_their_layer():
    found = segments_of(TwoNormed, squares, [0, 1])
    assert not set(found.counters) & {name for s in found.stages for name in s.local}
    for n, segment in enumerate(found.stages):
        assert segment.local == (f"blocks.{n}.norm.mean", f"blocks.{n}.norm.var")


def test_statistics_of_two_stages_are_refused_in_words():
    with pytest.raises(PlanError, match=r"variable norm\.(mean|var) is read or changed by layers"):
        segments_of(OneNorm, squares, [0, 1])
    assert segments_of(OneNorm, squares, [0, 0]).stages[0].local == ("norm.mean", "norm.var")


def test_a_layer_before_what_it_reads_is_refused_in_words():
    with pytest.raises(
        PlanError,
        match=r"layer blocks\[1\] is in stage 0 but reads what stage 1 computes; put it there",
    ):
        segments_of(Skips, squares, [1, 0, 1, 1])


def test_a_penalty_on_parameters_runs_where_it_is_added():
    def penalised(model, batch):
        return squares(model, batch) + sum(
            jnp.sum(block.linear.kernel[...] ** 2) for block in model.blocks
        )

    found = segments_of(Skips, penalised, [0, 0, 1, 1])
    assert {f"blocks.{n}.linear.kernel" for n in range(4)} <= set(found.stages[1].params)
    assert "blocks.2.linear.kernel" not in found.stages[0].params


def test_the_stages_in_turn_compute_what_the_whole_program_does(crowded):
    program = crowded.program
    random = np.random.default_rng(0)
    args = [
        jnp.asarray(random.normal(size=v.aval.shape), v.aval.dtype)
        for v in program.closed.jaxpr.invars
    ]
    expected = jax.core.eval_jaxpr(program.closed.jaxpr, program.closed.consts, *args)
    given = dict(zip(program.closed.jaxpr.invars, args, strict=True))
    consts = dict(zip(program.closed.jaxpr.constvars, program.closed.consts, strict=True))
    sent = {}
    env = {}
    for n, segment in enumerate(crowded.stages):
        reads = {"params": segment.params, "batch": segment.batch, "rest": reads_of(segment)}
        env = {
            v: given[v]
            for v, (kind, name) in zip(program.closed.jaxpr.invars, program.inputs, strict=True)
            if name in reads[kind]
        } | consts
        env |= {v: sent[stage, v] for stage, v in segment.received}
        again = {one.position: one for one in segment.again}
        for position, eqn in enumerate(program.closed.jaxpr.eqns):
            if position in again:
                one = again[position]
                env.update(zip(one.outputs, one.function(*(env[v] for v in one.inputs)),
                               strict=True))  # fmt: skip
            elif position in segment.positions:
                env |= run_equation(
                    program.closed, eqn, lambda v, env=env: v.val if is_literal(v) else env[v]
                )
        sent |= {(n, v): env[v] for v in segment.sent}
    np.testing.assert_allclose(
        float(env[program.closed.jaxpr.outvars[0]]), float(expected[0]), rtol=1e-6
    )
