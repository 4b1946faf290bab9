"""Decides which samples are in which batch, on which process, exactly, across restarts.

The order of the samples is a function of the data, the seed and the shuffle buffer alone: not
of the batch size, the processes, or of how often the run was interrupted. Units of the data
come in a random order; their samples fill windows, and each window is shuffled. Every process
reads every window but parses only its own rows of each batch: cutting lines costs a tenth of
parsing them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from shardpar.errors import DataError
from shardpar.ps.data.bad_lines import BadLines
from shardpar.ps.data.batch import SparseBatch, concatenate
from shardpar.ps.data.hashing import mix
from shardpar.ps.data.options import SparseDataOptions
from shardpar.ps.data.source import Piece, Source, parse_samples

_FORMAT = "shardpar-sparse-position/1"
_U = np.uint64


@dataclass(frozen=True)
class Process:
    """Which share of each batch is read here.

    Attributes:
      index: of this process.
      count: of all of them; divides the batch.
    """

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Position:
    """Between two batches.

    Attributes:
      epoch: from 0.
      place: of a unit in the epoch's order.
      offset: of a piece in that unit: a window begins there.
      taken: samples of the window that are consumed.
      samples: consumed in this epoch.
    """

    epoch: int = 0
    place: int = 0
    offset: int = 0
    taken: int = 0
    samples: int = 0


@dataclass(frozen=True, eq=False)
class _Window:
    start: Position
    rows: Any
    samples: np.ndarray
    order: np.ndarray


class SparseBatches:
    """An iterator over batches that can say where it is and go on from there.

    Each epoch has every sample once; its last batch is filled up with rows of weight 0, and so
    are the rows of lines that could not be read. Made by `train_batches` and `eval_batches`.

    Attributes:
      bad: what was unreadable so far, in this epoch.
    """

    def __init__(
        self,
        source: Source,
        global_batch: int,
        *,
        shuffle: int,
        seed: int,
        bad_share: float,
        process: Process,
        epochs: int | None,
    ) -> None:
        self._source = source
        self._global_batch = global_batch
        self._shuffle, self._seed = shuffle, seed
        self._bad_share, self._epochs = bad_share, epochs
        share = global_batch // process.count
        self._mine = range(process.index * share, (process.index + 1) * share)
        self._identity = {**source.identity, "shuffle": shuffle}
        self._start_at(Position())

    def _start_at(self, position: Position) -> None:
        self._position, self._whole = position, True
        self.bad = BadLines(self._bad_share)
        self._batches = self._read(position)

    def __iter__(self) -> Iterator[SparseBatch]:
        return self

    def __next__(self) -> SparseBatch:
        batch, self._position = next(self._batches)
        return batch

    @property
    def position(self) -> dict[str, Any]:
        """Where the iterator stands, a few short JSON values."""
        return {
            "format": _FORMAT,
            **vars(self._position),
            "seed": self._seed,
            "data": dict(self._identity),
        }

    @property
    def epoch(self) -> int:
        """Epochs that were finished."""
        return self._position.epoch

    def end(self) -> None:
        """Says that an epoch is over, as the first batch of the next does by itself.

        Raises:
          DataError: too many of its lines are bad, if all of them were seen here.
        """
        if self._whole:
            self.bad.end()

    def skip(self, batches: int | None = None) -> int:
        """Goes past so many batches, or all that are left, without parsing a line of them.

        Lines that could not be read are not noticed there.

        Returns:
          How many there were.
        """
        mine, self._mine = self._mine, range(0)
        try:
            return sum(1 for _ in islice(self, batches))
        finally:
            self._mine = mine

    def restore(self, position: Mapping[str, Any]) -> None:
        """Goes on after the samples of `position`, perhaps with other batches or processes.

        Args:
          position: what `position` was, of an iterator over the same data with the same seed.

        Raises:
          DataError: it is of other data, another order, or not a position at all; the
            iterator stays where it is.
        """
        self._start_at(self._checked(position))

    def _checked(self, position: Mapping[str, Any]) -> Position:
        if not isinstance(position, Mapping) or position.get("format") != _FORMAT:
            raise DataError(
                f"data position: {_FORMAT!r} was expected, got {position!r:.80}; "
                "use the shardpar version that saved it"
            )
        names = ("epoch", "place", "offset", "taken", "samples")
        numbers = {name: position.get(name) for name in names}
        if any(type(number) is not int or not 0 <= number < 2**60 for number in numbers.values()):
            raise DataError(
                f"data position: it is damaged ({numbers!r:.120}); "
                "resume from an earlier checkpoint"
            )
        if position.get("data") != self._identity:
            raise DataError(
                "data position: the data is not what the run began with "
                f"({position.get('data')!r:.200} then, {self._identity!r:.200} now); restore the "
                "files, their format and data.shuffle, or begin a new run"
            )
        if position.get("seed") != self._seed:
            raise DataError(
                f"data position: the run began with data.seed={position.get('seed')} and data.seed "
                f"is {self._seed} now, another order of the data; "
                f"write data.seed={position.get('seed')}, or begin a new run"
            )
        found = Position(**numbers)
        if found.place > len(self._source.units):
            raise DataError("data position: it is beyond the data; resume from an earlier one")
        return found

    def _read(self, start: Position) -> Iterator[tuple[SparseBatch, Position]]:
        while self._epochs is None or start.epoch < self._epochs:
            position = start
            for batch, position in self._epoch(start):
                yield batch, position
            if position.samples == 0:
                raise DataError("the data has no sample; give it at least one line")
            self.end()
            self.bad, self._whole = BadLines(self._bad_share), True
            start = Position(epoch=start.epoch + 1)

    def _epoch(self, start: Position) -> Iterator[tuple[SparseBatch, Position]]:
        parts: list[SparseBatch] = []
        filled, position = 0, start
        self._whole = self._whole and start.samples == 0
        for number, window in enumerate(self._windows(start)):
            self._whole = self._whole and len(self._mine) > 0
            # Only the window that a run stopped in begins in its middle, or at its end.
            taken = start.taken if number == 0 else 0
            while taken < window.order.size:
                count = min(self._global_batch - filled, window.order.size - taken)
                first = max(self._mine.start - filled, 0)
                stop = max(min(self._mine.stop - filled, count), first)
                if stop > first:
                    which = window.order[taken + first : taken + stop]
                    found = parse_samples(
                        self._source, window.rows, which, window.samples, self.bad
                    )
                    parts.append(found.batch)
                filled, taken = filled + count, taken + count
                position = replace(window.start, taken=taken, samples=position.samples + count)
                if filled == self._global_batch:
                    yield concatenate(parts) if parts else self._nothing(), position
                    parts, filled = [], 0
        if filled:
            batch = concatenate(parts) if parts else self._nothing()
            yield batch.padded(len(self._mine)), position

    def _nothing(self) -> SparseBatch:
        rows = self._source.shape.blank(0)
        none = np.zeros(0)
        return SparseBatch(
            rows.ids, rows.values, none, none, none, rows.fields, rows.dense, rows.queries
        )

    def _windows(self, start: Position) -> Iterator[_Window]:
        salt = _salt(self._seed, start.epoch)
        order = np.arange(len(self._source.units))
        if self._shuffle:
            order = _permutation(order, salt)
        pieces: list[Piece] = []
        held, at = 0, start
        for place in range(start.place, order.size):
            offset = start.offset if place == start.place else 0
            for piece in self._source.pieces(int(order[place]), offset):
                if not pieces:
                    at = Position(start.epoch, place, piece.offset)
                pieces.append(piece)
                held += len(piece)
                if held >= self._shuffle:
                    yield self._window(at, pieces, salt)
                    pieces, held = [], 0
        if pieces:
            yield self._window(at, pieces, salt)

    def _window(self, at: Position, pieces: list[Piece], salt: np.uint64) -> _Window:
        samples = np.concatenate([piece.samples for piece in pieces])
        rows = self._source.joined([piece.rows for piece in pieces])
        order = np.arange(samples.size)
        if self._shuffle:
            order = _permutation(samples, salt)
        return _Window(at, rows, samples, order)


def train_batches(
    source: Source,
    options: SparseDataOptions,
    global_batch: int,
    *,
    process: Process | None = None,
    epochs: int | None = None,
) -> SparseBatches:
    r"""Batches to train on, shuffled as the options say.

    Args:
      source: what `open_data` gave.
      options: for shuffle, seed and bad_share.
      global_batch: samples per batch over all processes.
      process: the share that is read here; None reads all.
      epochs: to stop after; None goes on without end.

    Raises:
      DataError: the batch cannot be dealt to the processes.

    >>> import tempfile
    >>> from shardpar.ps.data.open import open_data
    >>> with tempfile.NamedTemporaryFile("w", suffix=".svm") as file:
    ...     _ = file.write("1 3:1\n-1 2:1 5:0.5\n1 1:1\n")
    ...     file.flush()
    ...     options = SparseDataOptions(path=file.name, shuffle=0)
    ...     batches = train_batches(open_data(options), options, global_batch=2, epochs=1)
    ...     [(batch.labels.tolist(), batch.weights.tolist()) for batch in batches]
    [([1.0, -1.0], [1.0, 1.0]), ([1.0, 0.0], [1.0, 0.0])]
    """
    return _batches(source, options, global_batch, process or Process(), options.shuffle, epochs)


def eval_batches(
    source: Source,
    options: SparseDataOptions,
    global_batch: int,
    *,
    process: Process | None = None,
) -> SparseBatches:
    """All samples once, in the order of the files; arguments as for `train_batches`."""
    return _batches(source, options, global_batch, process or Process(), 0, 1)


def _batches(
    source: Source,
    options: SparseDataOptions,
    global_batch: int,
    process: Process,
    shuffle: int,
    epochs: int | None,
) -> SparseBatches:
    if global_batch < 1 or global_batch % process.count:
        raise DataError(
            f"a batch of {global_batch} samples cannot be dealt evenly to {process.count} "
            f"processes; write a multiple of {process.count}"
        )
    return SparseBatches(
        source, global_batch, shuffle=shuffle, seed=options.seed, bad_share=options.bad_share,
        process=process, epochs=epochs,
    )  # fmt: skip


def _salt(seed: int, epoch: int) -> np.uint64:
    salt = mix(np.array([seed + 1], _U))
    return mix(salt ^ _U(epoch))[0]


def _permutation(keys: np.ndarray, salt: np.uint64) -> np.ndarray:
    """Places in an order that depends on the keys, not on a library's random numbers."""
    return np.argsort(mix(keys.astype(_U) ^ salt), kind="stable")
