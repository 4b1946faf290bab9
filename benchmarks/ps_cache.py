"""What a worker's cache saves: rows over the wire, and AUC, against no cache, in one run.

    python -m benchmarks.ps_cache [--quick]

Servers and workers are in this process (the counts are the same as in others). A
factorisation machine of 9 numbers a row learns clicks whose ids are Zipf-distributed within
each field, workers in turns. "remote rows" are rows pulled plus rows pushed; the cache's
own questions (an id and a version for each row of a step) are not rows.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from shardpar.ps.cache import CachedRows, CacheOptions
from shardpar.ps.client import Client, LocalServers
from shardpar.ps.consistency import ASP
from shardpar.ps.embed import Embed
from shardpar.ps.initializers import Columns, Normal, Zeros
from shardpar.ps.optimizers import AdaGrad
from shardpar.ps.placement import Placement
from shardpar.ps.server import Server
from shardpar.ps.shard import Dense, ShardSpec
from shardpar.ps.worker import Worker, WorkerProgram

FIELDS, VOCABULARY, FACTORS = 10, 5000, 8
ROWS = FIELDS * VOCABULARY
EXPONENT = 1.1
SERVERS = 2


class FM(nnx.Module):
    """Rendle's factorisation machine; column 0 of a row is the weight."""

    def __init__(self, rngs: nnx.Rngs, learning_rate: float) -> None:
        begin = Columns(((Zeros(), 1), (Normal(0.05), FACTORS)))
        self.embed = Embed(
            ROWS, 1 + FACTORS, optimizer=AdaGrad(learning_rate), init=begin, rngs=rngs
        )
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, ids):
        rows = self.embed(ids)
        return fm(rows[..., 0], rows[..., 1:]) + self.bias[...]


def fm(weights, factors):
    pairs = (factors.sum(axis=-2) ** 2 - (factors**2).sum(axis=-2)).sum(axis=-1)
    return weights.sum(axis=-1) + 0.5 * pairs


def loss(model, batch):
    each = optax.sigmoid_binary_cross_entropy(model(batch["ids"]), batch["label"])
    return each.sum(), jnp.float32(each.size)


def clicks(samples: int, seed: int) -> dict[str, np.ndarray]:
    """Ids by Zipf's law in each field; labels from planted weights and factors."""
    truth = np.random.default_rng(0)
    weight = truth.normal(0, 0.35, ROWS)
    factor = truth.normal(0, 0.12, (ROWS, 4))
    random = np.random.default_rng([1, seed])
    p = 1 / np.arange(1, VOCABULARY + 1) ** EXPONENT
    edges = np.cumsum(p / p.sum())
    place = np.searchsorted(edges, random.random((samples, FIELDS))).clip(max=VOCABULARY - 1)
    ids = (place + np.arange(FIELDS) * VOCABULARY).astype(np.int32)
    logit = fm(weight[ids], factor[ids]) - 0.5
    label = (random.random(samples) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    return {"ids": ids, "label": label, "logit": logit}


def auc(score: np.ndarray, label: np.ndarray) -> float:
    rank = np.empty(score.size)
    rank[np.argsort(score, kind="stable")] = np.arange(1, score.size + 1)
    good = label.sum()
    return float((rank[label > 0].sum() - good * (good + 1) / 2) / (good * (score.size - good)))


@dataclass(frozen=True)
class Row:
    name: str
    remote_share: float
    pulled_share: float
    pushed_share: float
    auc: float
    cpu_s: float


def run(name, cache, program, data, test, *, batch: int, workers: int, seed: int) -> Row:
    count = workers
    steps = data["label"].size // (batch * count)

    def batch_of(worker: int, step: int) -> dict[str, np.ndarray]:
        at = (step * count + worker) * batch
        return {key: data[key][at : at + batch] for key in ("ids", "label")}

    begin = program.begin(seed)
    placement = Placement(rows=SERVERS)
    servers = LocalServers(
        tuple(
            Server(
                ShardSpec(
                    program.tables, begin.keys, placement, index, count, ASP,
                    Dense(begin.dense, optax.adagrad(0.05)) if index == 0 else None,
                )
            )
            for index in range(SERVERS)
        )
    )  # fmt: skip
    clients = [Client(w, servers, program.tables, placement) for w in range(count)]
    rows = [CachedRows(c, cache) if cache else c for c in clients]
    workers = [Worker(w, program, begin.rest, rows[w], batch_of) for w in range(count)]
    began_s = time.process_time()
    for step in range(steps):
        for worker in workers:
            worker.run(step)
    for each in rows:
        each.flush()
    cpu_s = time.process_time() - began_s
    final = Client(0, servers, program.tables, placement)
    table, dense = final.pull({"embed": np.arange(ROWS)})
    taken = table["embed"][test["ids"]]
    score = fm(taken[..., 0], taken[..., 1:]) + dense["bias"]
    asked = sum(c.traffic.asked for c in clients)
    pulled = sum(c.traffic.pulled for c in clients)
    pushed = sum(c.traffic.pushed for c in clients)
    return Row(
        name, (pulled + pushed) / (2 * asked), pulled / asked, pushed / asked,
        auc(score, test["label"]), cpu_s,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256, help="of each worker")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--only", nargs="*", help="some of the setups")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    samples = 30_000 if given.quick else 300_000
    seeds = 1 if given.quick else given.seeds
    test = clicks(50_000, 999)
    tenth = ROWS // 10
    setups = {
        "no cache": None,
        "bound 0": CacheOptions(ROWS),
        "bound 5": CacheOptions(ROWS, 5, 5),
        "bound 5, cache 10% LRU": CacheOptions(tenth, 5, 5, "lru"),
        "bound 5, cache 10% LFU": CacheOptions(tenth, 5, 5, "lfu"),
        "bound 20": CacheOptions(ROWS, 20, 20),
    }
    if given.only:
        setups = {name: cache for name, cache in setups.items() if name in given.only}
    jax.config.update("jax_platforms", "cpu")
    size = given.batch
    shapes = {"ids": np.zeros((size, FIELDS), np.int32), "label": np.zeros(size, np.float32)}
    program = WorkerProgram(loss, partial(FM, learning_rate=given.learning_rate), batch=shapes)
    found: dict[str, list[Row]] = {name: [] for name in setups}
    for seed in range(seeds):
        data = clicks(samples, seed)
        for name, cache in setups.items():
            one = run(
                name, cache, program, data, test, batch=size, workers=given.workers, seed=seed
            )
            found[name].append(one)
            print(one, flush=True)
    print(f"{samples} samples, {FIELDS} fields, {ROWS} rows, Zipf {EXPONENT}, batch {given.batch}")
    print(f"x {given.workers} workers, {SERVERS} servers, AdaGrad {given.learning_rate}")
    print(f"{seeds} seeds", end="; the best ")
    print(f"possible AUC is {auc(test['logit'], test['label']):.4f}")
    print("setup                   remote rows  pulled  pushed     AUC  AUC - none  CPU-s")
    base = np.mean([row.auc for row in found["no cache"]])
    for name, rows in found.items():
        mean = {
            key: np.mean([getattr(row, key) for row in rows])
            for key in ("remote_share", "pulled_share", "pushed_share", "auc", "cpu_s")
        }
        print(
            f"{name:<24}{mean['remote_share']:>10.1%}{mean['pulled_share']:>8.1%}"
            f"{mean['pushed_share']:>8.1%}{mean['auc']:>8.4f}{mean['auc'] - base:>+12.4f}"
            f"{mean['cpu_s']:>7.1f}"
        )


if __name__ == "__main__":
    main()
