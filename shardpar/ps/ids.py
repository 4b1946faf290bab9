"""Which row a wide id has: 64-bit ids get rows when seen often enough, and lose them again.

A table has fewer rows than there are ids in the world. `IdMap` lives on the host beside the
data: an id gets a row once it was seen `admit_after` times; when rows run out, the least
recently or least frequently used ones, or those not seen for `ttl_steps`, are given away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shardpar.errors import CheckpointError, DataError, PlanError

Evict = Literal["never", "lru", "lfu"]

_EMPTY = np.int64(-(2**63))
_SKETCH_ROWS = 4
_SKETCH_SIZE = 1 << 20
_SALTS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], np.uint64
)


@dataclass(frozen=True)
class IdOptions:
    """When an id gets a row, and when it loses it.

    Attributes:
      admit_after: sightings before an id gets a row; until then its lookups are zeros.
      evict: who gives way when rows run out: nobody (then new ids stay without), the least
        recently used, or the least frequently used.
      ttl_steps: ids not seen for so many steps may go at any time; None keeps them.
    """

    admit_after: int = 1
    evict: Evict = "lru"
    ttl_steps: int | None = None

    def __post_init__(self) -> None:
        if self.admit_after < 1:
            raise PlanError(f"admit_after is {self.admit_after}; an id is seen at least once")
        if self.ttl_steps is not None and self.ttl_steps < 1:
            raise PlanError(f"ttl_steps is {self.ttl_steps}; write 1 or more, or None")


@dataclass(frozen=True)
class Mapped:
    """A step's ids as rows.

    Attributes:
      rows: int32, shaped as the ids; -1 for ids without a row, and for padding.
      fresh_rows, fresh_ids: rows that now belong to another id, and must begin anew.
      evicted_ids: who had to go.
    """

    rows: np.ndarray
    fresh_rows: np.ndarray
    fresh_ids: np.ndarray
    evicted_ids: np.ndarray


class IdMap:
    """The map of one table; not for several threads at once.

    >>> ids = IdMap(2, IdOptions(evict="lru"))
    >>> ids(np.array([70, 80])).rows.tolist()
    [0, 1]
    >>> ids(np.array([80])).rows.tolist()
    [1]
    >>> step = ids(np.array([90]))
    >>> step.rows.tolist(), step.evicted_ids.tolist()
    ([0], [70])
    """

    def __init__(self, rows: int, options: IdOptions = IdOptions()) -> None:
        if rows < 1:
            raise PlanError(f"an id map needs at least 1 row, not {rows}")
        self.rows, self.options = rows, options
        self.step = 0
        self._id_of = np.full(rows, _EMPTY, np.int64)
        self._used = np.zeros(rows, np.int64)
        self._count = np.zeros(rows, np.int64)
        self._next = 0
        self._size = 1 << max(4, int(2 * rows - 1).bit_length())
        self._keys = np.full(self._size, _EMPTY, np.int64)
        self._row_at = np.full(self._size, -1, np.int32)
        self._seen = (
            np.zeros((_SKETCH_ROWS, _SKETCH_SIZE), np.int32) if options.admit_after > 1 else None
        )

    def __len__(self) -> int:
        """How many ids have a row."""
        return int((self._id_of != _EMPTY).sum())

    def __call__(self, ids: np.ndarray) -> Mapped:
        """Maps a step's ids, and counts them as seen.

        Args:
          ids: int64 or uint64, of any shape; -1 is padding.

        Raises:
          DataError: an id is the one number that marks empty places, -2**63.
        """
        ids = np.asarray(ids)
        wide = ids.reshape(-1).astype(np.int64, copy=False)
        distinct, inverse, counts = np.unique(wide, return_inverse=True, return_counts=True)
        if distinct.size and distinct[0] == _EMPTY:
            raise DataError("the id -2**63 marks empty places and cannot be mapped; hash the ids")
        self.step += 1
        rows = self.find(distinct)
        new = (rows < 0) & (distinct != -1)
        known = rows >= 0
        self._used[rows[known]] = self.step
        self._count[rows[known]] += counts[known]
        if self._seen is not None:
            new[new] = self._often_enough(distinct[new], counts[new])
        wanted = np.flatnonzero(new)
        # Whoever is seen most comes first, when there is not room for all.
        wanted = wanted[np.argsort(-counts[wanted], kind="stable")]
        evicted = self._make_room(wanted.size)
        given = self._take(wanted.size)
        wanted = wanted[: given.size]
        fresh = distinct[wanted]
        rows[wanted] = given
        self._id_of[given] = fresh
        self._used[given] = self.step
        self._count[given] = counts[wanted]
        self._insert(fresh, given)
        mapped = rows[inverse.reshape(-1)].astype(np.int32).reshape(ids.shape)
        return Mapped(mapped, given.astype(np.int32), fresh, evicted)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The rows of distinct ids, int64[n], and -1 where there is none; nothing is counted."""
        ids = np.asarray(ids, np.int64)
        rows = np.full(ids.size, -1, np.int64)
        waiting = np.flatnonzero(ids != -1)
        places = self._place(ids[waiting])
        while waiting.size:
            keys = self._keys[places]
            hit = keys == ids[waiting]
            rows[waiting[hit]] = self._row_at[places[hit]]
            on = ~hit & (keys != _EMPTY)
            waiting, places = waiting[on], (places[on] + 1) & (self._size - 1)
        return rows

    def arrays(self) -> dict[str, np.ndarray]:
        """All that it knows, for a checkpoint; row by row, so that rows can be dealt anew."""
        kept = {
            "id": self._id_of,
            "used": self._used,
            "count": self._count,
            "next": np.array([self._next, self.step], np.int64),
        }
        return kept | ({} if self._seen is None else {"seen": self._seen})

    def take_over(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Becomes the map that `arrays` are of, under the options it has.

        Raises:
          CheckpointError: they are not of a map with as many rows.
        """
        there = np.shape(arrays.get("id"))
        if there != (self.rows,):
            raise CheckpointError(f"the id map has {there} rows, the table {self.rows}")
        vars(self).update(vars(IdMap.restored(arrays, self.options)))

    @classmethod
    def restored(cls, arrays: Mapping[str, np.ndarray], options: IdOptions = IdOptions()) -> IdMap:
        """The inverse of `arrays`.

        Raises:
          CheckpointError: the arrays are not those of an id map.
        """
        try:
            made = cls(arrays["id"].size, options)
            made._id_of = np.array(arrays["id"], np.int64)
            made._used = np.array(arrays["used"], np.int64)
            made._count = np.array(arrays["count"], np.int64)
            made._next, made.step = (int(value) for value in arrays["next"])
            if made._seen is not None and "seen" in arrays:
                made._seen = np.array(arrays["seen"], np.int32)
        except KeyError as missing:
            raise CheckpointError(
                f"the id map has no array {missing}; restore another step"
            ) from None
        live = np.flatnonzero(made._id_of != _EMPTY)
        made._insert(made._id_of[live], live)
        return made

    def _often_enough(self, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Counts sightings in a count-min sketch, which may count too many, never too few."""
        assert self._seen is not None
        least = np.full(ids.size, np.iinfo(np.int32).max, np.int64)
        for row in range(_SKETCH_ROWS):
            places = _mixed(ids, _SALTS[row]) & np.uint64(_SKETCH_SIZE - 1)
            at = places.astype(np.int64)
            np.add.at(self._seen[row], at, counts.astype(np.int32))
            least = np.minimum(least, self._seen[row][at])
        return least >= self.options.admit_after

    def _make_room(self, wanted: int) -> np.ndarray:
        if not wanted:
            return np.zeros(0, np.int64)
        room = int((self._id_of == _EMPTY).sum())
        live = np.flatnonzero(self._id_of != _EMPTY)
        idle = self.step - self._used[live]
        gone = np.zeros(0, np.int64)
        if self.options.ttl_steps is not None:
            gone = live[idle > self.options.ttl_steps]
        lacking = wanted - room - gone.size
        if lacking > 0 and self.options.evict != "never":
            # Ids of this very step stay; some more go at once, since each going costs a rebuild.
            others = live[(idle > 0) & ~np.isin(live, gone)]
            number = min(others.size, max(lacking, self.rows // 64))
            score = self._used if self.options.evict == "lru" else self._count
            if number:
                order = np.lexsort((others, self._used[others], score[others]))
                gone = np.concatenate([gone, others[order[:number]]])
        if not gone.size:
            return np.zeros(0, np.int64)
        evicted = self._id_of[gone].copy()
        self._id_of[gone] = _EMPTY
        self._keys[:] = _EMPTY
        self._row_at[:] = -1
        rest = np.flatnonzero(self._id_of != _EMPTY)
        self._insert(self._id_of[rest], rest)
        return evicted

    def _take(self, wanted: int) -> np.ndarray:
        """Free rows, at most so many: those given back first."""
        back = np.flatnonzero(self._id_of[: self._next] == _EMPTY)[:wanted]
        new = np.arange(self._next, min(self.rows, self._next + wanted - back.size))
        self._next += new.size
        return np.concatenate([back, new]).astype(np.int64)

    def _insert(self, ids: np.ndarray, rows: np.ndarray) -> None:
        waiting = np.arange(ids.size)
        places = self._place(ids)
        while waiting.size:
            free = self._keys[places] == _EMPTY
            # Two ids may claim one place: the last one written has it, the other goes on.
            self._keys[places[free]] = ids[waiting[free]]
            self._row_at[places[free]] = rows[waiting[free]]
            on = self._keys[places] != ids[waiting]
            waiting, places = waiting[on], (places[on] + 1) & (self._size - 1)

    def _place(self, ids: np.ndarray) -> np.ndarray:
        mixed = _mixed(ids, np.uint64(0x9E3779B97F4A7C15))
        return (mixed & np.uint64(self._size - 1)).astype(np.int64)


def _mixed(ids: np.ndarray, salt: np.uint64) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood, 2014): every bit depends on every bit."""
    x = ids.astype(np.uint64) ^ salt
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
