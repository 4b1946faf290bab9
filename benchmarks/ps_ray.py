"""Servers and workers on Ray: updates per second, and how long a killed server is away.

    python -m benchmarks.ps_ray [--steps 200] [--batch 256]

Two servers, two workers and the clock are processes of this machine; the model and data are
those of `benchmarks.ps_cache`. An update is one worker's step, acknowledged by both servers.
Recovery is from SIGKILL to the first answer: Ray's new process, imports, snapshot, log.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import optax
import ray

from benchmarks.ps_cache import FIELDS, FM, clicks, loss
from shardpar.ps.cache import CacheOptions
from shardpar.ps.cluster import Cluster, ClusterOptions
from shardpar.ps.consistency import ASP, BSP, SSP
from shardpar.ps.messages import PullRequest, RowsRequest


def batch_of(worker: int, step: int, *, batch: int) -> dict[str, np.ndarray]:
    data = clicks(batch, 1000 * worker + step + 1)
    return {"ids": data["ids"], "label": data["label"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of each worker")
    parser.add_argument("--batch", type=int, default=256, help="of each worker")
    parser.add_argument("--warm", type=int, default=30, help="steps before, for compiling")
    given = parser.parse_args()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    data = partial(batch_of, batch=given.batch)
    shapes = {
        "ids": np.zeros((given.batch, FIELDS), np.int32),
        "label": np.zeros(given.batch, np.float32),
    }
    cases = {
        "BSP": {"consistency": BSP},
        "SSP(3)": {"consistency": SSP(3)},
        "ASP": {"consistency": ASP},
        "ASP, fsync each": {"consistency": ASP, "fsync": "each"},
        "ASP, cache bound 5": {"consistency": ASP, "cache": CacheOptions(50_000, 5, 5)},
    }
    print("| case | updates/s | row updates/s | rows over the wire / asked | load |", flush=True)
    print("|---|---|---|---|---|")
    for name, changes in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            options = ClusterOptions(Path(folder), **changes)
            with Cluster(
                loss, partial(FM, learning_rate=0.02), optax.adagrad(0.02), batch=shapes,
                data=data, options=options,
            ) as cluster:  # fmt: skip
                before = cluster.train(given.warm)
                done = cluster.train(given.warm + given.steps)
                asked = done.asked - before.asked
                moved = done.pulled + done.pushed - before.pulled - before.pushed
                print(
                    f"| {name} | {options.workers * given.steps / done.wall_s:.0f} "
                    f"| {asked / done.wall_s:.0f} | {moved / (2 * asked):.2f} "
                    f"| {os.getloadavg()[0]:.0f} |",
                    flush=True,
                )
                if name == "ASP":
                    recovery(cluster)


def recovery(cluster: Cluster) -> None:
    """Kills server 1 and asks it until it answers."""
    before = cluster.states()[1]
    os.kill(before["pid"], signal.SIGKILL)
    began_s = time.perf_counter()
    empty = PullRequest({"embed": RowsRequest(np.zeros(0, np.int64))})
    cluster.servers.pull([empty] * 2)
    away_s = time.perf_counter() - began_s
    after = cluster.states()[1]
    assert after["taken"] == before["taken"]
    print(
        f"server 1 killed: answers after {away_s:.1f} s, {after['replayed']} updates played "
        f"from its log, {after['taken']} of {before['taken']} acknowledged updates there",
        flush=True,
    )


if __name__ == "__main__":
    main()
