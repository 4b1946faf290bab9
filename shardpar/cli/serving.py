"""Runs `shardpar fl serve`: the aggregator of a federation."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from shardpar.cli.federation import (
    begin_directory,
    channel_of,
    directory_of,
    evaluator,
    federation_of,
    write_model,
)
from shardpar.cli.round_report import RoundReport
from shardpar.cli.tables import console
from shardpar.config.schema import FederatedConfig
from shardpar.errors import ConfigError
from shardpar.fl.coordinator import Coordinator, Outcome
from shardpar.fl.net.signing import read_roster
from shardpar.run.progress import Progress


def serve(config: FederatedConfig, *, json: bool, dry_run: bool) -> None:
    """Waits for the parties and runs the rounds.

    Raises:
      UserError: keys, addresses or the config are wrong.
      RunError: too few parties were there for too long.
    """
    net = config.net
    if net.topology == "ring":
        raise ConfigError(
            "net.topology is 'ring', which has no aggregator; every party runs `shardpar fl join`"
        )
    folder = directory_of(config, net.aggregator)
    job, module = federation_of(config)
    roster = read_roster(Path(net.certificates), net.parties) if config.secagg.enabled else {}
    if dry_run:
        console().print(
            f"{net.aggregator} would listen at {net.address_of().get(net.aggregator)} for "
            f"{', '.join(net.parties)} and keep its state in {folder}",
            highlight=False,
        )
        return
    with ExitStack() as stack:
        channel = stack.enter_context(channel_of(config, net.aggregator, net.patience_s))
        begin_directory(config, folder)
        progress = stack.enter_context(Progress())
        report = stack.enter_context(RoundReport(folder, progress, config, json=json))
        progress.say(f"listening at {channel.address}; run directory: {folder}")
        coordinator = Coordinator(
            channel,
            job,
            folder / "rounds",
            roster,
            evaluator(config, job, module),
            report,
            progress.say,
        )
        outcome = coordinator.run()
        model = write_model(folder, outcome.state["params"])
    _conclude(outcome, model)


def _conclude(outcome: Outcome, model: Path) -> None:
    words = outcome.stopped or f"done: {outcome.rounds} rounds"
    console(stderr=True).print(f"{words}; the model is {model}", highlight=False)
