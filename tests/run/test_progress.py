"""What a person sees: on a terminal one line, elsewhere plain ones, and never a word on stdout."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import threading
import time

import pytest

from shardpar.run.progress import Figures, Progress, clock_time, describe, fitting

FULL = Figures(120, 240, 2.6123, 1162.4, 0.88, 0.412, 1.5e9, 0.02)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_log_file_gets_a_line_every_so_often_and_the_last_one() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, every_s=10.0, clock_s=clock) as progress:
        for step in range(1, 26):
            clock.now_s += 1.0
            progress.update(Figures(step, 25, 3.0))
    shown = [int(found) for found in re.findall(r"step (\d+)/25", stream.getvalue())]
    assert shown == [1, 11, 21, 25]
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_a_long_line_is_not_broken_and_brackets_are_shown_as_they_are() -> None:
    stream = io.StringIO()
    message = "saved to runs/[gpt]/" + "x" * 300 + " :smile:"
    with Progress(stream=stream) as progress:
        progress.say(message)
    assert stream.getvalue() == message + "\n"


def test_a_phase_says_what_takes_time_and_how_long_it_took() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock_s=clock) as progress, progress.phase("compiling"):
        clock.now_s += 4.25
    assert stream.getvalue() == "compiling…\ncompiling: 4.2 s\n"


def test_a_long_phase_says_how_far_it_is_now_and_then() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream=stream, clock_s=clock, every_s=10)
    with progress, progress.phase("reading") as so_far:
        for share in ("10%", "20%", "30%"):
            clock.now_s += 6
            so_far(share)
    assert stream.getvalue() == "reading…\nreading: 20%\nreading: 18.0 s\n"


def test_a_phase_that_fails_says_nothing_more() -> None:
    stream = io.StringIO()
    with (
        pytest.raises(ValueError, match="inside"),
        Progress(stream=stream) as progress,
        progress.phase("compiling"),
    ):
        raise ValueError("inside")
    assert stream.getvalue() == "compiling…\n"


def test_unknown_figures_are_left_out_and_an_unknown_mfu_is_said_to_be() -> None:
    assert describe(Figures(3, 10)) == (" 3/10", "MFU n/a")
    assert describe(FULL) == (
        "120/240",
        "loss 2.612",
        "1,162 tok/s",
        "ETA 1:46",
        "MFU 41.2%",
        "1.40 GiB",
        "data wait 2%",
    )
    assert "loss nan" in describe(Figures(1, 2, float("nan")))


@pytest.mark.parametrize("columns", range(7, 120, 3))
def test_a_line_never_grows_beyond_the_terminal(columns: int) -> None:
    line = fitting(describe(FULL), columns)
    assert line.startswith("120/240")
    assert len(line) <= columns


def test_the_time_left_does_not_go_below_nothing() -> None:
    assert Figures(12, 10, step_s=1.0).remaining_s == 0.0
    assert Figures(1, 10).remaining_s is None
    assert clock_time(59.6) == "1:00"


def on_terminal(
    columns: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """All that a short run writes to a terminal of that width."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    reader, writer = pty.openpty()
    shown: list[bytes] = []

    def drain() -> None:
        # Linux ends a terminal without writers with an error, not with an empty read.
        with contextlib.suppress(OSError):
            while chunk := os.read(reader, 4096):
                shown.append(chunk)

    screen = threading.Thread(target=drain)
    screen.start()
    with os.fdopen(writer, "w", encoding="utf-8") as stream, Progress(stream=stream) as progress:
        with progress.phase("compiling"):
            time.sleep(0.05)
        for step in (1, 2, 3):
            progress.update(Figures(step, 3, 1.0 / step, 10.0, 1.0, None, 1e9, 0.5))
            time.sleep(0.05)
        progress.say("checkpoint [3] saved")
    screen.join()
    os.close(reader)
    assert capfd.readouterr().out == ""
    return b"".join(shown).decode()


def test_a_terminal_gets_one_line_that_is_drawn_again(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = on_terminal(120, capfd, monkeypatch)
    assert "compiling… 0:00" in shown
    assert "compiling: 0." in shown
    assert "checkpoint [3] saved\r\n" in shown
    assert shown.count("\r\x1b[2K") >= 3
    assert "━" in shown
    assert shown.rstrip().endswith(
        "step 3/3 · loss 0.333 · 10 tok/s · ETA 0:00 · MFU n/a · 0.93 GiB · data wait 50%"
    )
    # The cursor is given back at once: after kill -9 no one else would.
    assert shown.index("\x1b[?25h") < shown.index("compiling")


def test_a_narrow_terminal_loses_the_bar_and_the_last_figures(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = on_terminal(40, capfd, monkeypatch).rpartition("\x1b[?25h")[0]
    assert "━" not in live
    assert "loss 0.333" in live
    assert "GiB" not in live
