"""Keeps what a run measured: one JSON object per line, the same numbers for TensorBoard.

Every line is valid JSON that any tool can read, and a log that a kill cut off goes on
where its checkpoint does.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeAlias

from tensorboardX import SummaryWriter

from shardpar.errors import RunError
from shardpar.run.durable import write_atomically

Value: TypeAlias = float | int | bool | str | None
Row: TypeAlias = dict[str, Any]

# How long TensorBoard may lag behind the run.
_TENSORBOARD_FLUSH_S = 10


class MetricsLog:
    """Appends rows to a run's metrics.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> with MetricsLog(path) as log:
    ...     log.write(1, {"loss": 2.5})
    ...     log.write(2, {"loss": float("nan")})
    >>> print(path.read_text().strip())
    {"step": 1, "loss": 2.5}
    {"step": 2, "loss": null, "nonfinite": ["loss"]}
    """

    def __init__(
        self, path: Path, *, tensorboard: Path | None = None, stdout: TextIO | None = None
    ) -> None:
        """Opens the log; a last line that a kill cut off is dropped.

        Args:
          path: the file of rows; created if missing.
          tensorboard: directory for TensorBoard's copy, or None for none.
          stdout: where each row is also printed, for `--json`.

        Raises:
          RunError: the file cannot be written.
        """
        self._path = path
        self._tensorboard = tensorboard
        self._stdout = stdout
        self._writer: SummaryWriter | None = None
        self._writers = 0
        self._purge_step: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
            self._whole_bytes = _whole_lines(path.read_bytes())
            self._file.truncate(self._whole_bytes)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one row, at once visible to whoever follows the file.

        Args:
          step: how many training steps were done when this was measured.
          values: numbers (also arrays of one element), texts, booleans and None by name.

        Raises:
          RunError: the disk is full; no part of the row is left behind.
          TypeError: a value is none of these.
        """
        row = {key: _plain(key, value) for key, value in values.items() if key != "step"}
        row = {"step": int(step), **row}
        line = to_line(row)
        try:
            self._append(line.encode())
        except OSError as error:
            self._file.truncate(self._whole_bytes)
            raise _cannot_write(self._path, error) from error
        self._print(line)
        for key, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if key != "step" and number and math.isfinite(value):
                self._tensorboard_add(key, float(value), int(step))

    def truncate_after(self, step: int) -> None:
        """Drops the rows of later steps, which training from a checkpoint will make anew.

        Args:
          step: the last step to keep.

        Raises:
          RunError: the file cannot be read or written; it is as it was then.
        """
        kept = [row for row in read_metrics(self._path) if row["step"] <= step]
        content = "".join(to_line(row) for row in kept).encode()
        try:
            write_atomically(self._path, content)
            self._file.close()
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        self._whole_bytes = len(content)
        self._close_tensorboard()
        # TensorBoard hides what it was told before about this step and later ones.
        self._purge_step = step + 1

    def has(self, step: int, name: str) -> bool:
        """Whether a row of a step has a value of this name already."""
        return any(row["step"] == step and name in row for row in read_metrics(self._path))

    def close(self) -> None:
        """Closes the files; doing so twice is harmless."""
        self._file.close()
        self._close_tensorboard()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        written = 0
        while written < len(line):
            # A disk that fills up takes a part first and raises on the next attempt.
            written += self._file.write(line[written:]) or 0
        self._whole_bytes += len(line)

    def _print(self, line: str) -> None:
        if self._stdout is None:
            return
        try:
            self._stdout.write(line)
            self._stdout.flush()
        except OSError:
            # The reader left (`| head`) or its disk is full; the run is worth more than that.
            self._stdout = None

    def _tensorboard_add(self, key: str, value: float, step: int) -> None:
        if self._tensorboard is None:
            return
        if self._writer is None:
            self._writers += 1
            self._writer = SummaryWriter(
                str(self._tensorboard),
                purge_step=self._purge_step,
                # Its own names tell seconds apart, and a second writer would erase the first.
                filename_suffix=f".{os.getpid()}.{self._writers}",
                flush_secs=_TENSORBOARD_FLUSH_S,
            )
        self._writer.add_scalar(key, value, step)

    def _close_tensorboard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Unwritten:
    """The metrics of a process that is not the first of its run: the first writes them."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    def truncate_after(self, step: int) -> None:
        """Does nothing."""

    def has(self, step: int, name: str) -> bool:
        """Knows of nothing."""
        return False


def read_metrics(path: Path) -> list[Row]:
    """Reads a log back, also one that is still being written.

    Args:
      path: the file of rows.

    Returns:
      The rows in order; numbers that were not finite are None. A last line that was cut off
      is left out; a file that is not there has no rows.

    Raises:
      RunError: a line that was written to its end is not a row.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    rows: list[Row] = []
    lines = content[: _whole_lines(content)]
    for number, line in enumerate(lines.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
            shown = line[:60].decode(errors="replace")
            raise RunError(
                f"{path}, line {number} is no row of metrics: {shown!r}; delete that line"
            )
        rows.append(row)
    return rows


def to_line(row: Mapping[str, Value | Sequence[str]]) -> str:
    """Prints a row as one line of strict JSON.

    Args:
      row: plain values by name.

    Returns:
      The line with its end; JSON has no word for NaN and infinity, so these become null and
      their names are listed under `nonfinite`.

    >>> print(to_line({"step": 3, "loss": float("inf")}), end="")
    {"step": 3, "loss": null, "nonfinite": ["loss"]}
    """
    odd = [
        key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)
    ]
    clean = {key: None if key in odd else value for key, value in row.items()}
    if odd:
        clean["nonfinite"] = odd
    return json.dumps(clean, allow_nan=False) + "\n"


def _plain(key: str, value: Any) -> Value:
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"metric {key!r} is a {type(value).__name__}; give a number, a text, a boolean or None"
    )


def _whole_lines(content: bytes) -> int:
    """How many bytes of a log end with a line that was written to its end."""
    return content.rfind(b"\n") + 1


def _cannot_write(path: Path, error: OSError) -> RunError:
    reason = error.strerror or os.strerror(error.errno or 0)
    return RunError(f"{path} cannot be written: {reason}; make room, then resume")
