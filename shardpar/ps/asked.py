"""Which ids a model asks of which table, found by tracing it once, and how a step finds them.

Where ids come straight from the batch, the host finds the distinct ones before a step
begins; where the model computes them, the program does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shardpar.errors import CaptureError
from shardpar.ps.dedup import (
    Distinct,
    HostDedup,
    padded,
    representatives,
    rounded_size,
    sorted_representatives,
)
from shardpar.ps.embed import Embed, PulledRows, Recorder
from shardpar.ps.exchange import usual_capacity
from shardpar.ps.placement import Placement
from shardpar.ps.table import require_ids

LARGEST_SCRATCH = 1 << 26
"""Rows up to which a program finds repeats in a scratch array instead of sorting."""

_FEWEST = 16
"""Requests to an owner that a program is made for at least."""
_OVERFLOWS = 3
"""Batches of which an owner was asked for too much, after which all go in rounds: each way of a
table has a program of its own."""

Batch = Mapping[str, Any]
Make = Callable[[], tuple[nnx.Module, list[Embed]]]


@dataclass(frozen=True)
class Call:
    """One lookup of a model.

    Attributes:
      table: which.
      source: the batch's array that the ids are, or None where the model computes them.
      shape: of the ids, dim 0 counting samples.
    """

    table: int
    source: str | None
    shape: tuple[int, ...]


def calls_of(make: Make, run: Callable[[nnx.Module, Batch], Any], batch: Batch) -> tuple[Call, ...]:
    """Every lookup of a model, in order.

    Args:
      make: makes the model, and gives its tables in order.
      run: the loss, called with the model and a batch.
      batch: shapes of a batch.

    Raises:
      CaptureError: ids are not integers, or are looked up inside a loop or a branch.
    """
    tables: list[int] = []

    def ids(batch: Batch) -> list[jax.Array]:
        found = recorded(make, run, batch)
        tables[:] = [table for table, _ in found]
        return [ids for _, ids in found]

    names = sorted(batch)
    shapes = {name: jax.ShapeDtypeStruct(batch[name].shape, batch[name].dtype) for name in names}
    closed = jax.make_jaxpr(ids)(shapes)
    inputs = dict(zip(map(id, closed.jaxpr.invars), names, strict=True))
    calls = []
    for table, out in zip(tables, closed.jaxpr.outvars, strict=True):
        if not jnp.issubdtype(out.aval.dtype, jnp.integer):
            raise CaptureError(
                f"a table is asked for ids of type {out.aval.dtype}; ids are integers: "
                "convert them in the data, or with .astype(jnp.int32)"
            )
        calls.append(Call(table, inputs.get(id(out)), tuple(out.aval.shape)))
    return tuple(calls)


def blank(x: Any) -> jax.Array:
    """An array that looks like another: zeros, or the key of 0."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), x.shape)
    return jnp.zeros(x.shape, x.dtype)


def recorded(
    make: Make, run: Callable[[nnx.Module, Batch], Any], batch: Batch
) -> list[tuple[int, jax.Array]]:
    """(table, ids) of every lookup, while tracing."""
    model, layers = make()
    recorder = Recorder(layers=layers)
    for layer in layers:
        layer.lender = recorder
    run(model, batch)
    return recorder.asked


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Wanted:
    """What a step pulls: the distinct ids, and each call's positions among them.

    Attributes:
      ids: int32[devices * u] of each table; -1 is padding.
      positions: of each call, int32 shaped as its ids; those of padding are of a -1, so
        that they find the zeros which are pulled for it.
      by_owner: of each table, whether a device's ids come in equal parts, one per owner.
    """

    ids: tuple[Any, ...]
    positions: tuple[Any, ...]
    by_owner: tuple[bool, ...] = field(metadata={"static": True}, default=())

    def is_by_owner(self, table: int) -> bool:
        """Whether the ids of a table come in parts, one per owner."""
        return bool(self.by_owner) and self.by_owner[table]


class HostFinder:
    """Finds on the host what a step wants, each device's part of the batch by itself.

    Sizes are kept once they have grown, so that programs are compiled for few of them.
    """

    def __init__(
        self,
        calls: tuple[Call, ...],
        rows: tuple[int, ...],
        devices: int,
        placements: tuple[Placement, ...] | None = None,
        capacity: int | None = None,
    ) -> None:
        """For a model's lookups.

        Args:
          calls: the lookups.
          rows: of each table.
          devices: that share a batch.
          placements: of each table; with them requests are put by owner. None leaves them as
            they come.
          capacity: the most that a device asks of an owner at a time; None takes
            `usual_capacity`.
        """
        self._calls, self._rows, self._devices = calls, rows, devices
        self._placements = placements or (Placement(),) * len(rows)
        self._capacity = capacity
        self._overflows: dict[tuple[Any, ...], int] = {}
        self._sizes: dict[tuple[Any, ...], int] = {}
        self._dedup: dict[int, HostDedup] = {}

    def __call__(self, batch: Mapping[str, np.ndarray]) -> Wanted:
        """What the lookups of a batch want.

        Raises:
          DataError: an id is outside its table.
        """
        found: dict[tuple[Any, ...], tuple[np.ndarray, dict[str, np.ndarray], bool]] = {}
        ids, positions, by_owner = [], {}, []
        for table, (rows, placement) in enumerate(zip(self._rows, self._placements, strict=True)):
            sources = tuple(
                dict.fromkeys(str(call.source) for call in self._calls if call.table == table)
            )
            key = (rows, sources, placement)
            if key not in found:
                found[key] = self._find(rows, sources, placement, batch)
            distinct, places, arranged = found[key]
            ids.append(distinct)
            by_owner.append(arranged)
            positions[table] = places
        return Wanted(
            tuple(ids),
            tuple(positions[call.table][str(call.source)] for call in self._calls),
            tuple(by_owner),
        )

    def _find(
        self,
        rows: int,
        sources: tuple[str, ...],
        placement: Placement,
        batch: Mapping[str, np.ndarray],
    ) -> tuple[np.ndarray, dict[str, np.ndarray], bool]:
        arrays = [np.asarray(batch[source]) for source in sources]
        for source, array in zip(sources, arrays, strict=True):
            require_at_most(array, rows, source)
        if rows not in self._dedup:
            self._dedup[rows] = HostDedup(rows)
        dedup = self._dedup[rows]
        parts = []
        for device in range(self._devices):
            own = [_part(array, device, self._devices).reshape(-1) for array in arrays]
            parts.append(dedup(_joined(own)))
        ids, positions, arranged = self._laid_out(parts, rows, sources, placement)
        places: dict[str, np.ndarray] = {}
        offset = 0
        for source, array in zip(sources, arrays, strict=True):
            each = array.size // self._devices
            joined = _joined([at[offset : offset + each] for at in positions])
            places[source] = joined.reshape(array.shape)
            offset += each
        return ids, places, arranged

    def _laid_out(
        self, parts: list[Distinct], rows: int, sources: tuple[str, ...], placement: Placement
    ) -> tuple[np.ndarray, list[np.ndarray], bool]:
        """All devices' ids one after another, where each device finds its own, and how.

        One more than the ids of a device are laid out: padding is found at a -1.
        """
        most = 1 + max(part.ids.size for part in parts)
        key = (rows, sources, placement)
        if placement.rows > 1 and self._overflows.get(key, 0) < _OVERFLOWS:
            owners = [placement.home(part.ids, rows)[0] for part in parts]
            counts = [np.bincount(owner, minlength=placement.rows) for owner in owners]
            fullest = max(int(count.max()) for count in counts)
            limit = (self._capacity or usual_capacity(most, placement)) // placement.columns
            if fullest > limit:
                self._overflows[key] = self._overflows.get(key, 0) + 1
            else:
                # One more than the ids, for padding.
                each = min(rounded_size(1 + fullest, first=_FEWEST), 1 + limit)
                each = max(each, self._sizes.get(key, 0))
                self._sizes[key] = each
                pairs = [
                    _by_owner(part, owner, count, each)
                    for part, owner, count in zip(parts, owners, counts, strict=True)
                ]
                return _joined([ids for ids, _ in pairs]), [at for _, at in pairs], True
        size = rounded_size(most, self._sizes.get(sources, 0))
        self._sizes[sources] = size
        return (
            _joined([padded(part.ids, size) for part in parts]),
            [_with_padding_at(p.ids.size, size - p.ids.size, p.positions) for p in parts],
            False,
        )


def _with_padding_at(first: int, places: int, positions: np.ndarray) -> np.ndarray:
    """Positions whose padding is found at places from the first on, in turn.

    At one place alone its gradients, which nobody takes, would all be added up one by one.
    """
    if not positions.size or positions.min() >= 0:
        return positions
    padding = np.flatnonzero(positions < 0)
    positions = positions.copy()
    positions[padding] = first + np.arange(padding.size, dtype=np.int32) % places
    return positions


def _by_owner(
    part: Distinct, owner: np.ndarray, counts: np.ndarray, each: int
) -> tuple[np.ndarray, np.ndarray]:
    """A device's ids in parts of `each`, one per owner, and where its lookups find them."""
    order = np.argsort(owner.astype(np.uint16), kind="stable")
    begins = np.cumsum(counts) - counts
    slots = np.empty(owner.size, np.int32)
    slots[order] = np.arange(owner.size) + np.repeat(np.arange(counts.size) * each - begins, counts)
    ids = np.full(counts.size * each, -1, np.int32)
    ids[slots] = part.ids
    if not slots.size:
        return ids, _with_padding_at(0, each, part.positions)
    found = slots.take(part.positions, mode="clip")
    found[part.positions < 0] = -1
    return ids, _with_padding_at(int(counts[0]), each - int(counts[0]), found)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    if not parts:
        # A table that nothing is looked up in.
        return np.zeros(0, np.int32)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _part(array: np.ndarray, device: int, devices: int) -> np.ndarray:
    each = array.shape[0] // devices
    return array[device * each : (device + 1) * each]


def require_at_most(ids: np.ndarray, rows: int, what: str) -> None:
    """Refuses ids beyond the table; negative ones are padding.

    Raises:
      DataError: naming the first such id.
    """
    if ids.size and ids.max() >= rows:
        require_ids(np.maximum(ids, 0), rows, f"the table that batch[{what!r}] is looked up in")


def found_in_program(
    asked: list[tuple[int, jax.Array]], rows: tuple[int, ...]
) -> tuple[Wanted, jax.Array]:
    """As `HostFinder`, inside a program; and how many ids were outside their tables."""
    ids: list[jax.Array] = []
    positions: list[jax.Array | None] = [None] * len(asked)
    outside = jnp.int32(0)
    for table, limit in enumerate(rows):
        mine = [index for index, (asker, _) in enumerate(asked) if asker == table]
        flat = jnp.concatenate(
            [asked[index][1].reshape(-1).astype(jnp.int32) for index in mine]
            or [jnp.full(1, -1, jnp.int32)]
        )
        outside += (flat >= limit).sum(dtype=jnp.int32)
        flat = jnp.where(flat >= limit, -1, flat)
        if limit <= LARGEST_SCRATCH:
            winners, _ = representatives(flat, jnp.zeros(limit, jnp.int32))
        else:
            winners = sorted_representatives(flat)
        iota = jnp.arange(flat.shape[0], dtype=jnp.int32)
        ids.append(jnp.where(winners == iota, flat, -1))
        offset = 0
        for index in mine:
            shape = asked[index][1].shape
            size = asked[index][1].size
            positions[index] = winners[offset : offset + size].reshape(shape)
            offset += size
    return Wanted(tuple(ids), tuple(positions)), outside


def lend(
    layers: list[Embed], pulled: tuple[jax.Array, ...], wanted: Wanted, calls: tuple[int, ...]
) -> None:
    """Gives the layers their rows; `calls` are the tables of each call, in order."""
    lender = PulledRows(pulled, iter(zip(calls, wanted.positions, strict=True)))
    for layer in layers:
        layer.lender = lender
