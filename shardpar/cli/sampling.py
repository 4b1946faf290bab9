"""Text from a trained model, and what jax finds here: the heavy half of generate and doctor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax

from shardpar.cli.planning import capture_aloud, lower, make_plan, use_devices
from shardpar.cli.tables import print_json
from shardpar.config.load import load
from shardpar.errors import RunError
from shardpar.lowering.devices import local_cluster
from shardpar.planner.options import SearchOptions
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.directory import RunDirectory
from shardpar.run.progress import Progress
from shardpar.train.generate import generate as sample_tokens
from shardpar.train.tokenizer import Tokenizer, from_text

TOKENIZER = "tokenizer.json"


def generate(
    run: str,
    *,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    step: int | None,
    devices: int | None,
    json: bool,
) -> None:
    """`shardpar generate`."""
    directory = RunDirectory.existing(Path(run))
    use_devices(devices)
    config = load(str(directory.config_yaml))
    config = replace(config, plan=SearchOptions())
    tokenizer = read_tokenizer(directory)
    with Progress() as progress:
        with progress.phase("restoring"):
            program = lower(config, make_plan(config, capture_aloud(config), None))
            shapes = program.state_shapes
            with Checkpoints(
                directory.checkpoints, notify=progress.say, read_only=True
            ) as checkpoints:
                wanted = {"params": shapes.params, "rest": shapes.rest}
                restored = checkpoints.restore(step, wanted, partial=True)
        with progress.phase("generating"):
            ids = sample_tokens(
                program.captured.model,
                restored.state["params"],
                restored.state["rest"],
                tokenizer.encode(prompt),
                tokens=tokens,
                window=config.data.sequence_length,
                temperature=temperature,
                top_k=top_k,
                seed=seed,
            )
    text = tokenizer.decode(ids)
    if json:
        print_json({"step": restored.step, "prompt": prompt, "text": text})
    else:
        print(text)  # noqa: T201


def diagnose(devices: int | None) -> list[tuple[str, str, str]]:
    """The part of `shardpar doctor` that asks jax: (level, what, fix) findings."""
    use_devices(devices)
    try:
        found = jax.devices()
    except RuntimeError as error:
        return [
            ("problem", f"jax finds no device: {str(error).splitlines()[0]}", "unset JAX_PLATFORMS")
        ]
    cluster = local_cluster()
    kind = cluster.kinds[0]
    findings = [
        (
            "ok",
            f"{len(found)} x {found[0].device_kind} ({found[0].platform}), "
            f"{kind.memory_bytes / 2**30:.1f} GiB each",
            "",
        )
    ]
    if found[0].platform == "cpu":
        findings.append(
            ("note", "no accelerator; --devices 8 tries a plan on 8 virtual CPU devices",
             "pip install 'shardpar[cuda]' (NVIDIA) or 'shardpar[tpu]'")
        )  # fmt: skip
    elif kind.source == "assumed":
        findings.append(
            ("note", f"no datasheet for {found[0].device_kind}: MFU will be n/a",
             "plan with --cluster FILE and your own rates")
        )  # fmt: skip
    findings.append(("ok", f"compilation cache in {jax.config.jax_compilation_cache_dir}", ""))
    return findings


def read_tokenizer(directory: RunDirectory) -> Tokenizer:
    """The tokenizer a run was trained with.

    Raises:
      RunError: its file is missing or unreadable.
    """
    path = directory.path / TOKENIZER
    try:
        return from_text(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
