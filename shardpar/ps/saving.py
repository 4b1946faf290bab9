"""A run's tables on disk: full checkpoints, row deltas between them, and how to go on from both.

Tables are kept in the order of ids, so a run that was saved on 8 devices goes on on 3. A
delta holds the rows touched since the last full checkpoint; to go on, the newest full one
that is whole is read, and the newest delta that builds on it. Both have checksums.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from shardpar.errors import CheckpointError
from shardpar.ps.asked import Wanted
from shardpar.ps.ids import IdMap
from shardpar.ps.kept import (
    Touched,
    host_shape,
    kept,
    kept_shapes,
    on_host,
    restored,
    with_delta,
)
from shardpar.ps.program import SparseProgram, SparseState
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.options import CheckpointOptions

_DELTA = "delta.json"
_DELTAS = "deltas"


@dataclass(frozen=True)
class Found:
    """A run as it was saved."""

    step: int
    state: SparseState
    files: Mapping[str, str]


@dataclass
class Savings:
    """The checkpoints of one run.

    Attributes:
      program: whose state is saved.
      full, deltas: in the run's directory.
      full_every: each so many saves are full.
    """

    program: SparseProgram
    full: Checkpoints
    deltas: Checkpoints | None
    full_every: int
    ids: IdMap | None = None
    _base: int | None = None
    _since: int = 0
    _touched: dict[str, Touched] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        directory: Path,
        program: SparseProgram,
        options: CheckpointOptions,
        full_every: int,
        notify: Callable[[str], None],
        ids: IdMap | None = None,
    ) -> Savings:
        """Opens a directory of checkpoints, and locks it.

        Raises:
          RunError: another trainer writes there.
          CheckpointError: deltas are wanted, but ids are not known on the host.
        """
        if full_every > 1 and not program.finds_on_host:
            raise CheckpointError(
                "train.full_every writes only the rows that were touched, but this model computes "
                "its ids, so they are not known outside; write train.full_every=1"
            )
        full = Checkpoints(directory, options, notify=notify)
        deltas = None
        if full_every > 1 or (directory / _DELTAS).is_dir():
            deltas = Checkpoints(directory / _DELTAS, CheckpointOptions(keep=1), notify=notify)
        return cls(program, full, deltas, full_every, ids)

    def mark(self, wanted: Wanted | None) -> None:
        """Remembers the rows that a step touches."""
        if self.full_every == 1 or wanted is None:
            return
        for name, ids in zip(self.program.tables, wanted.ids, strict=True):
            rows = self.program.tables[name].table.rows
            self._touched.setdefault(name, Touched.none(rows)).mark(np.asarray(ids))

    def touch(self, rows: np.ndarray) -> None:
        """Remembers rows that began anew, in all tables."""
        if self.full_every > 1:
            for name, placed in self.program.tables.items():
                self._touched.setdefault(name, Touched.none(placed.table.rows)).mark(rows)

    def save(self, step: int, state: SparseState, files: Mapping[str, str]) -> None:
        """Begins to write; the state may be donated once this returns."""
        if self._base is None or self._since + 1 >= self.full_every or self.deltas is None:
            self.full.save(step, self._whole(state), files)
            self._base, self._since, self._touched = step, 0, {}
            return
        # The full one must be there before anything builds on it.
        self.full.wait()
        tables = {
            name: self._touched.get(name, Touched.none(placed.table.rows)).delta(
                placed, state.tables[name]
            )
            for name, placed in self.program.tables.items()
        }
        told = {"base": self._base, "rows": {name: len(t["ids"]) for name, t in tables.items()}}
        self.deltas.save(
            step,
            {**_others(state), **self._ids(), "tables": jax.tree.map(on_host, tables)},
            {**files, _DELTA: json.dumps(told)},
        )
        self._since += 1

    def latest(self) -> Found | None:
        """The newest state that is whole, or None where there is none.

        Raises:
          CheckpointError: there are checkpoints, but none is whole or of this model.
        """
        if not self.full.steps():
            self.full.require_none_lost()
            return None
        target = self._target(lambda placed: placed.table.rows)
        found = self.full.restore(None, target)
        step, tree, files = found.step, found.state, dict(found.files)
        self._base = step
        tables = {name: _numpy(arrays) for name, arrays in tree["tables"].items()}
        newer = self._delta(step)
        if newer is not None:
            step, delta, files = newer
            for name, arrays in delta["tables"].items():
                tables[name] = with_delta(tables[name], _numpy(arrays))
                changed = Touched.none(self.program.tables[name].table.rows)
                changed.mark(np.asarray(arrays["ids"]))
                self._touched[name] = changed
            tree = delta
        if self.ids is not None:
            self.ids.take_over(
                {
                    name: array if name == "seen" else array.view(np.int64)
                    for name, array in _numpy(tree["ids"]).items()
                }
            )
        state = SparseState(
            dense=tree["dense"],
            rest=tree["rest"],
            optimizer=tree["optimizer"],
            tables={
                name: restored(placed, tables[name]) for name, placed in self.program.tables.items()
            },
            step=tree["step"],
        )
        return Found(step, state, files)

    def _delta(self, base: int) -> tuple[int, Any, dict[str, str]] | None:
        if self.deltas is None or not self.deltas.steps():
            return None
        try:
            told = self.deltas.restore(None, {}, partial=True)
            about = json.loads(told.files[_DELTA])
            if about["base"] != base or told.step <= base:
                return None
            rows = about["rows"]
            target = self._target(lambda placed: rows[placed.name], ids=True)
            found = self.deltas.restore(told.step, target)
        except CheckpointError as error:
            self.deltas.say(f"the rows since step {base} cannot be read: {error}")
            return None
        return found.step, found.state, dict(found.files)

    def _whole(self, state: SparseState) -> dict[str, Any]:
        tables = {
            name: kept(placed, state.tables[name]) for name, placed in self.program.tables.items()
        }
        return {**_others(state), **self._ids(), "tables": jax.tree.map(on_host, tables)}

    def _ids(self) -> dict[str, Any]:
        """The map of ids, as arrays of 32 bits: jax has no others by default."""
        if self.ids is None:
            return {}
        arrays = {name: array.view(np.int32) for name, array in self.ids.arrays().items()}
        return {"ids": {name: on_host(array) for name, array in arrays.items()}}

    def _target(self, rows: Callable[[Any], int], *, ids: bool = False) -> dict[str, Any]:
        tables = {}
        for name, placed in self.program.tables.items():
            count = rows(_Named(name, placed))
            tables[name] = kept_shapes(placed, count)
            if ids:
                tables[name]["ids"] = host_shape(count, dtype=np.int32)
        known = self._ids()
        target = {
            name: {key: host_shape(*x.shape, dtype=np.int32) for key, x in arrays.items()}
            for name, arrays in known.items()
        }
        return {**_others(self.program.state_shapes), **target, "tables": tables}

    def close(self) -> None:
        """Waits for the last save and gives the locks back."""
        try:
            self.full.close()
        finally:
            if self.deltas is not None:
                self.deltas.close()

    def __enter__(self) -> Savings:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError:
            # The error that ended the run is the one to see, not this one in its stead.
            if error is None:
                raise


@dataclass(frozen=True)
class _Named:
    name: str
    placed: Any

    @property
    def table(self) -> Any:
        return self.placed.table


def _others(state: Any) -> dict[str, Any]:
    return {
        "dense": state.dense,
        "rest": state.rest,
        "optimizer": state.optimizer,
        "step": state.step,
    }


def _numpy(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in arrays.items()}
