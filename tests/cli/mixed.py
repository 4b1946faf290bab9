"""Texts of mixed lengths, and `shardpar train` on them inside the test's own process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from shardpar.cli.main import app
from tests.cli.command import ROOT

LENGTHS = (3, 30, 6, 5, 17, 4, 7, 26, 2, 8, 5, 60, 9, 3, 6, 28)
TINY = (
    "model.layers=2", "model.width=16", "model.heads=2", "model.max_length=32",
    "model.mlp_ratio=1", "data.sequence_length=32", "train.global_batch=6", "train.eval_batches=1",
    "optimizer.warmup_steps=0", "optimizer.decay_steps=100", "train.sample_prompt=null",
    "train.log_samples=true", "train.eval_every=0", "data.source=jsonl",
    "data.path=texts.jsonl", "data.eval_fraction=0.2",
)  # fmt: skip


def texts(folder: Path) -> None:
    """A file of texts, most of them short."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefgh "))
    with open(folder / "texts.jsonl", "w") as file:
        for length in LENGTHS * 3:
            file.write(json.dumps({"text": "".join(random.choice(letters, length))}) + "\n")


def train(*arguments: str) -> str:
    """Trains in the current folder; what was printed."""
    done = CliRunner().invoke(app, ["train", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return str(done.output)


GPT = str(ROOT / "configs" / "gpt.gin")
