"""Text from a trained model, and what jax finds here: the heavy half of generate and doctor."""

from __future__ import annotations

from pathlib import Path

import jax

from shardpar.cli.planning import capture_aloud, use_devices
from shardpar.cli.tables import print_json
from shardpar.config.load import load
from shardpar.config.schema import RunConfig
from shardpar.errors import RunError, UserError
from shardpar.lowering.devices import local_cluster
from shardpar.lowering.program import Program
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.directory import RunDirectory
from shardpar.run.progress import Progress
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.select import every_layer
from shardpar.train.generate import generate as sample_tokens
from shardpar.train.optimizer import make_optimizer
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
    config = load(str(directory.config_yaml), find_files=False)
    tokenizer = read_tokenizer(directory)
    with Progress() as progress:
        with progress.phase("restoring"):
            program = _spread(config)
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


def _spread(config: RunConfig) -> Program:
    """The model, its parameters spread over all devices; without training nothing is to plan."""
    captured = capture_aloud(config)
    devices = tuple(range(len(jax.devices())))
    mesh = Mesh.factored(len(devices))
    strategy = LayerStrategy(every_layer(captured.graph), fsdp=mesh.names)
    pipeline = Pipeline(len(devices), len(devices), (Stage(devices, mesh, (strategy,)),))
    plan = Plan("generate", len(devices), (pipeline,))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    return Program(captured, plan, optimizer, config.program)


def diagnose(devices: int | None) -> list[tuple[str, str, str]]:
    """The part of `shardpar doctor` that asks jax: (level, what, fix) findings."""
    try:
        use_devices(devices)
    except UserError as error:
        return [("problem", str(error), "unset JAX_PLATFORMS")]
    found = jax.devices()
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
