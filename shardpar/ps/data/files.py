"""Decides which files are read, and how their lines come out of them in bounded memory.

A plain file is cut into units of a few megabytes that can be read in any order; a compressed
one can only be read from its beginning.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shardpar.errors import DataError

UNIT_BYTES = 1 << 22
LONGEST_LINE_BYTES = 1 << 24
HEAD_BYTES = 1 << 16

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_FOREIGN = {
    b"PK\x03\x04": "it is a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "it is zstd-compressed; unpack it, or compress it with gzip",
    b"BZh": "it is bzip2-compressed; unpack it, or compress it with gzip",
    b"\xfd7zXZ": "it is xz-compressed; unpack it, or compress it with gzip",
    b"\xff\xfe": "it looks like UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "it looks like UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
}
_TEXT_CONTROLS = b"\t\n\r\x0b\x0c"
_CONTROLS = bytes(c for c in range(32) if c not in _TEXT_CONTROLS) + b"\x7f"


@dataclass(frozen=True)
class DataFile:
    """One file that data is read from.

    Attributes:
      path: as the user wrote it, globs resolved.
      size_bytes: on disk.
      compressed: by gzip, whatever the name says.
      head: the first bytes of what is in it, unpacked.
      digest: of its size, its first and its last bytes: tells files apart, not flipped bits.
    """

    path: str
    size_bytes: int
    compressed: bool
    head: bytes
    digest: str


@dataclass(frozen=True)
class Unit:
    """A part of the data that is read from its beginning to its end.

    Attributes:
      file: its index.
      start, stop: which lines: those that begin at these bytes; for Parquet which rows.
    """

    file: int
    start: int
    stop: int | None


def find_files(pattern: str, key: str = "data.path") -> tuple[DataFile, ...]:
    """Opens what `pattern` names, once, to see what it is.

    Args:
      pattern: a file, or a glob of files.
      key: of the config, to name in errors.

    Raises:
      DataError: there is none, or one is a directory, empty, or packed in a way not known.
    """
    paths = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
    if not paths or Path(pattern).exists():
        paths = [pattern]
    if len(paths) > 1:
        paths = [path for path in paths if not os.path.isdir(path)] or paths[:1]
    return tuple(_look_at(path, key) for path in paths)


def _look_at(path: str, key: str) -> DataFile:
    if "\0" in path:
        raise DataError(f"{key}: {path!r} is no file name")
    if os.path.isdir(path):
        raise DataError(
            f"{path} is a directory; name a file, or the files in it: "
            f"{key}={os.path.join(path, '*')}"
        )
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(HEAD_BYTES)
            file.seek(max(0, size - HEAD_BYTES))
            digest = hashlib.blake2b(first + file.read(HEAD_BYTES), digest_size=8)
    except FileNotFoundError:
        raise DataError(f"{key}: there is no file {path}") from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise DataError(f"{path} cannot be read: {reason}") from None
    for magic, what in _FOREIGN.items():
        if first.startswith(magic):
            raise DataError(f"{path}: {what}")
    digest.update(str(size).encode())
    compressed = first.startswith(_GZIP)
    if compressed:
        with _unpacked(path) as stream:
            first = _read(stream, HEAD_BYTES, path, 0)
    if not first.strip():
        raise DataError(f"{path} is empty; give it at least one line")
    return DataFile(path, size, compressed, first, digest.hexdigest())


def is_text(head: bytes) -> bool:
    """Whether bytes can be the beginning of lines of text.

    >>> is_text(b"1 3:0.5"), is_text(bytes(range(40)))
    (True, False)
    """
    return len(head) - len(head.translate(None, _CONTROLS)) <= len(head) // 1000


def head_lines(file: DataFile, count: int) -> list[bytes]:
    """The first lines that are not blank, without their ends; the last may be cut off."""
    lines = file.head.removeprefix(_BOM).split(b"\n")
    if len(lines) > 1 and len(file.head) >= HEAD_BYTES:
        lines.pop()
    return [line for line in lines if line and not line.isspace()][:count]


def units_of(files: tuple[DataFile, ...]) -> tuple[Unit, ...]:
    """The units of text files, in their order."""
    units: list[Unit] = []
    for index, file in enumerate(files):
        if file.compressed:
            units.append(Unit(index, 0, None))
        else:
            starts = range(0, file.size_bytes, UNIT_BYTES)
            units += [Unit(index, start, start + UNIT_BYTES) for start in starts]
    return tuple(units)


def line_blocks(file: DataFile, unit: Unit, offset: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a unit from `offset` on, as blocks of whole lines.

    Args:
      file: that the unit is of.
      unit: which lines.
      offset: 0, or where a block began: blocks are the same wherever the first one begins.

    Yields:
      Where a block begins, in unpacked bytes, and its bytes.

    Raises:
      DataError: the file is damaged, has changed, or has a line of more than 16 MiB.
    """
    if file.compressed:
        yield from _unpacked_blocks(file, offset)
    else:
        yield from (found for found in _plain_block(file, unit) if found[0] >= offset)


def _plain_block(file: DataFile, unit: Unit) -> Iterator[tuple[int, bytes]]:
    assert unit.stop is not None, "only compressed files have no end"
    try:
        with open(file.path, "rb") as stream:
            start = unit.start
            if start:
                # The line that runs across the border belongs to the unit before.
                stream.seek(start - 1)
                start += len(_line(stream, file, start)) - 1
            if start >= min(unit.stop, file.size_bytes):
                return
            block = stream.read(unit.stop - start)
            if len(block) < min(unit.stop, file.size_bytes) - start:
                raise DataError(f"{file.path} became shorter while it was read; begin again")
            if not block.endswith(b"\n"):
                block += _line(stream, file, unit.stop)
            yield start, block
    except OSError as problem:
        raise DataError(f"{file.path} cannot be read: {problem.strerror or problem}") from None


def _line(stream: BinaryIO, file: DataFile, at: int) -> bytes:
    line = stream.readline(LONGEST_LINE_BYTES)
    if len(line) == LONGEST_LINE_BYTES:
        raise DataError(_too_long(file.path, f"around byte {at}"))
    return line


def _unpacked_blocks(file: DataFile, offset: int) -> Iterator[tuple[int, bytes]]:
    with _unpacked(file.path) as stream:
        done = lines = 0
        while done < offset:
            skipped = _read(stream, min(UNIT_BYTES, offset - done), file.path, lines)
            if not skipped:
                raise DataError(f"{file.path} is shorter than it was; begin a new run")
            done += len(skipped)
            lines += skipped.count(b"\n")
        rest = b""
        while True:
            # Reads end at whole units of the file, so that blocks do not depend on the offset.
            read = done + len(rest)
            more = _read(stream, UNIT_BYTES - read % UNIT_BYTES, file.path, lines)
            block = rest + more
            cut = block.rfind(b"\n") + 1 if more else len(block)
            if cut:
                yield done, block[:cut]
                lines += block.count(b"\n")
                done += cut
            rest = block[cut:]
            if len(rest) > LONGEST_LINE_BYTES:
                raise DataError(_too_long(file.path, f"line {lines + 1}"))
            if not more:
                return


def _unpacked(path: str) -> gzip.GzipFile:
    try:
        return gzip.open(path, "rb")
    except OSError as problem:
        raise DataError(f"{path} cannot be read: {problem.strerror or problem}") from None


def _read(stream: gzip.GzipFile, count: int, path: str, lines: int) -> bytes:
    where = f"{path}: after line {lines}" if lines else f"{path}: near its beginning"
    pieces: list[bytes] = []
    # `read` of a gzip file gives less than asked for now and then.
    while count > 0:
        try:
            piece = stream.read(count)
        except EOFError:
            raise DataError(
                f"{where}, the compressed data ends too early; "
                "the file is truncated: fetch it again"
            ) from None
        except (gzip.BadGzipFile, zlib.error) as problem:
            raise DataError(
                f"{where}, the compressed data is damaged ({problem}); fetch it again"
            ) from None
        except OSError as problem:
            raise DataError(f"{path} cannot be read: {problem.strerror or problem}") from None
        if not piece:
            break
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def line_number(file: DataFile, offset: int) -> int:
    """Which line, from 1, begins at a byte; reads the file up to there."""
    lines = 1
    try:
        with _unpacked(file.path) if file.compressed else open(file.path, "rb") as stream:
            while offset > 0 and (block := stream.read(min(UNIT_BYTES, offset))):
                lines += block.count(b"\n")
                offset -= len(block)
    except (OSError, EOFError, zlib.error) as problem:
        raise DataError(f"{file.path} cannot be read: {problem}") from None
    return lines


def _too_long(path: str, where: str) -> str:
    return (
        f"{path}: {where} is longer than {LONGEST_LINE_BYTES >> 20} MiB, so this is hardly a file "
        "of samples; look at its line ends"
    )
