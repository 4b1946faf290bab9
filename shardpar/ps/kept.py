"""Tables in checkpoints: in the order of ids, so that any number of shards can read them.

A full checkpoint has every row; a row delta has only those touched since the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from shardpar.errors import CheckpointError
from shardpar.ps.table import PlacedTable, TableState


def kept(placed: PlacedTable, state: TableState) -> dict[str, np.ndarray]:
    """A table as arrays of a checkpoint: "rows", "slot0", ..., "step"."""
    pieces = placed.whole(state)
    named = {"rows": pieces[0]} | {f"slot{i}": slot for i, slot in enumerate(pieces[1:])}
    return named | {"step": np.asarray(state.step), "key": np.asarray(state.key)}


def kept_shapes(placed: PlacedTable, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Of what `kept` gives for so many rows, on the host."""
    shapes = {
        "rows": host_shape(rows, placed.table.dim),
        "step": host_shape(dtype=np.int32),
        "key": host_shape(2, dtype=np.uint32),
    }
    for index, (width, _) in enumerate(placed.table.optimizer.slots(placed.table.dim)):
        shapes[f"slot{index}"] = host_shape(rows, width)
    return shapes


def host_shape(*dims: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    """What a checkpoint reads into the host's memory."""
    return jax.ShapeDtypeStruct(dims, dtype, sharding=SingleDeviceSharding(_host()))


def on_host(array: np.ndarray) -> jax.Array:
    """An array as checkpoints take it; a table that fits on no single device fits here."""
    return jax.device_put(array, _host())


def _host() -> jax.Device:
    return jax.local_devices(backend="cpu")[0]


def restored(placed: PlacedTable, arrays: Mapping[str, np.ndarray]) -> TableState:
    """The inverse of `kept`, on however many devices the table now lies.

    Raises:
      CheckpointError: the arrays are of another table.
    """
    slots = placed.table.optimizer.slots(placed.table.dim)
    widths = [placed.table.dim, *(width for width, _ in slots)]
    names = ["rows", *(f"slot{i}" for i in range(len(widths) - 1))]
    for name, width in zip(names, widths, strict=True):
        there = None if name not in arrays else np.shape(arrays[name])
        if there != (placed.table.rows, width):
            raise CheckpointError(
                f"the checkpoint has {name} of shape {there}, but the table needs "
                f"{(placed.table.rows, width)}; use the config that the checkpoint was made with"
            )
    return placed.placed(
        [arrays[name] for name in names], int(arrays["step"]), np.asarray(arrays["key"])
    )


@dataclass
class Touched:
    """Which rows of a table changed since they were last saved; on the host."""

    rows: np.ndarray

    @classmethod
    def none(cls, rows: int) -> Touched:
        """Of a table that was just saved."""
        return cls(np.zeros(rows, bool))

    def mark(self, ids: np.ndarray) -> None:
        """Ids of a step; negative ones are padding."""
        flat = np.asarray(ids).reshape(-1)
        self.rows[flat[flat >= 0]] = True

    def delta(self, placed: PlacedTable, state: TableState) -> dict[str, np.ndarray]:
        """The touched rows: "ids" and, for these, what `kept` has."""
        ids = np.flatnonzero(self.rows).astype(np.int32)
        pieces = placed.pieces_of(state, ids)
        named = {"rows": pieces[0]} | {f"slot{i}": slot for i, slot in enumerate(pieces[1:])}
        told = {"ids": ids, "step": np.asarray(state.step), "key": np.asarray(state.key)}
        return told | named


def with_delta(
    arrays: Mapping[str, np.ndarray], delta: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A full checkpoint's arrays with a later delta in them.

    >>> base = {"rows": np.zeros((3, 1)), "step": np.array(1)}
    >>> new = with_delta(base, {"ids": np.array([2]), "rows": np.ones((1, 1)), "step": np.array(2)})
    >>> new["rows"][:, 0].tolist(), int(new["step"])
    ([0.0, 0.0, 1.0], 2)
    """
    out = {name: np.array(array) for name, array in arrays.items()}
    for name, array in out.items():
        if name in ("step", "key"):
            out[name] = np.asarray(delta.get(name, array))
        else:
            array[delta["ids"]] = delta[name]
    return out
