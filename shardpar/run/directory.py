"""Decides where everything a run leaves behind has its place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from shardpar.errors import RunError, UserError
from shardpar.run.durable import write_atomically

_STAMP = re.compile(r"\d{8}-\d{6}(-\d+)?")


@dataclass(frozen=True)
class RunDirectory:
    """One run's directory.

    Attributes:
      path: its root, usually `runs/<name>/<start time>`.

    >>> RunDirectory(Path("runs/gpt/20250101-120000")).metrics.as_posix()
    'runs/gpt/20250101-120000/metrics.jsonl'
    """

    path: Path

    @classmethod
    def fresh(cls, name: str, now: datetime, root: Path = Path("runs")) -> RunDirectory:
        """Creates a directory that no other run has.

        Args:
          name: the experiment's name, a plain file name.
          now: when the run starts.
          root: where runs are kept.

        Returns:
          `<root>/<name>/<YYYYmmdd-HHMMSS>`; runs that start in the same second get `-2`, `-3`…

        Raises:
          UserError: the name is not a plain file name.
          RunError: the directory cannot be made.
        """
        if Path(name).name != name or name in {"", ".", ".."}:
            raise UserError(
                f"a run cannot be called {name!r}: use a plain name without '/', such as 'gpt'"
            )
        stamp = now.strftime("%Y%m%d-%H%M%S")
        attempt = 1
        while True:
            path = root / name / (stamp if attempt == 1 else f"{stamp}-{attempt}")
            try:
                path.mkdir(parents=True)
            except FileExistsError as error:
                if not path.is_dir():
                    raise _cannot_make(path, error) from error
                attempt += 1
            except OSError as error:
                raise _cannot_make(path, error) from error
            else:
                return cls(path)

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """Opens the directory of a run that was started before.

        Args:
          path: a run's directory, or a directory of runs, of which the newest is taken.

        Returns:
          The run's directory.

        Raises:
          UserError: there is no run.
        """
        if not path.is_dir():
            raise UserError(f"{path} is not there; name the directory of a run")
        for inner in (path.absolute(), *path.absolute().parents):
            # A checkpoint has the run's config beside it, and would pass for a run.
            if inner.name == "checkpoints" and cls(inner.parent).is_run():
                outer = path if inner == path.absolute() else inner
                raise UserError(f"{path} is inside a run; name the run, {outer.parent}")
        if cls(path).is_run():
            return cls(path)
        inside = [child for child in path.iterdir() if cls(child).is_run()]
        unsorted = sorted(child.name for child in inside if not _STAMP.fullmatch(child.name))
        if len(inside) > 1 and unsorted:
            raise UserError(
                f"{path} holds {len(inside)} runs, and {unsorted[0]} does not say when it was "
                f"started; name the run, such as {path / unsorted[0]}"
            )
        if inside:
            # Names sort by start time, but for `-10` after `-9`.
            return cls(
                max(inside, key=lambda child: (child.name[:15], len(child.name), child.name))
            )
        raise UserError(
            f"{path} holds no run: neither config.yaml nor checkpoints/ is in it; "
            "name a directory such as runs/<name>/<start time>"
        )

    def make(self) -> None:
        """Creates the directory unless it is there.

        Raises:
          RunError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_make(self.path, error) from error

    def write(self, texts: Mapping[str, str]) -> None:
        """Writes small files, each whole or not at all.

        Args:
          texts: by file name.

        Raises:
          RunError: one cannot be written; those before it are.
        """
        for file, text in texts.items():
            try:
                write_atomically(self.path / file, text.encode())
            except OSError as error:
                raise RunError(
                    f"{self.path / file} cannot be written: {error.strerror}; make room first"
                ) from error

    def is_run(self) -> bool:
        """Whether a run has written here."""
        return self.config_yaml.is_file() or self.checkpoints.is_dir()

    @property
    def checkpoints(self) -> Path:
        """Where the step directories are."""
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """The lock file, held by the trainer that writes here; `Checkpoints` takes it."""
        return self.checkpoints / ".lock"

    @property
    def metrics(self) -> Path:
        """One JSON object per line: what was measured."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The same numbers for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """The page to look at and to send to others."""
        return self.path / "report.html"

    @property
    def config_yaml(self) -> Path:
        """The resolved config; training from it gives the same run."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """The plan the run was lowered from."""
        return self.path / "plan.yaml"


def _cannot_make(path: Path, error: OSError) -> RunError:
    return RunError(f"the run directory {path} cannot be made: {error.strerror}; choose another")
