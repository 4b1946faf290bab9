"""What `shardpar train` says for people: what will be trained, a sample of it, how it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence

from shardpar.cli.mixing import PlannedBucket
from shardpar.cli.planning import Planned
from shardpar.cli.tables import console, describe, print_json
from shardpar.config.schema import RunConfig
from shardpar.errors import RunError, UserError
from shardpar.run.directory import RunDirectory
from shardpar.run.peers import Peers
from shardpar.run.progress import Progress, clock_time
from shardpar.train.data import TextData
from shardpar.train.generate import generate as sample_tokens
from shardpar.train.loop import Outcome


def introduce(
    config: RunConfig,
    planned: Planned,
    data: TextData,
    directory: RunDirectory,
    peers: Peers,
    progress: Progress,
    buckets: Sequence[PlannedBucket] = (),
) -> None:
    """Says what will be trained, on what, under which plan."""
    pipeline = planned.plan.pipelines[0]
    stage = pipeline.stages[0]
    mixed = "up to " if buckets or config.data.dispatch else ""
    progress.say(
        f"{planned.captured.graph.model}: {planned.captured.graph.num_parameters:,} parameters; "
        f"{data.name}: {len(data.train):,} samples of {mixed}{config.data.sequence_length} tokens, "
        f"{len(data.evaluation):,} for evaluation"
    )
    if peers.count > 1:
        progress.say(f"{peers.count} processes, which saw the same plan, config, data and code")
    several = len(planned.plan.pipelines) > 1 or len(pipeline.stages) > 1
    progress.say(
        f"{len(planned.plan.devices)} x {planned.cluster.kinds[0].name}: "
        + (f"stages {planned.plan.in_short}, the first " if several else "")
        + describe(stage.layers[0], stage.mesh)
        + (" and others" if len(stage.layers) > 1 else "")
        + f"; global batch {planned.plan.global_batch} = "
        + " + ".join(
            f"{p.num_microbatches} micro-batches of {p.microbatch}" for p in planned.plan.pipelines
        )
    )
    for bucket in buckets:
        plan = bucket.planned.plan
        stage = plan.pipelines[0].stages[0]
        progress.say(
            f"up to {bucket.length} tokens, {plan.global_batch} sequences at a time: "
            f"{plan.in_short}, {describe(stage.layers[0], stage.mesh)}"
        )
    progress.say(f"run directory: {directory.path}")


def sample(
    config: RunConfig, outcome: Outcome, data: TextData, peers: Peers, progress: Progress
) -> str | None:
    """A sample of the trained model; None where none was asked for, or none can be had."""
    if config.train.sample_prompt is None or outcome.stopped:
        return None
    program = outcome.program
    weights = program.together(outcome.state)
    if not peers.is_first:
        return None
    try:
        with progress.phase("writing a sample"):
            ids = sample_tokens(
                program.captured.model,
                *weights,
                data.tokenizer.encode(config.train.sample_prompt),
                tokens=config.train.sample_tokens,
                window=config.data.sequence_length,
                seed=config.train.seed,
            )
    except UserError as error:
        progress.say(f"note: no sample: {error}")
        return None
    return data.tokenizer.decode(ids)


def conclude(
    outcome: Outcome, directory: RunDirectory, text: str | None, started: float, *, json: bool
) -> None:
    """Says how the run ended.

    Raises:
      RunError: it diverged.
    """
    screen = console(stderr=True)
    if outcome.stopped:
        screen.print(
            f"stopped after step {outcome.step} and saved; go on with: "
            f"shardpar train --resume {directory.path}",
            highlight=False,
        )
        return
    words = [f"step {outcome.step}"]
    words += [f"loss {outcome.loss:.4f}"] if outcome.loss is not None else []
    words += (
        [f"eval loss {outcome.eval_loss:.4f} nats/token"] if outcome.eval_loss is not None else []
    )
    words += [f"{outcome.skipped} updates skipped"] if outcome.skipped else []
    if outcome.diverged:
        raise RunError(
            f"the run diverged: the loss is not finite after {', '.join(words)}; begin again with "
            f"a lower optimizer.learning_rate or a longer warm-up. Report: {directory.report}"
        )
    screen.print(
        f"done in {clock_time(time.monotonic() - started)}: {', '.join(words)}", highlight=False
    )
    if text is not None:
        if json:
            print_json({"step": outcome.step, "sample": text})
        else:
            print(f"\n{text}\n")  # noqa: T201
    screen.print(f"report: {directory.report}", highlight=False)
