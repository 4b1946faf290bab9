"""PLACEHOLDER until fl-train is merged."""

from pathlib import Path

import numpy as np

from shardpar.fl.clients import ClientData
from shardpar.fl.partition import dirichlet


def open_clients(options):
    if options.format == "clients":
        held = ClientData.open(Path(options.eval_path)).fields if options.eval_path else None
        return ClientData.open(Path(options.path)), held
    from sklearn.datasets import load_digits

    d = load_digits()
    x = (d.data / 16).astype(np.float32)
    y = d.target.astype(np.int32)
    order = np.random.default_rng(options.seed).permutation(len(y))
    cut = int(len(y) * (1 - options.held_share))
    tr, ev = order[:cut], order[cut:]
    parts = dirichlet(y[tr], options.clients, alpha=options.alpha, seed=options.seed)
    return ClientData.of({"inputs": x[tr], "labels": y[tr]}, parts), {
        "inputs": x[ev],
        "labels": y[ev],
    }
