"""Decides whether a stored step is whole: what its manifest promises against what the disk holds.

Orbax restores a flipped bit without a word, so every file of a step has its SHA-256 in
`manifest.json`, which ends with the SHA-256 of its own text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardpar.errors import CheckpointError
from shardpar.run.durable import sync_directory, write_atomically

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "shardpar-checkpoint/1"

# Hashing releases the interpreter's lock; more threads than this only wait for the disk.
_HASH_THREADS = 4


class ManifestError(ValueError):
    """A manifest whose text cannot be believed; the caller knows which step it is of."""


@dataclass(frozen=True)
class FileRecord:
    """One file as it was when the step was committed."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ArrayRecord:
    """One array of the state.

    Attributes:
      shape: its dims.
      dtype: its dtype's name; `key<...>` for random keys.
    """

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Manifest:
    """What a committed step consists of.

    Attributes:
      step: how many training steps the state has seen.
      arrays: each array of the state by name.
      files: each file of the step by its path inside the step directory.
    """

    step: int
    arrays: Mapping[str, ArrayRecord]
    files: Mapping[str, FileRecord]

    @property
    def stored_bytes(self) -> int:
        """How much disk the step takes."""
        return sum(record.size_bytes for record in self.files.values())


@dataclass(frozen=True)
class Fault:
    """One way in which a step differs from its manifest.

    Attributes:
      file: the file's path inside the step directory.
      kind: `extra` files are odd but harmless: nothing reads them.
    """

    file: str
    kind: Literal["damaged", "missing", "extra"]

    def __str__(self) -> str:
        return f"{self.file} ({self.kind})"


def seal(directory: Path, step: int, arrays: Mapping[str, ArrayRecord]) -> Manifest:
    """Hashes all files of a finished step, makes them durable, and writes the manifest.

    Args:
      directory: the step directory, complete but for its manifest.
      step: how many training steps the state has seen.
      arrays: what the state consists of.

    Returns:
      The manifest as written.

    Raises:
      OSError: the disk is full or failing; there is no manifest then.
    """
    paths = _files(directory)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        records = list(pool.map(lambda path: _record(directory / path, durable=True), paths))
    for folder, _, _ in os.walk(directory, topdown=False):
        sync_directory(Path(folder))
    manifest = Manifest(step, dict(arrays), dict(zip(paths, records, strict=True)))
    write_atomically(directory / MANIFEST_NAME, _render(manifest))
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Reads a step's manifest and believes it only if its own checksum holds.

    Args:
      directory: the step directory.

    Returns:
      The manifest.

    Raises:
      FileNotFoundError: there is none, so the step was never committed.
      ManifestError: the text is not what was written.
      CheckpointError: the text is whole, but in a format this version does not know.
    """
    path = directory / MANIFEST_NAME
    try:
        return _parse(path.read_bytes())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def check(directory: Path) -> tuple[Fault, ...]:
    """Compares every byte of a step with its manifest.

    Args:
      directory: the step directory.

    Returns:
      What is wrong, empty when all is well. A manifest that cannot be believed is the only
      fault reported then, since nothing else can be judged without it.

    Raises:
      CheckpointError: the manifest is whole, but in a format this version does not know.
    """
    try:
        manifest = read_manifest(directory)
    except FileNotFoundError:
        return (Fault(MANIFEST_NAME, "missing"),)
    except (ManifestError, OSError):
        return (Fault(MANIFEST_NAME, "damaged"),)
    present = set(_files(directory))
    missing = [Fault(path, "missing") for path in manifest.files if path not in present]
    extra = [Fault(path, "extra") for path in sorted(present - set(manifest.files))]
    kept = [path for path in manifest.files if path in present]
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        intact = list(pool.map(lambda path: _intact(directory / path, manifest.files[path]), kept))
    damaged = [Fault(path, "damaged") for path, ok in zip(kept, intact, strict=True) if not ok]
    return (*damaged, *missing, *extra)


def _files(directory: Path) -> list[str]:
    found = []
    for folder, _, names in os.walk(directory):
        found += [(Path(folder) / name).relative_to(directory).as_posix() for name in names]
    return sorted(path for path in found if path != MANIFEST_NAME)


def _record(path: Path, *, durable: bool) -> FileRecord:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if durable:
            os.fsync(file.fileno())
        return FileRecord(os.fstat(file.fileno()).st_size, digest)


def _intact(path: Path, promised: FileRecord) -> bool:
    try:
        # The size first: a truncated file of many gigabytes need not be read.
        if path.stat().st_size != promised.size_bytes:
            return False
        return _record(path, durable=False) == promised
    except OSError:
        return False


def _render(manifest: Manifest) -> bytes:
    # One array or file per line: people read and diff manifests.
    arrays = {
        name: {"shape": list(record.shape), "dtype": record.dtype}
        for name, record in manifest.arrays.items()
    }
    files = {
        path: {"size_bytes": record.size_bytes, "sha256": record.sha256}
        for path, record in manifest.files.items()
    }
    body = (
        f'{{\n"format": "{MANIFEST_FORMAT}",\n"step": {manifest.step},\n'
        f'"arrays": {_table(arrays)},\n"files": {_table(files)}'
    ).encode()
    return body + _signature(body)


def _table(rows: Mapping[str, object]) -> str:
    lines = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def _signature(body: bytes) -> bytes:
    return f',\n"sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _parse(text: bytes) -> Manifest:
    body = text[: -len(_signature(b""))]
    if text != body + _signature(body):
        raise ManifestError("its text does not match its own checksum")
    value = json.loads(text)
    if value["format"] != MANIFEST_FORMAT:
        raise CheckpointError(
            f"format {value['format']!r} is not {MANIFEST_FORMAT!r}: "
            "it was written by another version of shardpar, which can read it"
        )
    return Manifest(
        step=value["step"],
        arrays={
            name: ArrayRecord(tuple(row["shape"]), row["dtype"])
            for name, row in value["arrays"].items()
        },
        files={
            path: FileRecord(row["size_bytes"], row["sha256"])
            for path, row in value["files"].items()
        },
    )
