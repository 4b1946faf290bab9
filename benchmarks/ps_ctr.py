"""Click models over tables beside torch's sparse embeddings: CPU-seconds of an epoch, and AUC.

    python -m benchmarks.ps_ctr [--samples N] [--seeds N] [--json]

A generated click log of 39 fields over 2^20 ids, batches of 4096, one epoch, AdaGrad of rate
0.05 on everything. Both sides see the same batches in the same order, models of the same shape
and the same kind of beginning, and take turns within one process. CPU-seconds are those of the
whole process, compiling left out; finding distinct ids on the host is in. Also: the step of
growing tables, and four virtual devices against one, in a process of its own, since devices
that wait for each other need more threads than one device alone is well served with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import optax

from shardpar import ps
from shardpar.lowering.allocator import keep_freed_memory
from shardpar.lowering.devices import use_virtual_devices
from shardpar.ps.algorithms import deepfm, fm, linear
from shardpar.ps.data.clicks import ClickLog
from shardpar.ps.loop import arrays_of
from shardpar.ps.metrics import auc
from shardpar.ps.rules import with_rule

FIELDS, ROWS, BATCH, RATE, HIDDEN = 39, 1 << 20, 4096, 0.05, (64, 32)

Batches = list[dict[str, np.ndarray]]


def log(samples: int, test: int) -> tuple[Batches, Batches]:
    """The batches of training and of the test, made beforehand."""

    def cut(made: ClickLog) -> Batches:
        whole = made.samples // BATCH * BATCH
        return [arrays_of(made.batch(at, at + BATCH)) for at in range(0, whole, BATCH)]

    return cut(ClickLog(samples)), cut(ClickLog(test, first=1 << 40))


def model_of(name: str, rows: int = ROWS) -> tuple[Any, Any]:
    """The model file and its options."""
    if name == "lr":
        return linear, linear.LinearOptions(rows=rows)
    if name == "fm":
        return fm, fm.FMOptions(rows=rows, factors=8)
    return deepfm, deepfm.DeepFMOptions(rows=rows, fields=FIELDS, factors=16, hidden=HIDDEN)


def program_of(name: str, batch: dict[str, Any], devices: int, rows: int = ROWS) -> Any:
    """The model as a program, and its file."""
    file, options = model_of(name, rows)
    program = ps.SparseProgram(
        file.loss,
        lambda rngs: with_rule(file.build(options, rngs), ps.AdaGrad(RATE)),
        optax.adagrad(RATE, initial_accumulator_value=0.0, eps=1e-10),
        batch=batch,
        devices=jax.devices()[:devices],
    )
    return program, file


def ours(name: str, train: Batches, test: Batches, seed: int, devices: int = 1) -> dict[str, Any]:
    """An epoch of shardpar."""
    program, file = program_of(name, train[0], devices)
    state = program.init(seed)
    # The first step compiles; its state is thrown away.
    state, _ = program.step(state, train[0])
    jax.block_until_ready(state)
    state = program.init(seed)
    jax.block_until_ready(state)
    begun = time.process_time()
    losses = []
    for batch in train:
        state, metrics = program.step(state, batch)
        losses.append(metrics["loss"])
    jax.block_until_ready(state)
    cpu_s = time.process_time() - begun
    found = np.concatenate([np.asarray(program.apply(state, b, file.predict)) for b in test])
    labels = np.concatenate([b["labels"] for b in test])
    return {"cpu_s": cpu_s, "auc": auc(labels, found), "losses": [float(x) for x in losses]}


def torchs(name: str, train: Batches, test: Batches, seed: int) -> dict[str, Any]:
    """An epoch of torch, as its documentation has sparse models: sparse gradients, Adagrad."""
    import torch

    torch.manual_seed(seed)
    width = {"lr": 1, "fm": 9, "deepfm": 17}[name]
    table = torch.nn.Embedding(ROWS, width, sparse=True)
    with torch.no_grad():
        table.weight.normal_(0, 0.01)
        table.weight[:, 0] = 0
    bias = torch.nn.Parameter(torch.zeros(()))
    layers: list[Any] = []
    if name == "deepfm":
        widths = [FIELDS * 16, *HIDDEN]
        for a, b in pairwise(widths):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
        layers.append(torch.nn.Linear(widths[-1], 1))
    network = torch.nn.Sequential(*layers)
    rows = torch.optim.Adagrad(table.parameters(), lr=RATE)
    dense = torch.optim.Adagrad([bias, *network.parameters()], lr=RATE)

    def scores(batch: dict[str, np.ndarray]) -> Any:
        values = torch.from_numpy(np.array(batch["values"]))[..., None]
        found = table(torch.from_numpy(batch["ids"].astype(np.int64))) * values
        total = found.sum(1)
        out = total[:, 0] + bias
        if width > 1:
            pairs = total[:, 1:] ** 2 - (found[..., 1:] ** 2).sum(1)
            out = out + 0.5 * pairs.sum(1)
        if name == "deepfm":
            out = out + network(found[..., 1:].reshape(len(found), -1))[:, 0]
        return out

    cost = torch.nn.BCEWithLogitsLoss()
    begun = time.process_time()
    for batch in train:
        rows.zero_grad()
        dense.zero_grad()
        cost(scores(batch), torch.from_numpy(np.array(batch["labels"]))).backward()
        rows.step()
        dense.step()
    cpu_s = time.process_time() - begun
    with torch.no_grad():
        found = np.concatenate([torch.sigmoid(scores(b)).numpy() for b in test])
    return {"cpu_s": cpu_s, "auc": auc(np.concatenate([b["labels"] for b in test]), found)}


def growth(train: Batches) -> dict[int, float]:
    """CPU-milliseconds of a step of the FM, by rows of its table; turns are interleaved."""
    sizes = (1 << 20, 1 << 22, 1 << 24)
    running: dict[int, tuple[Any, Any]] = {}
    for rows in sizes:
        program, _ = program_of("fm", train[0], 1, rows)
        state, _ = program.step(program.init(), train[0])
        running[rows] = (program, state)
    best: dict[int, float] = {}
    for _ in range(5):
        for rows, (program, state) in list(running.items()):
            jax.block_until_ready(state)
            begun = time.process_time()
            for batch in train[1:9]:
                state, _ = program.step(state, batch)
            jax.block_until_ready(state)
            took = (time.process_time() - begun) / 8 * 1e3
            best[rows] = min(best.get(rows, took), took)
            running[rows] = (program, state)
    return best


def spread(samples: int, repeats: int) -> dict[str, Any]:
    """Four virtual devices against one, in turns; the least CPU of each."""
    train, test = log(samples, BATCH)
    runs: dict[int, list[dict[str, Any]]] = {1: [], 4: []}
    for _ in range(repeats):
        for devices, found in runs.items():
            found.append(ours("fm", train, test, 0, devices=devices))
    one, four = (min(run["cpu_s"] for run in found) for found in runs.values())
    apart = np.subtract(runs[1][0]["losses"], runs[4][0]["losses"])
    return {
        "devices": "4 against 1",
        "cpu": round(four / one, 2),
        "one_cpu_ms_a_step": round(one / len(train) * 1e3, 2),
        "loss": float(np.abs(apart).max()),
    }


def seeds(count: int) -> Iterator[int]:
    """Beginnings to average over."""
    yield from range(count)


def main(argv: list[str] | None = None) -> None:
    """Prints a table of both sides."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--test", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=5, help="beginnings; of DeepFM two")
    parser.add_argument("--models", default="lr,fm,deepfm")
    parser.add_argument("--alone", action="store_true", help="without torch")
    parser.add_argument("--spread", action="store_true", help="only four devices against one")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    use_virtual_devices(4 if arguments.spread else 1)
    if arguments.spread:
        print(json.dumps(spread(40 * BATCH, 5)))
        return
    train, test = log(arguments.samples, arguments.test)
    sides: dict[str, Callable[..., dict[str, Any]]] = {"shardpar": ours}
    if not arguments.alone:
        sides["torch"] = torchs
    rows = []
    for name in arguments.models.split(","):
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for seed in seeds(2 if name == "deepfm" else arguments.seeds):
            for side, run in sides.items():
                runs[side].append(run(name, train, test, seed))
        row = {"model": name}
        for side, found in runs.items():
            row[f"{side}_cpu_s"] = round(min(one["cpu_s"] for one in found), 2)
            row[f"{side}_auc"] = round(float(np.mean([one["auc"] for one in found])), 4)
        rows.append(row)
        print(row, flush=True)
    grown = {str(size): round(took, 2) for size, took in growth(train).items()}
    print({"rows": grown}, flush=True)
    command = [sys.executable, "-m", "benchmarks.ps_ctr", "--spread"]
    apart = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(apart, flush=True)
    if arguments.json:
        print(json.dumps({"models": rows, "spread": apart, "rows": grown}))


if __name__ == "__main__":
    main()
