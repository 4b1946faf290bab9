"""Takes the rounds of a deployed federation to its metrics file and to the screen."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shardpar.config.schema import FederatedConfig
from shardpar.run.directory import RunDirectory
from shardpar.run.metrics import MetricsLog
from shardpar.run.progress import Figures, Progress


class RoundReport:
    """Where a round's row goes, from `with` to the end of its block."""

    def __init__(
        self, folder: Path, progress: Progress, config: FederatedConfig, *, json: bool
    ) -> None:
        """Opens the metrics of a run directory.

        Args:
          folder: the run directory.
          progress: the screen.
          config: of the federation.
          json: print rows on stdout, too.

        Raises:
          RunError: the file cannot be written.
        """
        directory = RunDirectory(folder)
        self._metrics = MetricsLog(
            directory.metrics,
            tensorboard=directory.tensorboard,
            stdout=sys.stdout if json else None,
        )
        self._progress, self._rounds = progress, config.federated.rounds
        self._began = False

    def __call__(self, round_: int, row: Mapping[str, Any]) -> None:
        """Writes a row; the first of this process may be there already, or be missing."""
        if not self._began:
            # The round was committed, and then the process was killed.
            self._metrics.truncate_after(round_ - 1)
            self._began = True
        self._metrics.write(round_, row)
        self._progress.update(
            Figures(round_, self._rounds, row.get("loss"), step_s=row.get("round_s"))
        )

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self._metrics.close()
