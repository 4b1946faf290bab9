"""A run that switches plans, is killed, loses half its devices and has them back, and a calm one.

    python -m benchmarks.faults                    # 20 kills, 2 losses of a node: about 20 minutes
    python -m benchmarks.faults --steps 60 --kills 2 --losses 1

Two nodes of four devices each train under supervisors; the losses and samples of every step must
be those of one process that was left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
MODEL = (
    str(ROOT / "configs" / "gpt.gin"),
    "model.layers=2", "model.width=128", "model.heads=8", "model.max_length=32",
    "data.sequence_length=32", "train.global_batch=8", "train.eval_every=0",
    "train.sample_prompt=null", "optimizer.warmup_steps=0", "train.log_samples=true",
    "train.log_every=1000",
)  # fmt: skip
PLANS = {
    "unequal": """\
format: shardpar-plan/1
cluster: two nodes of four
global_batch: 8
pipelines:
- sequences: 6
  microbatch: 2
  stages:
  - {devices: [0, 1], mesh: {a: 2}, layers: [{layers: 'embed..blocks[0]', tensor: [a]}]}
  - {devices: [4, 5], mesh: {a: 2}, layers: [{layers: 'blocks[1]..outside', fsdp: [a]}]}
- sequences: 2
  microbatch: 1
  stages:
  - {devices: [2], layers: [{layers: 'embed..blocks[0]'}]}
  - {devices: [6], layers: [{layers: 'blocks[1]..outside'}]}
""",
    "one stage": """\
format: shardpar-plan/1
cluster: two nodes of four
global_batch: 8
pipelines:
- sequences: 8
  microbatch: 8
  stages:
  - devices: [0, 1, 2, 3, 4, 5, 6, 7]
    mesh: {a: 2, b: 2, c: 2}
    layers: [{layers: 'embed..outside', fsdp: [a, b], tensor: [c]}]
""",
}


@dataclass
class Outcome:
    """What came of a run."""

    losses: list[float]
    samples: list[str]
    wall_s: float
    events: list[dict[str, str]] = field(default_factory=list)
    switches: int = 0


def rows(run: Path) -> list[dict[str, object]]:
    """The metrics of a run; a last line that is being written is left out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def outcome(run: Path, wall_s: float) -> Outcome:
    """Reads a run back; its steps must be 1, 2, 3, ..., each once."""
    steps = [row for row in rows(run) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    logs = sorted((run / "supervisors").glob("*.events.jsonl"))
    events = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return Outcome(
        [float(row["loss"]) for row in steps],  # type: ignore[arg-type]
        [str(row["samples"]) for row in steps],
        wall_s,
        sorted(events, key=lambda event: event["time"]),
        sum("switch_s" in row for row in rows(run)),
    )


def train(*arguments: str, cwd: Path, log: str) -> subprocess.Popen[bytes]:
    """Starts `shardpar train` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "shardpar", "train", *MODEL, *arguments],
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1"},
        stdout=subprocess.DEVNULL,
        stderr=open(cwd / log, "ab"),
        start_new_session=True,
    )


def calm(cwd: Path, steps: int) -> Outcome:
    """The run that nothing happens to, on one device."""
    begun = time.monotonic()
    process = train(
        f"train.steps={steps}", "--devices", "1", "--run-dir", "calm", cwd=cwd, log="calm.log"
    )
    assert process.wait() == 0, (cwd / "calm.log").read_text()
    return outcome(cwd / "calm", time.monotonic() - begun)


class Wild:
    """Two nodes under supervisors, and somebody who kills."""

    def __init__(self, cwd: Path, steps: int, seed: int, every: int = 10) -> None:
        self.cwd, self.steps, self.every = cwd, steps, every
        self.run, self.random = cwd / "wild", random.Random(seed)
        for name, text in PLANS.items():
            (cwd / f"{name}.yaml").write_text(text)
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, node: str) -> None:
        """Starts a node's supervisor."""
        files = ", ".join(f'"{name}.yaml"' for name in PLANS)
        self.nodes[node] = train(
            f"train.steps={self.steps}", f"train.plan_schedule=[{files}]", "train.switch_every=5",
            f"checkpoint.every_steps={self.every}", "supervise.lost_after_s=10",
            "supervise.join_s=20", "supervise.standby=none",
            "supervise.give_up_after=50", "train.stuck_after_s=60",
            "--devices", "4", "--run-dir", "wild", "--supervise", "--nodes", "2", "--node", node,
            "--address", "localhost", cwd=self.cwd, log=f"{node}.log",
        )  # fmt: skip

    def trainers(self, node: str) -> list[int]:
        """The processes that a node's supervisor has started."""
        path = f"/proc/{self.nodes[node].pid}/task/{self.nodes[node].pid}/children"
        try:
            return [int(pid) for pid in Path(path).read_text().split()]
        except OSError:
            return []

    def kill_trainer(self) -> None:
        """SIGKILL for one trainer, whatever it does."""
        node = self.random.choice(sorted(self.nodes))
        for pid in self.trainers(node):
            os.kill(pid, signal.SIGKILL)

    def lose(self, node: str) -> None:
        """SIGKILL for a whole node: its trainer and its supervisor."""
        doomed = self.trainers(node)
        self.nodes[node].kill()
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        self.nodes.pop(node).wait()

    @property
    def step(self) -> int:
        """How far it is, as the metrics say; steps to be done again count as done."""
        return max((int(row["step"]) for row in rows(self.run)), default=0)  # type: ignore[call-overload]

    @property
    def ended(self) -> bool:
        """Whether all supervisors have ended."""
        return all(process.poll() is not None for process in self.nodes.values())

    def wait_for(self, step: int, timeout_s: float = 400) -> None:
        """Until a step is in the metrics, or the run has ended."""
        deadline = time.monotonic() + timeout_s
        while self.step < step and not self.ended:
            assert time.monotonic() < deadline, f"stuck at step {self.step}:\n{self.said()}"
            time.sleep(0.2)

    def wait(self, timeout_s: float) -> None:
        """Until the run has ended, well."""
        for process in self.nodes.values():
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = -1
            assert code == 0, f"exit code {code}:\n{self.said()}"

    def said(self) -> str:
        """The last words of both nodes."""
        logs = [self.cwd / f"{node}.log" for node in ("a", "b")]
        return "\n".join(log.read_text()[-4000:] for log in logs if log.exists())

    def close(self) -> None:
        """Kills whatever still runs."""
        for node in list(self.nodes):
            self.lose(node)


def wild(
    cwd: Path, steps: int, kills: int, losses: int, seed: int = 20, every: int = 10
) -> Outcome:
    """Trains while trainers are killed at random, and node b is lost and comes back.

    Args:
      cwd: where the run is made.
      steps: of it.
      kills: of a trainer.
      losses: of a node.
      seed: of when and whom.
      every: steps between checkpoints.
    """
    run = Wild(cwd, steps, seed, every)
    begun = time.monotonic()
    kinds = ["kill"] * kills + ["lose"] * losses
    run.random.shuffle(kinds)
    try:
        run.start("a")
        run.start("b")
        at = 0
        for n, kind in enumerate(kinds):
            at = max(at + 1, round((n + run.random.uniform(0.3, 1)) * steps / (len(kinds) + 1)))
            run.wait_for(at)
            time.sleep(run.random.uniform(0, 3))
            if kind == "kill":
                run.kill_trainer()
                continue
            run.lose("b")
            run.wait_for(min(run.step + run.every // 2 + 1, steps - 1))
            run.start("b")
        run.wait(600)
    finally:
        run.close()
    return outcome(cwd / "wild", time.monotonic() - begun)


def compare(one: Outcome, other: Outcome) -> float:
    """The largest relative difference of a loss; samples must be the same.

    Raises:
      AssertionError: another number of steps, or other samples.
    """
    assert len(one.losses) == len(other.losses)
    assert one.samples == other.samples
    a, b = np.array(one.losses), np.array(other.losses)
    return float(np.max(np.abs(a - b) / np.abs(a)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--losses", type=int, default=2)
    parser.add_argument("--seed", type=int, default=20)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        one = calm(cwd, given.steps)
        other = wild(cwd, given.steps, given.kills, given.losses, given.seed)
        difference = compare(one, other)
    counts = {
        kind: sum(event["event"] == kind for event in other.events)
        for kind in ("epoch", "failed", "lost", "joined")
    }
    print(
        f"{given.steps} steps, {given.kills} kills, {given.losses} losses of a node: "
        f"{other.switches} switches, {counts['epoch']} epochs, {counts['failed']} trainers failed, "
        f"{counts['lost']} nodes lost, {counts['joined']} joined; largest relative difference of "
        f"a loss {difference:.1e}, every sample once; {other.wall_s:.0f} s against {one.wall_s:.0f}"
    )


if __name__ == "__main__":
    main()
