"""What workers and servers say to each other, and how an update is written to a log.

Rows travel under the ids of their table. A push is one message for all tables of a shard, so
that a step's updates are taken whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np

from shardpar.errors import CheckpointError

Kind = Literal["gradient", "difference"]

UNKNOWN = -1
"""The version of a row that a worker does not have."""


@dataclass(frozen=True)
class RowsUpdate:
    """What is pushed for the rows of one table.

    Attributes:
      ids: int64[n], none twice.
      values: float32[n, width] each. For "gradient" one array, the gradients summed over
        samples, which the owner divides by the weight and gives to the table's rule. For
        "difference" the rows and each of their slots: what the worker's own updates made of
        them, which the owner adds.
      counts: int64[n], how many updates of the row are in it.
      kind: which of the two.
    """

    ids: np.ndarray
    values: tuple[np.ndarray, ...]
    counts: np.ndarray
    kind: Kind = "gradient"


@dataclass(frozen=True)
class Push:
    """A worker's update of a step, for one shard.

    Attributes:
      worker, sequence: name the update: the sequence of a worker goes up by 1 with each push
        to a shard, from 0, so that a push that is sent again is known.
      step: of the worker, from 0.
      weight: of the samples, by which gradients are divided.
      loss: summed over the samples; nothing is taken where it is not finite.
      seen: how many rounds of updates the shard had when its rows were pulled.
      rows: by table.
      dense: gradients of the other parameters, summed over samples; empty for shards that
        do not have them.
    """

    worker: int
    sequence: int
    step: int
    weight: float
    loss: float
    seen: int = 0
    rows: Mapping[str, RowsUpdate] = field(default_factory=dict)
    dense: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class RowsRequest:
    """Rows of one table that are asked for.

    Attributes:
      ids: int64[n], none twice.
      versions: int64[n] of the copies that the worker has, UNKNOWN where it has none; None
        where it has none at all.
      bound: how many updates a copy may lack.
      slots: whether the optimizer's slots come with the rows.
    """

    ids: np.ndarray
    versions: np.ndarray | None = None
    bound: int = 0
    slots: bool = False


@dataclass(frozen=True)
class PullRequest:
    """What a worker asks of one shard: rows by table, and whether the dense parameters too."""

    rows: Mapping[str, RowsRequest]
    dense: bool = False


@dataclass(frozen=True)
class FreshRows:
    """Rows whose copies are too old.

    Attributes:
      positions: int64[m], where they are in the request's ids.
      pieces: float32[m, width]: the rows, and their slots where these were asked for.
      versions: int64[m], how many updates they have had.
    """

    positions: np.ndarray
    pieces: tuple[np.ndarray, ...]
    versions: np.ndarray


@dataclass(frozen=True)
class Pulled:
    """A shard's answer: fresh rows by table, dense parameters, and its count of updates."""

    rows: Mapping[str, FreshRows]
    dense: Mapping[str, np.ndarray]
    seen: int


@dataclass(frozen=True)
class Position:
    """Where a worker goes on when it starts anew.

    Attributes:
      pushes: of it that a shard has had: the number of the next one.
      steps: of it that a shard has had.
    """

    pushes: int = 0
    steps: int = 0


def encoded(value: Any) -> bytes:
    """Numbers, texts, lists, dicts and numpy arrays as bytes.

    >>> decoded(encoded({"a": np.arange(2)}))["a"].tolist()
    [0, 1]
    """
    return msgspec.msgpack.encode(_plain(value))


def decoded(data: bytes) -> Any:
    """The inverse of `encoded`.

    Raises:
      CheckpointError: the bytes are something else.
    """
    try:
        return _rebuilt(msgspec.msgpack.decode(data))
    except (msgspec.DecodeError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"a record of a server's log cannot be read: {error}") from error


def push_bytes(push: Push) -> bytes:
    """A push as it is written to a log."""
    rows = {
        name: {
            "ids": update.ids, "values": list(update.values), "counts": update.counts,
            "kind": update.kind,
        }
        for name, update in push.rows.items()
    }  # fmt: skip
    numbers = [push.worker, push.sequence, push.step, push.weight, push.loss, push.seen]
    return encoded({"push": numbers, "rows": rows, "dense": dict(push.dense)})


def push_from_bytes(data: bytes) -> Push:
    """The inverse of `push_bytes`."""
    read = decoded(data)
    rows = {
        name: RowsUpdate(part["ids"], tuple(part["values"]), part["counts"], part["kind"])
        for name, part in read["rows"].items()
    }
    return Push(*read["push"], rows=rows, dense=read["dense"])


_ARRAY = "\x00array"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.ndarray):
        # Byte strings carry bfloat16 too, which numpy's own formats do not.
        content = np.ascontiguousarray(value).tobytes()
        return {_ARRAY: [value.dtype.name, list(value.shape), content]}
    return value.item() if isinstance(value, np.generic) else value


def _rebuilt(value: Any) -> Any:
    if isinstance(value, dict):
        if _ARRAY in value:
            name, shape, content = value[_ARRAY]
            return np.frombuffer(content, np.dtype(name)).reshape(shape).copy()
        return {key: _rebuilt(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rebuilt(part) for part in value]
    return value
