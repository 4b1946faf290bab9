"""Decides what a data set is: units that are read in any order, samples with an id each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shardpar.errors import DataError
from shardpar.ps.data.bad_lines import BadLines
from shardpar.ps.data.batch import concatenate
from shardpar.ps.data.files import DataFile, Unit, line_blocks, line_number, units_of
from shardpar.ps.data.rows import Parsed, RowShape

# A block of so many lines stays in the processor's cache while it is parsed.
_BLOCK_LINES = 512

FILE_SHIFT = 40
"""A sample's id is its file's index, then 40 bits for the byte (or row) where it begins."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Samples that were read but not parsed.

    Attributes:
      samples: int64: their ids.
      rows: what the source made them of, as long as `samples`.
      unit: index of the unit they are of.
      offset: where in the unit this piece begins: reading from there gives it again.
    """

    samples: np.ndarray
    rows: Any
    unit: int
    offset: int

    def __len__(self) -> int:
        return self.samples.size


class Source(Protocol):
    """A data set on disk."""

    shape: RowShape

    @property
    def units(self) -> tuple[Unit, ...]:
        """What the data is read in."""

    @property
    def identity(self) -> dict[str, Any]:
        """What two runs must share to see the same samples under the same ids."""

    def pieces(self, unit: int, offset: int) -> Iterator[Piece]:
        """The samples of a unit, from a piece's offset on."""

    def joined(self, rows: Sequence[Any]) -> Any:
        """The `rows` of several pieces as those of one."""

    def parse(self, rows: Any, which: np.ndarray) -> Parsed:
        """Some of the rows, parsed."""

    def locate(self, sample: int) -> str:
        """File and line of a sample, for people."""


class TextFormat(Protocol):
    """Parses lines; made by the module of each format."""

    name: str
    shape: RowShape

    def parse(self, lines: Sequence[bytes]) -> Parsed:
        """Reads lines; those that cannot be read are in `bad`."""


@dataclass(frozen=True, eq=False)
class TextSource:
    """Lines of text files. Blank lines are no samples, nor is a header.

    Attributes:
      files: in their order.
      form: of the lines.
      header: the first line of each file, where it is no sample.
    """

    files: tuple[DataFile, ...]
    form: TextFormat
    header: bytes | None = None

    @property
    def shape(self) -> RowShape:
        """Of the rows."""
        return self.form.shape

    @property
    def units(self) -> tuple[Unit, ...]:
        """A few megabytes of a plain file each, or a whole compressed one."""
        return units_of(self.files)

    @property
    def identity(self) -> dict[str, Any]:
        """The files' digests and their format."""
        return {"format": self.form.name, "files": [file.digest for file in self.files]}

    def pieces(self, unit: int, offset: int) -> Iterator[Piece]:
        """The lines of a unit."""
        part = self.units[unit]
        for start, block in line_blocks(self.files[part.file], part, offset):
            lines = block.split(b"\n")
            begins = np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)) + 1)
            begins = np.concatenate(([start], start + begins[:-1]))
            if start == 0:
                lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            blank = [place for place, line in enumerate(lines) if not line or line.isspace()]
            if start == 0 and self.header is not None:
                full = set(range(len(lines))) - set(blank)
                blank += [min(full)] if full else []
            if blank:
                kept = np.ones(len(lines), bool)
                kept[blank] = False
                lines = [lines[place] for place in np.flatnonzero(kept)]
                begins = begins[kept]
            if lines:
                yield Piece(begins | part.file << FILE_SHIFT, lines, unit, offset=start)

    def joined(self, rows: Sequence[list[bytes]]) -> list[bytes]:
        """The lines of several pieces."""
        return rows[0] if len(rows) == 1 else [line for part in rows for line in part]

    def parse(self, rows: list[bytes], which: np.ndarray) -> Parsed:
        """Some of the lines."""
        places = which.tolist()
        return parse_blocks([rows[place] for place in places], self.form)

    def locate(self, sample: int) -> str:
        """File and line."""
        file = self.files[sample >> FILE_SHIFT]
        return f"{file.path}:{line_number(file, sample & ((1 << FILE_SHIFT) - 1))}"


def parse_blocks(lines: Sequence[bytes], form: TextFormat) -> Parsed:
    """Parses lines a block at a time."""
    if len(lines) <= _BLOCK_LINES:
        return form.parse(lines)
    starts = range(0, len(lines), _BLOCK_LINES)
    parts = [form.parse(lines[start : start + _BLOCK_LINES]) for start in starts]
    bad = tuple(
        (start + row, reason)
        for start, part in zip(starts, parts, strict=True)
        for row, reason in part.bad
    )
    return Parsed(concatenate([part.batch for part in parts]), bad)


def parse_samples(
    source: Source, rows: Any, which: np.ndarray, samples: np.ndarray, bad: BadLines
) -> Parsed:
    """Parses some rows, gives them their samples' ids, and counts the bad ones.

    Raises:
      DataError: too many are bad.
    """
    parsed = source.parse(rows, which)
    ids = samples[which]
    found = [(int(ids[row]), reason) for row, reason in parsed.bad]
    bad.add(which.size, found, source.locate)
    if found:
        ids[[row for row, _ in parsed.bad]] = -1
    return Parsed(parsed.batch.of_samples(ids), parsed.bad)


def same_header(files: Sequence[DataFile], firsts: Sequence[bytes]) -> None:
    """Checks that files with a header have the same one.

    Raises:
      DataError: one differs from the first.
    """
    for file, first in zip(files, firsts, strict=True):
        if first.rstrip(b"\r") != firsts[0].rstrip(b"\r"):
            raise DataError(
                f"{file.path}:1: the columns are not those of {files[0].path}; "
                "read files with different columns by themselves"
            )
