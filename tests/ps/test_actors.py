"""The clock holds workers back exactly as far as their bound says, and sees who is slow."""

from __future__ import annotations

import asyncio

import pytest

from shardpar.errors import CheckpointError
from shardpar.ps.actors import ClockActor, ServerActor
from shardpar.ps.consistency import ASP, BSP, SSP
from shardpar.ps.server import Durability, Server
from tests.ps.counting_server import counter_spec


async def steps_alone(bound, *, tries=6):
    """How many steps worker 0 starts while worker 1 does nothing; and the clock."""
    clock = ClockActor((0, 0), bound)
    for step in range(tries):
        start = asyncio.ensure_future(clock.start(0, step))
        for _ in range(5):
            await asyncio.sleep(0)
        if not start.done():
            return step, clock, start
        await clock.finished(0, step + 1, 1.0, 1.0, 0.1, 1)
    return tries, clock, None


@pytest.mark.parametrize(("bound", "alone"), [(BSP, 1), (SSP(3), 4), (ASP, 6)])
def test_a_worker_starts_as_many_steps_as_its_bound_allows_and_goes_on_when_the_other_does(
    bound, alone
):
    async def run():
        started, clock, waiting = await steps_alone(bound)
        assert started == alone
        if waiting is not None:
            await clock.finished(1, 1, 1.0, 1.0, 0.1, 1)
            await asyncio.wait_for(waiting, 10)
            assert (await clock.report())["most_ahead"] == alone - 1

    asyncio.run(run())


def test_a_clock_that_was_killed_learns_from_those_who_wait():
    async def run():
        clock = ClockActor((0, 0), SSP(1))
        waiting = asyncio.ensure_future(clock.start(0, 7))
        await asyncio.sleep(0)
        assert not waiting.done()
        await asyncio.wait_for(clock.start(1, 6), 10)
        await asyncio.wait_for(waiting, 10)
        # One that is done asks for nothing more; the driver says so for it.
        assert await clock.steps({1: 9}) == (7, 9)

    asyncio.run(run())


@pytest.mark.parametrize(("bound", "more"), [(BSP, True), (SSP(3), False), (ASP, False)])
def test_told_to_stop_in_lockstep_all_finish_what_one_has_begun(bound, more):
    async def run():
        clock = ClockActor((0, 0), bound)
        assert await clock.start(0, 0)
        await clock.stop()
        assert await clock.start(1, 0) == more
        for worker in (0, 1):
            await clock.finished(worker, 1, 1.0, 1.0, 0.1, 1)
        # Also whoever waits for others.
        assert not await asyncio.wait_for(clock.start(0, 1), 10)
        assert not await clock.start(1, 1)
        await clock.go()
        assert await clock.start(0, 1)

    asyncio.run(run())


def test_who_waits_for_the_others_is_told_to_stop():
    async def run():
        clock = ClockActor((1, 0), SSP(0))
        waiting = asyncio.ensure_future(clock.start(0, 1))
        await asyncio.sleep(0)
        assert not waiting.done()
        await clock.stop()
        assert not await asyncio.wait_for(waiting, 10)

    asyncio.run(run())


def test_losses_are_by_step_and_slow_workers_are_named():
    async def run():
        clock = ClockActor((0, 0, 0), ASP)
        for worker, time_s in enumerate((1.0, 1.0, 4.0)):
            await clock.finished(worker, 1, 2.0 * worker, 8.0, time_s, 10)
        return await clock.report()

    report = asyncio.run(run())
    assert report["slow"] == (2,)
    assert report["seconds_per_sample"] == pytest.approx({0: 0.1, 1: 0.1, 2: 0.4})
    assert report["losses"] == {0: {0: (0.0, 8.0), 1: (2.0, 8.0), 2: (4.0, 8.0)}}


def test_a_server_that_cannot_start_says_why_when_it_is_asked(tmp_path):
    Server(counter_spec(), Durability(tmp_path)).close()
    actor = ServerActor(counter_spec(workers=3), Durability(tmp_path))
    with pytest.raises(CheckpointError, match="written by another server"):
        actor.position(0)
