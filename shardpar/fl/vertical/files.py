"""Files of a party's half of a model: MessagePack, typed, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec

from shardpar.errors import DataError

S = TypeVar("S", bound=msgspec.Struct)


def write(path: Path, content: msgspec.Struct) -> None:
    """Writes a struct, readable to this user only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(msgspec.msgpack.encode(content))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read(path: Path, kind: type[S]) -> S:
    """The struct of this kind in a file.

    Raises:
      DataError: the file is not there, or holds something else.
    """
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is no half of a vertical model of this kind: {error}") from None
