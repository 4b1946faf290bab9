"""A log of records that survives a kill: what was acknowledged is read back, or an error says why.

A file is a line of text and then records: a header of a length, a number, a CRC of the
payload and a CRC of the header itself, then the payload. A record that a kill cut short can
only be the last one, and was never acknowledged: it is cut off. Anything else that does not
fit its checksum is damage, and is never skipped. Write-ahead logging is Mohan et al.,
"ARIES" (1992), section 3; here every record can be played again, so there is no undo.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from shardpar.errors import CheckpointError
from shardpar.run.durable import sync_directory

Fsync = Literal["each", "second", "never"]

_MAGIC = b"shardpar-log/1\n"
_FIELDS = struct.Struct("<QQI")
_HEADER_CRC = struct.Struct("<I")
_HEADER_BYTES = _FIELDS.size + _HEADER_CRC.size


class RecordLog:
    """A file that records are added to.

    Args:
      path: a new file, or one that `read_records` has been through.
      fsync: when records must be on the disk. "each" before every acknowledgement: nothing is
        lost when the power goes. "second" at most a second later. "never" leaves it to the
        operating system. The death of the process alone loses nothing under any of them.
      number: of the next record.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "log"
      >>> with RecordLog(path) as log:
      ...     log.add(b"one")
      >>> list(read_records(path))
      [b'one']
    """

    def __init__(self, path: Path, *, fsync: Fsync = "never", number: int = 0) -> None:
        if fsync not in ("each", "second", "never"):
            raise ValueError(f"fsync is 'each', 'second' or 'never', not {fsync!r}")
        self._fsync, self._number, self._synced_s = fsync, number, time.monotonic()
        new = not path.exists()
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._size = self._file.tell()
        if new or not self._size:
            self._write(_MAGIC)
            self.sync()
            sync_directory(path.parent)

    def __enter__(self) -> RecordLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, payload: bytes) -> None:
        """Writes a record; when this returns, the death of the process cannot lose it.

        Raises:
          OSError: the disk is full or failed; the file is as it was.
        """
        self._write(framed(payload, self._number))
        self._number += 1
        now_s = time.monotonic()
        if self._fsync == "each" or (self._fsync == "second" and now_s - self._synced_s > 1):
            self.sync()

    def sync(self) -> None:
        """Brings all records to the disk."""
        os.fsync(self._file.fileno())
        self._synced_s = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            # Half a record in the middle of a log could not be told from damage.
            os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += len(content)


def framed(payload: bytes, number: int) -> bytes:
    """A record as it stands in a file."""
    fields = _FIELDS.pack(len(payload), number, zlib.crc32(payload))
    return fields + _HEADER_CRC.pack(zlib.crc32(fields)) + payload


def read_records(path: Path, *, closed: bool = False) -> Iterator[bytes]:
    """The payloads of a log, in order; a last record cut short by a kill is cut off the file.

    Args:
      path: the log; one that is not there has no records.
      closed: the log was followed by another, so that no kill can have cut its end.

    Raises:
      CheckpointError: a record is damaged, or one is missing.
    """
    if not path.exists():
        return
    size = path.stat().st_size
    if size < len(_MAGIC):
        _require(_MAGIC.startswith(path.read_bytes()), path, 0, "does not begin as a log does")
        os.truncate(path, 0)
        return
    with open(path, "rb") as file:
        _require(file.read(len(_MAGIC)) == _MAGIC, path, 0, "does not begin as a log does")
        at, number = len(_MAGIC), 0
        while at < size:
            payload = _record(file, path, at, size, number)
            if payload is None:
                break
            yield payload
            at, number = at + _HEADER_BYTES + len(payload), number + 1
    if at < size:
        _require(not closed, path, at, "ends in the middle of a record")
        os.truncate(path, at)


def _record(file: BinaryIO, path: Path, at: int, size: int, number: int) -> bytes | None:
    """The record at a place of a file, or None where it was cut short."""
    header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        return None
    fields = header[: _FIELDS.size]
    if not any(header):
        # Some file systems leave zeros where the power went before bytes arrived.
        rest = file.read()
        _require(not any(rest), path, at, "has zeros in the place of a record")
        return None
    good = _HEADER_CRC.unpack(header[_FIELDS.size :])[0] == zlib.crc32(fields)
    _require(good, path, at, "has a record whose header does not fit its checksum")
    length, found, crc = _FIELDS.unpack(fields)
    _require(found == number, path, at, f"has record {found} where {number} should be")
    if at + _HEADER_BYTES + length > size:
        return None
    payload = file.read(length)
    _require(zlib.crc32(payload) == crc, path, at, "has a record that does not fit its checksum")
    return payload


def _require(good: bool, path: Path, at: int, what: str) -> None:
    if not good:
        raise CheckpointError(
            f"{path} {what}, at byte {at}: it is damaged, and updates that were acknowledged "
            "would be lost. Start from an earlier copy of its directory"
        )


def write_snapshot(path: Path, parts: Iterable[bytes]) -> None:
    """Writes records to a file that is there whole or not at all.

    Raises:
      OSError: the disk is full; nothing is left behind.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            file.write(_MAGIC)
            number = 0
            for part in parts:
                file.write(framed(part, number))
                number += 1
            file.write(framed(b"end", number))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    os.replace(draft, path)
    sync_directory(path.parent)


def read_snapshot(path: Path) -> list[bytes]:
    """What `write_snapshot` wrote.

    Raises:
      CheckpointError: the file is damaged or shorter than it was.
    """
    data_size = path.stat().st_size
    parts = []
    with open(path, "rb") as file:
        _require(file.read(len(_MAGIC)) == _MAGIC, path, 0, "does not begin as a snapshot does")
        at = len(_MAGIC)
        while at < data_size:
            part = _record(file, path, at, data_size, len(parts))
            if part is None:
                break
            parts.append(part)
            at += _HEADER_BYTES + len(part)
    _require(bool(parts) and parts[-1] == b"end" and at == data_size, path, at, "is cut short")
    return parts[:-1]
