"""Processes on Ray: the losses of one program, and nothing lost or doubled by SIGKILL."""

from __future__ import annotations

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shardpar.errors import ConfigError, DataError, PlanError
from shardpar.ps.cache import CacheOptions
from shardpar.ps.consistency import ASP, BSP, SSP
from shardpar.ps.embed import Embed
from shardpar.ps.initializers import Zeros
from shardpar.ps.optimizers import SGD
from tests.ps.clicks import OPTIMIZER, ROWS, Clicks, batch_of, joint_batch, loss

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

from shardpar.ps.cluster import Cluster, ClusterOptions  # noqa: E402
from shardpar.ps.program import SparseProgram  # noqa: E402
from shardpar.ps.ray_start import start_ray  # noqa: E402

# Two of Ray's heads that start at once on two cores may wait for each other too long.
pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module", autouse=True)
def _ray():
    start_ray(num_cpus=1, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


class Counting(nnx.Module):
    """Its loss is minus the sum of the rows of the batch, so that SGD adds to each of them."""

    def __init__(self, rngs):
        self.count = Embed(12, 2, optimizer=SGD(1.0), init=Zeros(), rngs=rngs)
        self.unused = nnx.Param(jnp.zeros(1))

    def __call__(self, ids):
        return self.count(ids)


def minus_the_sum(model, batch):
    return -model(batch["ids"]).sum() + 0 * model.unused[...].sum(), jnp.float32(1)


def counted_ids(worker, step):
    """Four ids of each step; none twice."""
    random = np.random.default_rng([worker, step])
    return {"ids": random.permutation(12)[:4].astype(np.int32)}


def killed(pid):
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_server_and_a_killed_worker_lose_nothing_and_double_nothing(tmp_path):
    options = ClusterOptions(tmp_path, consistency=SSP(2), snapshot_every=9)
    steps, due = 30, {}
    with Cluster(
        minus_the_sum, Counting, optax.sgd(0.1), batch=counted_ids(0, 0), data=counted_ids,
        options=options,
    ) as cluster:  # fmt: skip
        pids = [state["pid"] for state in cluster.states()]
        due = {6: pids[1], 14: cluster.worker_pids()[0]}

        def watch(clocks):
            for at in [at for at in due if min(clocks) >= at]:
                killed(due.pop(at))

        done = cluster.train(steps, watch)
        assert not due
        assert done.worker_restarts == 1
        assert done.most_ahead <= 2
        expected = np.zeros(12)
        for worker in (0, 1):
            for step in range(steps):
                expected[counted_ids(worker, step)["ids"]] += 1
        rows = cluster.rows("count", np.arange(12))
        np.testing.assert_array_equal(rows, np.stack([expected, expected], axis=1))
        states = cluster.states()
        assert [state["taken"] for state in states] == [2 * steps] * 2
        assert states[0]["pid"] == pids[0]
        assert states[1]["pid"] != pids[1]
        # A function of the rows runs where they are.
        assert float(cluster.get("count", lambda rows, ids: rows.sum(), "sum")) == rows.sum()
        cluster.update("count", lambda rows, ids: rows + ids[:, None])
        np.testing.assert_array_equal(
            cluster.rows("count", np.arange(12)), rows + np.arange(12)[:, None]
        )


def scores(model, batch):
    return model(batch["ids"])


def good_for_five_steps(worker, step):
    batch = batch_of(worker, step)
    return batch if step < 5 else batch | {"ids": batch["ids"] + ROWS}


def test_what_keeps_a_worker_from_starting_is_raised_and_not_tried_again(tmp_path):
    waiting = ClusterOptions(
        tmp_path, servers=1, workers=1, consistency=SSP(2), cache=CacheOptions(20, push_bound=2)
    )
    with (
        Cluster(
            loss, Clicks, OPTIMIZER, batch=batch_of(0, 0), data=batch_of, options=waiting
        ) as it,
        pytest.raises(PlanError, match="updates by LazyAdam cannot wait in a cache"),
    ):
        it.train(1)


@pytest.mark.slow
def test_lockstep_gives_the_losses_of_one_program_and_what_a_worker_raises_is_raised(tmp_path):
    program = SparseProgram(
        loss, Clicks, OPTIMIZER, batch=joint_batch(0, 2), devices=jax.devices()[:1]
    )
    state, expected = program.init(5), []
    for step in range(5):
        state, metrics = program.step(state, joint_batch(step, 2))
        expected.append(float(metrics["loss"]))
    options = ClusterOptions(tmp_path, servers=1, cache=CacheOptions(20))
    with Cluster(
        loss,
        Clicks,
        OPTIMIZER,
        batch=batch_of(0, 0),
        data=good_for_five_steps,
        options=options,
        seed=5,
    ) as cluster:
        stopped = cluster.train(5, lambda clocks: min(clocks) >= 1)
        assert 1 <= stopped.steps == cluster.steps <= 5
        done = cluster.train(5)
        np.testing.assert_allclose(done.losses, expected, rtol=2e-6)
        assert cluster.losses(3) == dict(enumerate(done.losses[3:], 3))
        assert done.most_ahead == 0
        found = cluster.apply(batch_of(1, 7), scores)
        np.testing.assert_allclose(found, program.apply(state, batch_of(1, 7), scores), atol=2e-6)
        dense = cluster.dense()
        with pytest.raises(DataError, match=rf"rows 0 to {ROWS - 1}, but id"):
            cluster.train(6)
    for name, x in state.dense.items():
        np.testing.assert_allclose(dense[name], x, atol=2e-6)


@pytest.mark.parametrize(
    "bad", [{"servers": 0}, {"delay_scaled": True, "consistency": BSP},
            {"delay_scaled": True, "consistency": ASP, "cache": CacheOptions(9, 1, 1)}],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(tmp_path, bad):
    with pytest.raises(ConfigError):
        ClusterOptions(tmp_path, **bad)
