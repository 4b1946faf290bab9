"""Writes files so that a crash leaves the old content or the new one, never a mixture."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file in one step that survives kill -9 and a power cut.

    Args:
      path: the file to write; its directory must exist.
      content: all of what it shall hold.

    Raises:
      OSError: the disk is full or the directory cannot be written; the old file is untouched.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    os.replace(draft, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes the names inside a directory durable; fsync of a file covers its bytes alone.

    Args:
      directory: the directory whose entries were added, renamed or removed.

    Raises:
      OSError: the directory is gone or the disk failed.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
