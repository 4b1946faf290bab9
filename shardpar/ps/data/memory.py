"""Decides how arrays that are in memory, or made on the spot, are read like files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shardpar.ps.data.batch import SparseBatch
from shardpar.ps.data.clicks import CHUNK, FIELDS, ROWS, ClickLog
from shardpar.ps.data.files import Unit
from shardpar.ps.data.rows import Parsed, RowShape
from shardpar.ps.data.source import Piece


def _chunks(samples: int) -> tuple[Unit, ...]:
    return tuple(Unit(0, start, min(start + CHUNK, samples)) for start in range(0, samples, CHUNK))


def _piece(unit: Unit, index: int, offset: int) -> Iterator[Piece]:
    if offset <= unit.start and unit.stop is not None:
        places = np.arange(unit.start, unit.stop)
        yield Piece(places, places, index, unit.start)


@dataclass(frozen=True, eq=False)
class MemorySource:
    """All samples in one batch.

    >>> batch = SparseBatch(np.array([[3], [1]]), np.ones((2, 1)), np.ones(2), np.ones(2),
    ...                     np.arange(2))
    >>> source = MemorySource(batch, "mine")
    >>> next(source.pieces(0, 0)).samples.tolist()
    [0, 1]
    """

    batch: SparseBatch
    name: str

    @property
    def shape(self) -> RowShape:
        """Of the rows."""
        batch = self.batch
        return RowShape(
            batch.slots,
            0 if batch.dense is None else batch.dense.shape[1],
            with_fields=batch.fields is not None,
            with_queries=batch.queries is not None,
        )

    @property
    def units(self) -> tuple[Unit, ...]:
        """Some ten thousand samples each."""
        return _chunks(len(self.batch))

    @property
    def identity(self) -> dict[str, Any]:
        """The name and how many there are."""
        return {"format": self.name, "samples": len(self.batch)}

    def pieces(self, unit: int, offset: int) -> Iterator[Piece]:
        """The samples of a unit."""
        return _piece(self.units[unit], unit, offset)

    def joined(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """The samples of several pieces."""
        return np.concatenate(rows)

    def parse(self, rows: np.ndarray, which: np.ndarray) -> Parsed:
        """Some of the samples."""
        return Parsed(self.batch.take(rows[which]), ())

    def locate(self, sample: int) -> str:
        """The sample's number, from 1."""
        return f"{self.name}: sample {sample + 1}"


@dataclass(frozen=True, eq=False)
class ClickSource:
    """The generated click log; samples are made when they are asked for.

    >>> source = ClickSource(ClickLog(samples=10))
    >>> source.parse(np.arange(10), np.array([3])).batch.ids.shape
    (1, 39)
    """

    log: ClickLog

    @property
    def shape(self) -> RowShape:
        """Of the rows."""
        return RowShape(FIELDS, rows=ROWS, with_fields=True, field_count=FIELDS)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Some ten thousand samples each."""
        return _chunks(self.log.samples)

    @property
    def identity(self) -> dict[str, Any]:
        """The log's parameters."""
        log = self.log
        return {
            "format": "clicks",
            **{name: getattr(log, name) for name in log.__dataclass_fields__},
        }

    def pieces(self, unit: int, offset: int) -> Iterator[Piece]:
        """The samples of a unit."""
        return _piece(self.units[unit], unit, offset)

    def joined(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """The samples of several pieces."""
        return np.concatenate(rows)

    def parse(self, rows: np.ndarray, which: np.ndarray) -> Parsed:
        """Some of the samples."""
        return Parsed(self.log.of_samples(rows[which]), ())

    def locate(self, sample: int) -> str:
        """The sample's number, from 1."""
        return f"click log: sample {sample + 1}"
