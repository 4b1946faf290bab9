"""Whose examples are whose, from a config: the same answer at every party that asks.

In a deployment of the digits party i takes `Population.data.of_client(i)`, and the aggregator the
examples that are held out; a simulation takes all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardpar.errors import DataError
from shardpar.fl.clients import ClientData
from shardpar.fl.options import FederatedDataOptions
from shardpar.fl.partition import Parts, dirichlet, held_out, iid, shards

_SHADES = 16


@dataclass(frozen=True, eq=False)
class Population:
    """The clients of a federation, and what nobody trains on.

    Attributes:
      data: of all clients.
      held: examples to evaluate on, by field, [rows, ...] each; None where there are none.
    """

    data: ClientData
    held: Mapping[str, np.ndarray] | None


def population(options: FederatedDataOptions) -> Population:
    """Reads and deals the examples that a config asks for.

    Raises:
      DataError: scikit-learn is not installed, a folder is damaged, the two folders have other
        fields, or there are too few examples to go round.

    >>> found = population(FederatedDataOptions(clients=5, held_share=0.5))
    >>> found.data.clients, int(found.data.counts.sum()), len(found.held["labels"])
    (5, 899, 898)
    """
    if options.format == "clients":
        return _own(options)
    inputs, labels = _digits()
    rows, held = held_out(len(labels), options.held_share, seed=options.seed)
    fields = {"inputs": inputs, "labels": labels}
    parts = [rows[part] for part in _dealt(options, labels[rows])]
    kept = {name: field[held] for name, field in fields.items()} if len(held) else None
    return Population(ClientData.of(fields, parts), kept)


def _own(options: FederatedDataOptions) -> Population:
    assert options.path is not None
    data = ClientData.open(Path(options.path))
    if options.eval_path is None:
        return Population(data, None)
    held = ClientData.open(Path(options.eval_path))
    if held.fields.keys() != data.fields.keys():
        raise DataError(
            f"{options.eval_path} has the fields {', '.join(held.fields)}, and {options.path} "
            f"{', '.join(data.fields)}; write both with the same fields"
        )
    return Population(data, held.fields)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "the digits come with scikit-learn, which is not installed; run "
            "`pip install 'shardpar[demo]'`, or write data.format=clients and data.path=FOLDER"
        ) from None
    loaded = load_digits()
    return (loaded.data / _SHADES).astype(np.float32), loaded.target.astype(np.int32)


def _dealt(options: FederatedDataOptions, labels: np.ndarray) -> Parts:
    if options.partition == "iid":
        return iid(len(labels), options.clients, seed=options.seed)
    if options.partition == "shards":
        return shards(labels, options.clients, each=options.shards, seed=options.seed)
    return dirichlet(labels, options.clients, alpha=options.alpha, seed=options.seed)
