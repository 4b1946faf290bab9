"""A server in a process of its own that a test kills: every push adds 1 to each of three rows.

Run as `python -m tests.ps.counting_server DIRECTORY`; says "taken N" after each acknowledgement.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from shardpar.ps.initializers import Zeros
from shardpar.ps.messages import PullRequest, Push, RowsRequest, RowsUpdate
from shardpar.ps.optimizers import SGD
from shardpar.ps.server import Durability, Server
from shardpar.ps.shard import ShardSpec
from shardpar.ps.table import Table

IDS = np.array([1, 5, 8])


def counter_spec(**changes) -> ShardSpec:
    """Tables whose rule adds the gradient; all 1 here."""
    key = jax.random.key_data(jax.random.key(0))
    return ShardSpec({"count": Table(10, 2, SGD(-1.0), Zeros())}, {"count": key}, **changes)


def one_more(sequence: int, worker: int = 0, ids: np.ndarray = IDS) -> Push:
    """An update that adds 1 to some rows."""
    ones = np.ones((ids.size, 2), np.float32)
    update = RowsUpdate(ids, (ones,), np.ones(ids.size, np.int64))
    return Push(worker, sequence, sequence, weight=1.0, loss=0.0, rows={"count": update})


def counted(server: Server, ids: np.ndarray = IDS) -> list[float]:
    """What the rows have counted to; both columns must agree."""
    rows = server.pull(PullRequest({"count": RowsRequest(ids)})).rows["count"].pieces[0]
    assert (rows[:, 0] == rows[:, 1]).all()
    return rows[:, 0].tolist()


def main(directory: Path) -> None:
    server = Server(counter_spec(), Durability(directory, snapshot_every=7))
    sequence = server.position(0).pushes
    while True:
        server.push(one_more(sequence))
        sequence += 1
        print("taken", sequence, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
