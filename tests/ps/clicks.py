"""A click model with two tables and a dense part, and its data: small, and learnable."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from shardpar.ps.client import Client, LocalServers
from shardpar.ps.consistency import BSP
from shardpar.ps.embed import Embed
from shardpar.ps.initializers import Normal, Zeros
from shardpar.ps.optimizers import AdaGrad, LazyAdam
from shardpar.ps.placement import Placement
from shardpar.ps.server import Server
from shardpar.ps.shard import Dense, ShardSpec
from shardpar.ps.worker import Worker, WorkerProgram

ROWS, FIELDS = 60, 3


class Clicks(nnx.Module):
    """Wide and deep."""

    def __init__(self, rngs: nnx.Rngs, deep_rule=None, wide_rule=None):
        self.wide = Embed(
            ROWS, 1, bag="sum", optimizer=wide_rule or AdaGrad(0.1), init=Zeros(), rngs=rngs
        )
        self.deep = Embed(
            ROWS, 4, optimizer=deep_rule or LazyAdam(0.02), init=Normal(0.3), rngs=rngs
        )
        self.out = nnx.Linear(4 * FIELDS, 1, rngs=rngs)

    def __call__(self, ids):
        deep = self.deep(ids).reshape(ids.shape[0], -1)
        return (self.wide(ids) + self.out(jnp.tanh(deep)))[:, 0]


def loss(model, batch):
    """Summed, with its weight."""
    each = optax.sigmoid_binary_cross_entropy(model(batch["ids"]), batch["label"])
    return (each * batch["weight"]).sum(), batch["weight"].sum()


OPTIMIZER = optax.adam(0.02)


def batch_of(worker: int, step: int, *, size: int = 8) -> dict[str, np.ndarray]:
    """The batch of a worker: some ids far more often than others, labels that follow from them."""
    random = np.random.default_rng([worker, step])
    ids = np.minimum(random.zipf(1.3, (size, FIELDS)) - 1, ROWS - 1).astype(np.int32)
    label = ((ids.sum(axis=1) % 5) < 2).astype(np.float32)
    weight = random.integers(1, 4, size).astype(np.float32)
    return {"ids": ids, "label": label, "weight": weight}


def joint_batch(step: int, workers: int) -> dict[str, np.ndarray]:
    """All workers' batches of a step as one."""
    parts = [batch_of(worker, step) for worker in range(workers)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def specs(program, beginning, *, servers=2, workers=2, consistency=BSP, **more):
    """What each server holds."""
    for index in range(servers):
        dense = Dense(beginning.dense, OPTIMIZER) if index == 0 else None
        yield ShardSpec(
            program.tables, beginning.keys, Placement(rows=servers), index, workers,
            consistency, dense, **more,
        )  # fmt: skip


def together(
    *, model=Clicks, workers=2, servers=2, seed=5, wrap=lambda client: client, **more
) -> tuple[LocalServers, list[Worker]]:
    """Servers and workers in this process; `wrap` puts a cache before a client."""
    program = WorkerProgram(loss, model, batch=batch_of(0, 0))
    beginning = program.begin(seed)
    made = LocalServers(
        tuple(map(Server, specs(program, beginning, servers=servers, workers=workers, **more)))
    )
    clients = [
        wrap(Client(worker, made, program.tables, Placement(rows=servers)))
        for worker in range(workers)
    ]
    return made, [
        Worker(number, program, beginning.rest, client, batch_of)
        for number, client in enumerate(clients)
    ]


def tables_of(servers: LocalServers, worker: Worker) -> dict[str, np.ndarray]:
    """All rows as they are on the servers, and the dense parameters."""
    client = Client(0, servers, worker.program.tables, Placement(rows=len(servers.servers)))
    rows, dense = client.pull({name: np.arange(ROWS) for name in worker.program.tables})
    return rows | dense


def plain_clicks(rule) -> object:
    """The model with one rule for both tables."""
    return partial(Clicks, deep_rule=rule, wide_rule=rule)


def key_data(seed: int) -> np.ndarray:
    """Of a key."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))
