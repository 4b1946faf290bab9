"""Runs `shardpar fl serve`: the aggregator of a federation."""

from __future__ import annotations

import sys
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
from shardpar.cli.tables import console
from shardpar.config.schema import FederatedConfig
from shardpar.errors import ConfigError
from shardpar.fl.coordinator import Coordinator, Outcome, Row
from shardpar.fl.net.signing import read_roster
from shardpar.run.directory import RunDirectory
from shardpar.run.metrics import MetricsLog
from shardpar.run.progress import Figures, Progress


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
        directory = RunDirectory(folder)
        metrics = stack.enter_context(
            MetricsLog(
                directory.metrics,
                tensorboard=directory.tensorboard,
                stdout=sys.stdout if json else None,
            )
        )
        progress = stack.enter_context(Progress())
        progress.say(f"listening at {channel.address}; run directory: {folder}")
        coordinator = Coordinator(
            channel,
            job,
            folder / "rounds",
            roster,
            evaluator(config, job, module),
            _Report(metrics, progress, config.federated.rounds),
            progress.say,
        )
        outcome = coordinator.run()
        model = write_model(folder, outcome.state["params"])
    _conclude(outcome, model)


class _Report:
    """Takes rows to the log and the screen; one that is there already is not written again."""

    def __init__(self, metrics: MetricsLog, progress: Progress, rounds: int) -> None:
        self._metrics, self._progress, self._rounds = metrics, progress, rounds
        self._began = False

    def __call__(self, round_: int, row: Row) -> None:
        if not self._began:
            # A row of a round that was committed just before a kill may be missing, or be there.
            self._metrics.truncate_after(round_ - 1)
            self._began = True
        self._metrics.write(round_, row)
        self._progress.update(
            Figures(round_, self._rounds, row.get("loss"), step_s=row.get("round_s"))
        )


def _conclude(outcome: Outcome, model: Path) -> None:
    words = outcome.stopped or f"done: {outcome.rounds} rounds"
    console(stderr=True).print(f"{words}; the model is {model}", highlight=False)
