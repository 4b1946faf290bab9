"""How much of the time a supervised run makes progress while its trainer is killed every minute.

    python -m benchmarks.goodput                # 20 minutes, a kill every 60 s
    python -m benchmarks.goodput --minutes 5

Useful time is the steps of the final log at the pace of undisturbed ones; compilation, which the
cache shortens, is left out of the wall time.
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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

from benchmarks.faults import rows

ROOT = Path(__file__).parents[1]


def trainer_of(run: Path) -> int:
    """The process of the trainer that was started last, as the supervisor's log says."""
    (log,) = (run / "supervisors").glob("*.events.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    started = [event["what"] for event in events if event["event"] == "trainer started"]
    return int(started[-1].split()[1].rstrip(","))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every-s", type=float, default=60)
    parser.add_argument("--save-steps", type=int, default=10)
    given = parser.parse_args(arguments)
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
        begun, first, kills = time.monotonic(), len(log.read_text()), 0
        before = max(row["step"] for row in rows(run))  # type: ignore[type-var]
        while time.monotonic() - begun < 60 * given.minutes:
            time.sleep(given.every_s)
            with suppress(ProcessLookupError):
                os.kill(trainer_of(run), signal.SIGKILL)
                kills += 1
        wall_s = time.monotonic() - begun
        found = rows(run)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        said = log.read_text()[first:]
    steps = [row for row in found if "loss" in row]
    done = steps[-1]["step"] - before  # type: ignore[operator]
    step_s = median(row["step_s"] for row in steps if "step_s" in row)  # type: ignore[type-var]
    compile_s = sum(map(float, re.findall(r"compiled in ([\d.]+) s", said)))
    useful_s = done * step_s
    print(
        f"{wall_s / 60:.1f} minutes, {kills} kills: {done} steps of {step_s:.3f} s = "
        f"{useful_s:.0f} s of {wall_s:.0f} s, {compile_s:.0f} s of them compiling: goodput "
        f"{useful_s / (wall_s - compile_s):.1%}"
    )


if __name__ == "__main__":
    main()
