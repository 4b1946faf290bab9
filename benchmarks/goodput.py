"""How much of the time a supervised run makes progress while its trainer is killed every minute.

    python -m benchmarks.goodput                # 20 minutes, a kill every 60 s
    python -m benchmarks.goodput --minutes 5

Useful is the time of the steps in the final log, each of which counts once: steps that were made
again, saving, dying and starting are not. Compilation, which the cache shortens, is left out of
the wall time. Beside other work steps take longer, so two figures are given: with each step's own
time, and with the median for all, which also counts what slowed steps down as lost.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.faults import rows

ROOT = Path(__file__).parents[1]
_KEPT = 0.9
"""How much of the mean before is in the mean time of a step that the log has (`train.loop`)."""


@dataclass(frozen=True)
class Kill:
    """What one kill cost.

    Attributes:
      lost_steps: that had been made and were made again.
      silent_s: from the kill to the first step of the next trainer that is written down.
    """

    lost_steps: int
    silent_s: float


def trainer_of(run: Path) -> int:
    """The process of the trainer that was started last, as the supervisor's log says."""
    (log,) = (run / "supervisors").glob("*.events.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    started = [event["what"] for event in events if event["event"] == "trainer started"]
    return int(started[-1].split()[1].rstrip(","))


def step_times_s(steps: Sequence[Mapping[str, Any]]) -> Iterator[float | None]:
    """Each step's own time, from the running mean that the log has; None for a trainer's first.

    >>> list(step_times_s([{}, {"step_s": 2.0}, {"step_s": 2.1}, {"step_s": 2.1}, {}]))
    [None, 2.0, 3.0, 2.1, None]
    """
    before = None
    for step in steps:
        now = step.get("step_s")
        if now is None or before is None or now == before:
            # After a pause, such as for saving, the mean stays what it was.
            yield now
        else:
            yield round((now - _KEPT * before) / (1 - _KEPT), 6)
        before = now


def newest(run: Path) -> int:
    """The last step that is written down; cheap, as it is asked for while the trainer starts."""
    with open(run / "metrics.jsonl", "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def kill(run: Path) -> Kill:
    """Kills the trainer and waits for the next one to make a step."""
    os.kill(trainer_of(run), signal.SIGKILL)
    begun = time.monotonic()
    made = least = newest(run)
    while (now := newest(run)) <= least:
        least = min(least, now)
        time.sleep(0.05)
    return Kill(made - least, time.monotonic() - begun)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every-s", type=float, default=60)
    parser.add_argument("--save-steps", type=int, default=25)
    given = parser.parse_args(arguments)
    kills: list[Kill] = []
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "shardpar", "train", str(ROOT / "configs" / "gpt.gin"),
                 "train.steps=1000000", f"checkpoint.every_steps={given.save_steps}",
                 "train.eval_every=0", "train.sample_prompt=null", "train.log_every=100000",
                 "supervise.give_up_after=1000", "--run-dir", str(run), "--supervise"],
                stderr=out, stdout=out, env={**os.environ, "NO_COLOR": "1"},
            )  # fmt: skip
        while not rows(run):
            time.sleep(0.2)
        begun, first = time.monotonic(), len(log.read_text())
        before = newest(run)
        for number in range(1, int(60 * given.minutes / given.every_s) + 1):
            while time.monotonic() < begun + number * given.every_s:
                time.sleep(0.2)
            kills.append(kill(run))
            loads.append(os.getloadavg()[0])
            print(f"kill {number}: {kills[-1]}, load {loads[-1]:.1f}", flush=True)
        # The last kill's cost is to be in it, and its minute too.
        while time.monotonic() < begun + (len(kills) + 1) * given.every_s:
            time.sleep(0.2)
        wall_s = time.monotonic() - begun
        found = rows(run)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        said = log.read_text()[first:]
    steps: list[dict[str, Any]] = [row for row in found if "loss" in row][before:]
    times_s = list(step_times_s(steps))
    pace_s = median(s for s in times_s if s is not None)
    own_s = sum(pace_s if s is None else s for s in times_s)
    compile_s = sum(map(float, re.findall(r"compiled in ([\d.]+) s", said)))
    print(
        f"{wall_s / 60:.1f} minutes, {len(kills)} kills, each of which cost "
        f"{median(k.lost_steps for k in kills)} steps and {median(k.silent_s for k in kills):.1f} "
        f"s in the median: {len(steps)} steps that count, {own_s:.0f} s by their own times, of "
        f"{wall_s:.0f} s, {compile_s:.0f} s of them compiling: goodput "
        f"{own_s / (wall_s - compile_s):.1%}; {len(steps) * pace_s / (wall_s - compile_s):.1%} "
        f"with {pace_s:.3f} s, the median, for each. Load {mean(loads):.1f} on {os.cpu_count()} "
        "cores"
    )


if __name__ == "__main__":
    main()
