"""Switches between plans while training runs: nothing changes but where things lie."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from shardpar.errors import PlanError
from shardpar.lowering import transfer
from shardpar.lowering.switch import Programs
from shardpar.lowering.transfer import Transfer
from tests.lowering.test_pipelined import (
    SIZES,
    bits_of,
    chunks,
    compiled_during,
    host,
    net,
    net_batches,
    net_plan,
    one_device,
    pair,
    unequal,
)
from tests.lowering.tiny import batches, captured, uniform

PLANS = (uniform(1), pair(), unequal(), uniform(4, fsdp=("a",), tensor=("b",)), chunks())


@pytest.fixture(scope="module")
def programs():
    return Programs(captured(dropout=0.1, **SIZES), optax.adamw(3e-3))


def bits(program, tree, homes=None):
    saved = (homes or program.homes).first_copies(tree)
    return [host(x).tobytes() for x in jax.tree.leaves(saved)]


@pytest.mark.slow
def test_every_leaf_is_the_same_bit_for_bit_after_each_switch(programs):
    program = programs.program(PLANS[0])
    state = program.init(0)
    before = bits(program, state)
    for plan in (*PLANS[1:], *PLANS, *PLANS):
        switched = programs.switch(program, state, plan)
        program, state = switched.program, switched.state
        assert bits(program, state) == before
    known = len(programs._programs), len(programs._moves)
    for plan in PLANS:
        switched = programs.switch(program, state, plan)
        program, state = switched.program, switched.state
    assert (len(programs._programs), len(programs._moves)) == known


@pytest.mark.slow
def test_a_run_that_switches_has_the_losses_of_one_that_does_not():
    programs = Programs(captured(**SIZES), optax.adamw(3e-3))
    calm = programs.program(PLANS[0])
    state, expected = calm.init(0), []
    for batch in batches(5):
        state, metrics = calm.step(state, batch)
        expected.append(float(metrics["loss"]))
    program, state, seen = calm, calm.init(0), []
    for plan, batch in zip((PLANS[1], PLANS[2], PLANS[0], PLANS[1]), batches(4), strict=True):
        switched = programs.switch(program, state, plan)
        program = switched.program
        state, metrics = program.step(switched.state, batch)
        seen.append(float(metrics["loss"]))
    np.testing.assert_allclose(seen, expected[:4], rtol=2e-5)


@pytest.mark.slow
def test_what_a_step_has_gathered_moves_with_the_state_and_is_applied_once():
    programs = Programs(captured(**SIZES), optax.adamw(3e-3))
    one, other = batches(2)
    calm = programs.program(PLANS[0])
    state = calm.init(0)
    gathered = calm.accumulate(state, other, calm.accumulate(state, one))
    expected, metrics = calm.apply(state, gathered)

    state = calm.init(0)
    gathered = calm.accumulate(state, one)
    switched = programs.switch(calm, state, PLANS[1], gathered)
    program = switched.program
    gathered = program.accumulate(switched.state, other, switched.gathered)
    got, found = program.apply(switched.state, gathered)
    for name in ("loss", "grad_norm", "weight"):
        np.testing.assert_allclose(float(found[name]), float(metrics[name]), rtol=2e-6)
    for name, value in program.to_saved(got).params.items():
        np.testing.assert_allclose(host(value), host(expected.params[name]), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_gradients_under_plans_that_do_not_own_the_state_are_those_of_an_unswitched_step():
    programs = Programs(captured(**SIZES), optax.adamw(3e-3))
    owner = programs.program(PLANS[1])
    state, gathered = owner.init(0), None
    for plan, batch in zip((PLANS[1], PLANS[0], PLANS[3]), batches(3), strict=True):
        gathered = programs.accumulate(owner, state, plan, batch, gathered)
    _, found = owner.apply(state, gathered)
    calm = programs.program(PLANS[0])
    state, gathered = calm.init(0), None
    for batch in batches(3):
        gathered = calm.accumulate(state, batch, gathered)
    _, metrics = calm.apply(state, gathered)
    for name in ("loss", "grad_norm", "weight"):
        np.testing.assert_allclose(float(found[name]), float(metrics[name]), rtol=2e-6)


def test_a_switch_that_fails_leaves_the_old_state_as_it_was(programs, monkeypatch):
    program = programs.program(PLANS[0])
    state = program.init(0)
    before = bits(program, state)

    def broken(*_, **__):
        raise RuntimeError("a link is down")

    monkeypatch.setattr(Transfer, "__call__", broken)
    with pytest.raises(RuntimeError, match="a link is down"):
        programs.switch(program, state, PLANS[1])
    monkeypatch.undo()
    assert bits(program, state) == before
    program.step(state, batches(1)[0])


SMALL = (
    one_device(3, 4),
    net_plan(3, 4),
    net_plan(3, 4, first=4, shares=(4, 4), cut_at=2),
    net_plan(3, 4, first=1, cut_at=2),
)
"""Plans of equal micro-batches, so that a model with dropout draws alike under all of them."""


@pytest.fixture(scope="module")
def small():
    """Programs of a little net whose layers draw from one stream of keys."""
    return Programs(net("one stream of keys through all layers")[0], optax.adamw(1e-2))


def gathered_bits(program, gathered):
    return bits(program, gathered, program.gathered_homes)


def test_a_run_that_switches_after_every_step_draws_the_keys_of_one_that_does_not(small):
    calm = small.program(SMALL[0])
    expected = calm.init(0)
    program, state = calm, calm.init(0)
    for n, batch in enumerate(net_batches(6)):
        switched = small.switch(program, state, SMALL[(n + 1) % len(SMALL)])
        program = switched.program
        state, found = program.step(switched.state, batch)
        expected, metrics = calm.step(expected, batch)
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(float(found[name]), float(metrics[name]), rtol=1e-5)
    saved = program.to_saved(state)
    for name, value in expected.rest.items():
        assert host(saved.rest[name]).tobytes() == host(value).tobytes()


def test_every_copy_is_the_same_bit_for_bit_after_a_switch_in_the_middle_of_a_step(small):
    program = small.program(SMALL[0])
    state, _ = program.step(program.init(0), net_batches(1)[0])
    gathered = program.accumulate(state, net_batches(2)[1])
    before = bits(program, state), gathered_bits(program, gathered)
    for plan in (*SMALL[1:], *reversed(SMALL)):
        switched = small.switch(program, state, plan, gathered)
        program, state, gathered = switched.program, switched.state, switched.gathered
        assert (bits(program, state), gathered_bits(program, gathered)) == before
        for homes, tree in ((program.homes, state), (program.gathered_homes, gathered)):
            for path, union in homes.unions(tree).items():
                copies = {host(array).tobytes() for array in union.arrays}
                assert len(copies) == 1, path
    # It may be trained on, so every array is where the programs want it.
    _, metrics = program.apply(state, gathered)
    assert np.isfinite(float(metrics["loss"]))


def test_coming_back_to_a_plan_compiles_nothing(small):
    program = small.program(SMALL[0])
    state, batch = program.init(0), net_batches(1)[0]

    def around():
        nonlocal program, state
        for plan in (*SMALL[1:], SMALL[0]):
            switched = small.switch(program, state, plan)
            program = switched.program
            state, _ = program.step(switched.state, batch)
        return state

    around()
    around()
    assert compiled_during(around) == 0


def test_a_switch_to_the_plan_in_force_does_nothing(small):
    program = small.program(SMALL[1])
    state = program.init(0)
    switched = small.switch(program, state, SMALL[1])
    assert switched.program is program
    assert switched.state is state


@pytest.mark.parametrize("where", ["from_buffers", "_give_back"])
@pytest.mark.parametrize("start", [0, 2])
def test_a_fault_when_all_has_been_sent_leaves_the_old_state_and_can_be_tried_again(
    small, start, where, monkeypatch
):
    program = small.program(SMALL[start])
    state, _ = program.step(program.init(0), net_batches(1)[0])
    before = bits_of(state), bits(program, state)

    def broken(*_, **__):
        raise RuntimeError("a link is down")

    monkeypatch.setattr(transfer, where, broken)
    with pytest.raises(RuntimeError, match="a link is down"):
        small.switch(program, state, SMALL[1])
    monkeypatch.undo()
    assert bits_of(state) == before[0]
    state, _ = program.step(state, net_batches(2)[1])
    before = bits(program, state)
    switched = small.switch(program, state, SMALL[1])
    assert bits(switched.program, switched.state) == before


def test_a_plan_that_does_not_fit_is_refused_and_the_state_stays(small):
    program = small.program(SMALL[0])
    state = program.init(0)
    with pytest.raises(PlanError):
        small.switch(program, state, uniform(1))
    program.step(state, net_batches(1)[0])


@pytest.mark.parametrize("owner", range(len(SMALL)))
def test_batches_computed_under_other_plans_draw_the_keys_that_come_next(small, owner):
    program, calm = small.program(SMALL[owner]), small.program(SMALL[0])
    state, gathered = program.init(0), None
    still, expected = calm.init(0), None
    for plan, batch in zip(SMALL, net_batches(len(SMALL)), strict=True):
        gathered = small.accumulate(program, state, plan, batch, gathered)
        expected = calm.accumulate(still, batch, expected)
    for (path, one), other in zip(
        program.gathered_homes.unions(gathered).items(), jax.tree.leaves(expected), strict=True
    ):
        for copy in one.arrays:
            np.testing.assert_allclose(host(copy), host(other), rtol=1e-5, atol=1e-6, err_msg=path)
    _, found = program.apply(state, gathered)
    _, metrics = calm.apply(still, expected)
    for name in ("loss", "grad_norm", "weight"):
        np.testing.assert_allclose(float(found[name]), float(metrics[name]), rtol=2e-6)
