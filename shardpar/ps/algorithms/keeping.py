"""Checkpoints of programs that learn from a stream of batches, and how to go on from one.

A stream is a function of the data and a seed, so that a checkpoint holds the tables and how
many batches they have seen: whoever goes on makes those again without learning from them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import jax
import numpy as np
from typing_extensions import override

from shardpar.errors import ConfigError
from shardpar.ps.kept import host_shape, kept, kept_shapes, on_host, restored
from shardpar.ps.table import PlacedTable, TableState
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.options import CheckpointOptions
from shardpar.run.retention import due

_PLACE = "place.json"


@dataclass(frozen=True)
class Place:
    """How far a program is.

    Attributes:
      part: which program, where an algorithm has several, one after the other.
      done: steps of this part.
      in_pass: batches of the pass that is under way.
      losses: of the passes that are over.
      sums: what the losses of the pass under way come to, and over what.
    """

    part: int = 0
    done: int = 0
    in_pass: int = 0
    losses: tuple[float, ...] = ()
    sums: tuple[float, float] = (0.0, 0.0)


class StoppedError(Exception):
    """It was asked to stop, and has saved."""


class LearntTables(Protocol):
    """What a program with tables has, as far as its checkpoints need to know."""

    @property
    def tables(self) -> Sequence[PlacedTable]:
        """In order."""
        ...

    @property
    def devices(self) -> Sequence[jax.Device]:
        """That they lie on."""
        ...

    def init(self, seed: int = 0) -> tuple[TableState, ...]:
        """As they begin."""
        ...


class Keeper:
    """Where a program begins, and what becomes of its state now and then. This one keeps nothing.

    >>> Keeper().finished(0) is None
    True
    """

    def finished(self, part: int) -> tuple[np.ndarray, float] | None:
        """What a part came to, if it was over before: (vectors, loss)."""
        return None

    def finish(self, vectors: np.ndarray, loss: float) -> None:
        """A part is over; what it came to is kept with the next one's state."""

    def begin(
        self,
        program: LearntTables,
        seed: int,
        part: int,
        steps: int,
        batch_size: int,
    ) -> tuple[tuple[TableState, ...], Place]:
        """The tables that a part begins with, and where it is then."""
        return program.init(seed), Place(part)

    def wants(self, done: int) -> bool:
        """Whether to be given the state after so many steps of the part."""
        return False

    def take(self, program: LearntTables, states: tuple[TableState, ...], place: Place) -> None:
        """Saves the state that it wanted.

        Raises:
          StoppedError: to end the program.
        """


NOTHING = Keeper()


@dataclass
class Checkpointing(Keeper):
    """Saves every so often, and goes on from the newest checkpoint that is whole.

    Attributes:
      checkpoints: of the run, open to write.
      options: how often.
      identity: what must be the same to go on, by name, such as a digest of the data.
      should_stop: asked after every step.
    """

    checkpoints: Checkpoints
    options: CheckpointOptions
    identity: dict[str, str]
    should_stop: Callable[[], bool] = lambda: False
    _finished: list[tuple[np.ndarray, float]] = field(default_factory=list, init=False)
    _told: dict[str, Any] | None = field(default=None, init=False)
    _saved: int = field(default=0, init=False)
    _saved_s: float = field(default_factory=time.monotonic, init=False)
    _before: int = field(default=0, init=False)
    _stream: list[int] = field(default_factory=list, init=False)
    _stops: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not self.checkpoints.steps():
            self.checkpoints.require_none_lost()
            return
        found = self.checkpoints.restore(None, {}, partial=True)
        told = json.loads(found.files[_PLACE])
        differ = [n for n, value in self.identity.items() if told["identity"].get(n) != value]
        if differ:
            raise ConfigError(
                f"the run cannot go on: {', '.join(differ)} is not what it began with; bring that "
                "back, or begin a new run with another train.run_dir"
            )
        self._told, self._saved = told | {"step": found.step}, found.step
        if told["finished"]:
            shapes = {str(i): host_shape(*shape) for i, shape in enumerate(told["finished"])}
            target = {"finished": shapes}
            state = self.checkpoints.restore(found.step, target, partial=True).state
            self._finished = [
                (np.asarray(state["finished"][str(i)]), loss)
                for i, loss in enumerate(told["finished_losses"])
            ]

    @property
    def step(self) -> int:
        """That the run goes on from; 0 at its beginning."""
        return 0 if self._told is None else self._told["step"]

    @override
    def finished(self, part: int) -> tuple[np.ndarray, float] | None:
        return self._finished[part] if part < len(self._finished) else None

    @override
    def finish(self, vectors: np.ndarray, loss: float) -> None:
        self._finished.append((vectors, loss))

    @override
    def begin(
        self, program: LearntTables, seed: int, part: int, steps: int, batch_size: int
    ) -> tuple[tuple[TableState, ...], Place]:
        self._before, self._stream = part * steps, [steps, batch_size]
        told = self._told
        if told is None or told["place"]["part"] != part:
            return program.init(seed), Place(part)
        if told["stream"] != self._stream:
            raise ConfigError(
                f"the run began on {told['devices']} devices, whose batches are not those of "
                f"{len(program.devices)}; write --devices {told['devices']}"
            )
        shapes = {str(i): kept_shapes(t, t.table.rows) for i, t in enumerate(program.tables)}
        target = {"tables": shapes}
        found = self.checkpoints.restore(told["step"], target, partial=True)
        states = tuple(
            restored(placed, {n: np.asarray(x) for n, x in found.state["tables"][str(i)].items()})
            for i, placed in enumerate(program.tables)
        )
        place = told["place"]
        return states, Place(**place | {n: tuple(place[n]) for n in ("losses", "sums")})

    @override
    def wants(self, done: int) -> bool:
        self._stops = self.should_stop()
        return self._stops or due(
            self.options,
            step=self._before + done,
            now_s=time.monotonic(),
            last_step=self._saved,
            last_s=self._saved_s,
        )

    @override
    def take(self, program: LearntTables, states: tuple[TableState, ...], place: Place) -> None:
        self._save(program, states, place)
        self._saved, self._saved_s = self._before + place.done, time.monotonic()
        if self._stops:
            self.checkpoints.wait()
            raise StoppedError

    def _save(self, program: LearntTables, states: tuple[TableState, ...], at: Place) -> None:
        tables = {
            str(i): kept(placed, state)
            for i, (placed, state) in enumerate(zip(program.tables, states, strict=True))
        }
        told = {
            "identity": self.identity,
            "place": asdict(at),
            "stream": self._stream,
            "devices": len(program.devices),
            "finished": [list(vectors.shape) for vectors, _ in self._finished],
            "finished_losses": [loss for _, loss in self._finished],
        }
        state: dict[str, Any] = {"tables": jax.tree.map(on_host, tables)}
        if self._finished:
            vectors = [vectors for vectors, _ in self._finished]
            state["finished"] = {str(i): on_host(array) for i, array in enumerate(vectors)}
        self.checkpoints.save(self._before + at.done, state, {_PLACE: json.dumps(told)})
