"""Runs the real `shardpar` command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LONG = pytest.mark.skipif(
    not os.environ.get("SHARDPAR_LONG"), reason="half a minute; set SHARDPAR_LONG=1"
)
"""What a cheaper test, or a page of the documentation, shows nearly as well."""
TINY = (
    "model.layers=2", "model.width=128", "model.heads=8", "model.max_length=32",
    "data.sequence_length=32", "train.global_batch=8", "train.eval_batches=2",
    "optimizer.warmup_steps=0", "optimizer.decay_steps=1000", "train.sample_prompt=null",
)  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}


def shardpar(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "shardpar", *arguments],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if check and done.returncode != 0:
        raise AssertionError(f"shardpar {' '.join(arguments)}: {done.returncode}\n{done.stderr}")
    return done


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shardpar", *arguments],
        cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def losses(run: Path) -> list[tuple[int, float, str]]:
    """(step, loss, samples) of every training step in a run's metrics, in file order."""
    return [
        (row["step"], row["loss"], row.get("samples", ""))
        for row in rows((run / "metrics.jsonl").read_text())
        if "loss" in row
    ]
