"""Decides what the names in a checkpoint directory mean, and which of them a step may take.

```
40/             a committed step: it has a manifest
50.saving/      being written, or what a crash left of that
10.expired/     being deleted, or what a crash left of that
30.damaged/     moved aside because it is not what its manifest says
30.abandoned/   moved aside because training went on from an older step
30.incomplete/  moved aside because it had the name of a step but no manifest
```
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardpar.run.durable import sync_directory
from shardpar.run.manifest import MANIFEST_NAME

_SAVING = ".saving"
_EXPIRED = ".expired"
_ASIDE = (".damaged", ".abandoned", ".incomplete")


@dataclass(frozen=True)
class StepDirectories:
    """The steps below one directory, which need not exist yet.

    Attributes:
      directory: where the step directories are.
    """

    directory: Path

    def path(self, step: int) -> Path:
        """Where a committed step is."""
        return self.directory / str(step)

    def draft(self, step: int) -> Path:
        """Where a step is written until it is committed."""
        return self.directory / f"{step}{_SAVING}"

    def is_committed(self, step: int) -> bool:
        """Whether a step was written to its end."""
        return (self.path(step) / MANIFEST_NAME).is_file()

    def committed(self) -> tuple[int, ...]:
        """The steps that were written to their end, oldest first."""
        return tuple(step for step in self._named() if self.is_committed(step))

    def incomplete(self) -> tuple[int, ...]:
        """Directories with the name of a step but no manifest: none of ours, or tampered with."""
        return tuple(step for step in self._named() if not self.is_committed(step))

    def aside(self) -> tuple[str, ...]:
        """The names of what was moved aside."""
        kinds = (".damaged", ".abandoned", ".incomplete")
        return tuple(
            sorted(path.name for path in self._children() if path.suffix.startswith(kinds))
        )

    def publish(self, step: int) -> None:
        """Gives a finished draft the name of its step.

        Args:
          step: its manifest must be written.

        Raises:
          OSError: the disk failed.
        """
        os.rename(self.draft(step), self.path(step))
        sync_directory(self.directory)

    def delete(self, step: int) -> None:
        """Deletes a committed step; cut short, it leaves nothing that looks like one.

        Args:
          step: which one.

        Raises:
          OSError: it cannot be renamed.
        """
        doomed = self.directory / f"{step}{_EXPIRED}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(self.path(step), doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def set_aside(self, step: int, why: Literal["damaged", "abandoned", "incomplete"]) -> str:
        """Renames a step so that it is kept but never used.

        Args:
          step: which one.
          why: becomes the end of its new name.

        Returns:
          The new name.

        Raises:
          OSError: it cannot be renamed.
        """
        name, copies = f"{step}.{why}", 1
        while (self.directory / name).exists():
            copies += 1
            name = f"{step}.{why}-{copies}"
        os.rename(self.path(step), self.directory / name)
        sync_directory(self.directory)
        return name

    def clear_leftovers(self) -> None:
        """Deletes what crashes left half written or half deleted."""
        for child in self._children():
            if child.suffix in {_SAVING, _EXPIRED}:
                shutil.rmtree(child, ignore_errors=True)

    def _children(self) -> list[Path]:
        return list(self.directory.iterdir()) if self.directory.is_dir() else []

    def _named(self) -> list[int]:
        names = [path.name for path in self._children() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)
