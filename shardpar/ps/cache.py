"""A worker's cache of rows: copies may lack some updates, and updates may wait, within bounds.

HET's protocol (Miao et al., "HET: scaling out huge embedding model training via
cache-enabled distributed framework", VLDB 2022): the worker names the versions it has, and
only rows that lack more updates than the pull bound come back; its own updates change its
copy and wait until there are more than the push bound. With both bounds 0 every step sees
what it would see without a cache, bit for bit.

With a push bound, what is pushed is the difference that a worker's updates made of a row and
its slots, and the owner adds it. That is right for rules whose slots are sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import optax
from typing_extensions import override

from shardpar.errors import ConfigError, PlanError
from shardpar.ps.client import Client, Rows
from shardpar.ps.messages import UNKNOWN, FreshRows, RowsRequest, RowsUpdate
from shardpar.ps.optimizers import SGD, AdaGrad, RowWiseAdaGrad
from shardpar.ps.stored import Rules
from shardpar.ps.table import Table

_ADDITIVE = (SGD, AdaGrad, RowWiseAdaGrad)


@dataclass(frozen=True)
class CacheOptions:
    """How many rows a worker keeps of each table, and how old they may be.

    Attributes:
      capacity_rows: of each table.
      pull_bound: updates by others that a copy may lack when a step reads it; with
        push_bound 0, the worker's own too, which the copy then lacks as well.
      push_bound: updates of a row that may wait after a step.
      evict: who gives way: the least recently or the least frequently used row.
    """

    capacity_rows: int
    pull_bound: int = 0
    push_bound: int = 0
    evict: Literal["lru", "lfu"] = "lru"

    def __post_init__(self) -> None:
        if self.capacity_rows < 1 or self.pull_bound < 0 or self.push_bound < 0:
            raise ConfigError(
                f"a cache has at least 1 row and bounds of 0 or more, not {self.capacity_rows} "
                f"rows, pull bound {self.pull_bound} and push bound {self.push_bound}"
            )
        if self.evict not in ("lru", "lfu"):
            raise ConfigError(f"a cache evicts by 'lru' or 'lfu', not {self.evict!r}")


@dataclass
class CachedTable:
    """The copies of one table's rows.

    Attributes:
      table: whose.
      options: bounds and capacity.
      evicted: rows that had to go.
    """

    table: Table
    options: CacheOptions
    evicted: int = 0
    _outbox: list[RowsUpdate] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        rule = self.table.optimizer
        if self.options.push_bound and not isinstance(rule, _ADDITIVE):
            names = ", ".join(kind.__name__ for kind in _ADDITIVE)
            raise PlanError(
                f"updates by {type(rule).__name__} cannot wait in a cache: what several workers "
                f"make of its slots does not add up; use one of {names}, or push_bound=0"
            )
        self._rules = Rules(self.table)
        room = min(self.options.capacity_rows, self.table.rows)
        widths = self._rules.widths if self.options.push_bound else self._rules.widths[:1]
        # As dedup does on the host: four bytes for each row of the table.
        self._slot_of = np.full(self.table.rows, -1, np.int32)
        self._ids = np.full(room, -1, np.int64)
        self._base = [np.zeros((room, width), np.float32) for width in widths]
        self._copy = [np.zeros((room, width), np.float32) for width in widths]
        self._versions, self._pending = np.zeros(room, np.int64), np.zeros(room, np.int64)
        self._used, self._count = np.zeros(room, np.int64), np.zeros(room, np.int64)
        self._time, self._filled = 0, 0
        self._passing: dict[str, np.ndarray] = {}

    def request(self, ids: np.ndarray) -> RowsRequest:
        """What is asked of the servers before a step that reads these distinct ids."""
        slots = self._slot_of[ids]
        versions = np.where(slots >= 0, self._versions[slots], UNKNOWN)
        bound, push = self.options.pull_bound, self.options.push_bound
        return RowsRequest(ids, versions, bound, slots=push > 0)

    def read(self, ids: np.ndarray, fresh: FreshRows) -> np.ndarray:
        """The rows of a step, float32[n, dim], after the servers' answer to `request(ids)`."""
        self._time += 1
        slots = self._slot_of[ids]
        self._used[slots[slots >= 0]] = self._time
        at = slots[fresh.positions]
        known = at >= 0
        self._refresh(at[known], [piece[known] for piece in fresh.pieces], fresh.versions[known])
        new = np.flatnonzero(~known)
        given = self._take(new.size)
        kept, passing = new[: given.size], new[given.size :]
        self._insert(given, ids[fresh.positions[kept]], fresh, kept)
        slots = self._slot_of[ids]
        held = slots >= 0
        self._count[slots[held]] += 1
        rows = np.empty((ids.size, self.table.dim), np.float32)
        rows[held] = self._copy[0][slots[held]]
        rows[fresh.positions[passing]] = fresh.pieces[0][passing]
        # Rows that found no room are only there for this step.
        self._passing = {"ids": ids[fresh.positions[passing]]} | {
            f"piece{i}": piece[passing] for i, piece in enumerate(fresh.pieces)
        }
        return rows

    def take(
        self, ids: np.ndarray, gradient: np.ndarray, step: int, rate: float
    ) -> RowsUpdate | None:
        """The worker's copies take gradients; what must be pushed now, or None for nothing.

        Only with a push bound. `gradient` is already divided by its weight.
        """
        slots = self._slot_of[ids]
        held = slots >= 0
        at = slots[held]
        old = tuple(piece[at] for piece in self._copy)
        for piece, new in zip(
            self._copy, self._rules.updated(old, gradient[held], step + 1, rate), strict=True
        ):
            piece[at] = new
        self._pending[at] += 1
        self._post(at[self._pending[at] > self.options.push_bound])
        self._pass_on(ids[~held], gradient[~held], step, rate)
        return self.outgoing()

    def outgoing(self) -> RowsUpdate | None:
        """What was posted since the last time, as one update."""
        posted, self._outbox = self._outbox, []
        if not posted:
            return None
        pieces = zip(*(update.values for update in posted), strict=True)
        return RowsUpdate(
            np.concatenate([update.ids for update in posted]),
            tuple(np.concatenate(piece) for piece in pieces),
            np.concatenate([update.counts for update in posted]),
            "difference",
        )

    def post_all(self) -> None:
        """Posts every update that waits."""
        self._post(np.flatnonzero(self._pending > 0))

    def lacking(self, versions: np.ndarray) -> int:
        """The most updates that a copy lacks, given the versions of all rows on the servers."""
        held = self._ids >= 0
        return int((versions[self._ids[held]] - self._versions[held]).max(initial=0))

    @property
    def waiting(self) -> int:
        """The most updates of a row that wait to be pushed."""
        return int(self._pending.max(initial=0))

    def _refresh(self, at: np.ndarray, pieces: list[np.ndarray], versions: np.ndarray) -> None:
        """Copies become what the owner has, and what waits is on top of it again."""
        waits = (self._pending[at] > 0)[:, None]
        for base, copy, piece in zip(self._base, self._copy, pieces, strict=True):
            copy[at] = np.where(waits, piece + (copy[at] - base[at]), piece)
            base[at] = piece
        self._versions[at] = versions

    def _insert(
        self, slots: np.ndarray, ids: np.ndarray, fresh: FreshRows, kept: np.ndarray
    ) -> None:
        for base, copy, piece in zip(self._base, self._copy, fresh.pieces, strict=True):
            base[slots] = copy[slots] = piece[kept]
        self._versions[slots] = fresh.versions[kept]
        self._pending[slots] = self._count[slots] = 0
        self._used[slots] = self._time
        self._ids[slots] = ids
        self._slot_of[ids] = slots

    def _take(self, wanted: int) -> np.ndarray:
        """Slots for new rows, at most so many; never one that this step reads."""
        free = np.arange(self._filled, min(self._ids.size, self._filled + wanted))
        self._filled += free.size
        lacking = wanted - free.size
        if not lacking:
            return free
        others = np.flatnonzero(self._used[: self._filled] < self._time)
        others = others[~np.isin(others, free)]
        score = self._used if self.options.evict == "lru" else self._count
        order = np.lexsort((others, self._used[others], score[others]))
        gone = others[order[:lacking]]
        self._post(gone[self._pending[gone] > 0])
        self._slot_of[self._ids[gone]] = -1
        self.evicted += gone.size
        return np.concatenate([free, gone])

    def _post(self, at: np.ndarray) -> None:
        """The difference that waiting updates made goes out; the copies have it already."""
        if not at.size:
            return
        moved = tuple(c[at] - b[at] for c, b in zip(self._copy, self._base, strict=True))
        counts = self._pending[at].copy()
        self._outbox.append(RowsUpdate(self._ids[at].copy(), moved, counts, "difference"))
        for base, copy in zip(self._base, self._copy, strict=True):
            base[at] = copy[at]
        self._versions[at] += counts
        self._pending[at] = 0

    def _pass_on(self, ids: np.ndarray, gradient: np.ndarray, step: int, rate: float) -> None:
        if not ids.size:
            return
        order = np.argsort(self._passing["ids"])
        found = order[np.searchsorted(self._passing["ids"], ids, sorter=order)]
        old = tuple(self._passing[f"piece{i}"][found] for i in range(len(self._copy)))
        new = self._rules.updated(old, gradient, step + 1, rate)
        moved = tuple(after - before for after, before in zip(new, old, strict=True))
        self._outbox.append(RowsUpdate(ids, moved, np.ones(ids.size, np.int64), "difference"))


class CachedRows(Rows):
    """A cache before a client.

    Attributes:
      client: reaches the servers; its `traffic` counts rows that went either way.
      tables: the cached tables by path.

    Raises:
      PlanError: a table's rule does not let updates wait.
    """

    def __init__(
        self, client: Client, options: CacheOptions, rate: optax.Schedule | None = None
    ) -> None:
        self.client, self.options = client, options
        self.tables = {name: CachedTable(table, options) for name, table in client.tables.items()}
        self._rate = rate

    @override
    def pull(
        self, ids: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        requests = {name: self.tables[name].request(wanted) for name, wanted in ids.items()}
        fresh, dense = self.client.ask(requests, dense=True)
        self.client.traffic.asked += sum(wanted.size for wanted in ids.values())
        return {name: self.tables[name].read(w, fresh[name]) for name, w in ids.items()}, dense

    @override
    def push(
        self,
        step: int,
        gradients: Mapping[str, tuple[np.ndarray, np.ndarray]],
        *,
        weight: float,
        loss: float,
        dense: Mapping[str, np.ndarray],
    ) -> None:
        if not self.options.push_bound:
            self.client.push(step, gradients, weight=weight, loss=loss, dense=dense)
            return
        fine = bool(np.isfinite(loss))
        scale = np.float32(1 / weight if weight else 1.0)
        rate = 1.0 if self._rate is None else float(self._rate(step))
        updates = {}
        for name, (ids, gradient) in gradients.items():
            cached = self.tables[name]
            update = cached.take(ids, gradient * scale, step, rate) if fine else cached.outgoing()
            if update is not None:
                updates[name] = update
        self.client.send(
            step + 1, updates, weight=weight if fine else 0.0, loss=loss if fine else 0.0,
            dense=dense if fine else {},
        )  # fmt: skip

    @override
    def flush(self) -> None:
        """Pushes all that waits; in lockstep, every worker must."""
        if not self.options.push_bound:
            return
        updates = {}
        for name, cached in self.tables.items():
            cached.post_all()
            update = cached.outgoing()
            if update is not None:
                updates[name] = update
        steps = self.client.position.steps
        self.client.send(steps, updates, weight=0.0, loss=0.0, dense={})
