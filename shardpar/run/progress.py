"""Decides what a person who watches a run sees: one live line, or plain lines in a log file.

Everything goes to stderr, so that stdout stays free for `--json`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_SEPARATOR = " · "
_BAR_COLUMNS = 16
_REFRESHES_PER_S = 4


@dataclass(frozen=True)
class Figures:
    """What is known after a step; None where it is not known, which is shown as `n/a` or left out.

    Attributes:
      step: how many steps are done.
      total_steps: how many there will be.
      loss: the training loss.
      tokens_per_s: over the last few steps.
      step_s: seconds per step over the last few steps, from which the rest is estimated.
      mfu: model FLOP/s as a share of what the devices can do, 0 to 1.
      peak_bytes: most memory in use on any device.
      data_wait: share of the time spent waiting for data, 0 to 1.
    """

    step: int
    total_steps: int
    loss: float | None = None
    tokens_per_s: float | None = None
    step_s: float | None = None
    mfu: float | None = None
    peak_bytes: float | None = None
    data_wait: float | None = None

    @property
    def remaining_s(self) -> float | None:
        """How long the rest should take."""
        if self.step_s is None:
            return None
        return max(self.total_steps - self.step, 0) * self.step_s


def describe(figures: Figures) -> tuple[str, ...]:
    """Puts the figures into words, the most important first.

    Args:
      figures: what is known.

    Returns:
      One short phrase per figure.

    >>> print(*describe(Figures(120, 240, 2.6123, 1162.4, 0.88, None, 1.5e9, 0.02)), sep=" · ")
    120/240 · loss 2.612 · 1,162 tok/s · ETA 1:46 · MFU n/a · 1.40 GiB · data wait 2%
    """
    width = len(str(figures.total_steps))
    phrases = [f"{figures.step:>{width}}/{figures.total_steps}"]
    if figures.loss is not None:
        phrases.append(f"loss {figures.loss:.3f}")
    if figures.tokens_per_s is not None:
        phrases.append(f"{figures.tokens_per_s:,.0f} tok/s")
    if figures.remaining_s is not None:
        phrases.append(f"ETA {clock_time(figures.remaining_s)}")
    phrases.append("MFU n/a" if figures.mfu is None else f"MFU {figures.mfu:.1%}")
    if figures.peak_bytes is not None:
        phrases.append(f"{figures.peak_bytes / 2**30:.2f} GiB")
    if figures.data_wait is not None:
        phrases.append(f"data wait {figures.data_wait:.0%}")
    return tuple(phrases)


def clock_time(duration_s: float) -> str:
    """Prints a duration the way a clock does.

    Args:
      duration_s: seconds, not negative.

    Returns:
      Minutes and seconds, with hours and days where there are any.

    >>> clock_time(7), clock_time(75), clock_time(3661), clock_time(90061)
    ('0:07', '1:15', '1:01:01', '1d 1:01:01')
    """
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}:{minutes:02}:{seconds:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Shows how a run goes, from `with` to the end of its block.

    On a terminal one line is kept up to date; elsewhere a plain line is printed every
    `every_s` seconds, and for the first and the last step.
    """

    def __init__(
        self,
        *,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        clock_s: Callable[[], float] = time.monotonic,
        quiet: bool = False,
    ) -> None:
        """Chooses the form from where it is shown.

        Args:
          stream: where to show it; stderr if None.
          every_s: seconds between plain lines.
          clock_s: a clock that only goes forward.
          quiet: show only what `say_always` says.
        """
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._every_s = every_s
        self._clock_s = clock_s
        self._view = _View(clock_s)
        self._live: Live | None = None
        self._printed_s: float | None = None

    def update(self, figures: Figures) -> None:
        """Shows the figures of one more step.

        Args:
          figures: what is known now.
        """
        self._view.figures = figures
        if self._live is not None:
            return
        now_s = self._clock_s()
        is_due = self._printed_s is None or now_s - self._printed_s >= self._every_s
        if is_due or figures.step >= figures.total_steps:
            self._printed_s = now_s
            self._plain("step " + _SEPARATOR.join(describe(figures)).lstrip())

    @contextmanager
    def phase(self, what: str) -> Iterator[Callable[[str], None]]:
        """Shows that something takes its time, and for how long so far.

        Args:
          what: such as `compiling`; how long it took is printed at its end.

        Yields:
          A function to say how far it is, such as `45%`; the phase lasts as long as the block.
        """
        began_s = self._clock_s()
        said_s = began_s

        def so_far(text: str) -> None:
            nonlocal said_s
            self._view.phase = _Phase(f"{what}: {text}", began_s)
            now_s = self._clock_s()
            if self._live is None and now_s - said_s >= self._every_s:
                said_s = now_s
                self._plain(f"{what}: {text}")

        outer, self._view.phase = self._view.phase, _Phase(what, began_s)
        if self._live is None:
            self._plain(f"{what}…")
        else:
            self._live.refresh()
        try:
            yield so_far
        except BaseException:
            self._view.phase = outer
            raise
        self._view.phase = outer
        self.say(f"{what}: {self._clock_s() - began_s:.1f} s")

    def say(self, message: str) -> None:
        """Prints a line that stays, above the live one.

        Args:
          message: shown as it is; square brackets mean nothing.
        """
        self._plain(message)

    def say_always(self, message: str) -> None:
        """Prints a line even where this process is not the one that speaks."""
        self._console.print(message, markup=False, emoji=False)

    def __enter__(self) -> Progress:
        if not self._quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                self._view,
                console=self._console,
                refresh_per_second=_REFRESHES_PER_S,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
            # Rich hides the cursor, and a killed trainer could not give it back.
            self._console.show_cursor(True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            if self._view.figures is not None:
                self._plain("step " + _SEPARATOR.join(describe(self._view.figures)).lstrip())

    def _plain(self, message: str) -> None:
        if not self._quiet:
            self._console.print(message, markup=False, emoji=False)


@dataclass(frozen=True)
class _Phase:
    what: str
    began_s: float


class _View:
    """What the live line shows at this moment; rich asks for it a few times a second."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self.figures: Figures | None = None
        self.phase: _Phase | None = None
        self._clock_s = clock_s
        self._spinner = Spinner("dots")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.phase is not None:
            elapsed = clock_time(self._clock_s() - self.phase.began_s)
            self._spinner.update(text=Text(f"{self.phase.what}… {elapsed}"))
            yield self._spinner
        elif self.figures is not None:
            yield from self._line(self.figures, options.max_width)
        else:
            yield Segment("")

    def _line(self, figures: Figures, columns: int) -> RenderResult:
        # What does not fit is left out from the end: a line that wraps cannot be redrawn.
        text = fitting(describe(figures), columns)
        if len(text) + 1 + _BAR_COLUMNS > columns:
            yield Text(text, no_wrap=True, overflow="crop")
            return
        row = Table.grid(padding=(0, 1, 0, 0))
        bar = ProgressBar(figures.total_steps, figures.step, width=_BAR_COLUMNS)
        row.add_row(bar, Text(text, no_wrap=True))
        yield row


def fitting(phrases: tuple[str, ...], columns: int) -> str:
    """Joins as many phrases as fit into a line.

    Args:
      phrases: the most important first; the first is always there.
      columns: how wide the line may be.

    Returns:
      The line.

    >>> fitting(("120/240", "loss 2.612", "1,162 tok/s"), 25)
    '120/240 · loss 2.612'
    """
    line = phrases[0]
    for phrase in phrases[1:]:
        if len(line) + len(_SEPARATOR) + len(phrase) > columns:
            break
        line += _SEPARATOR + phrase
    return line
