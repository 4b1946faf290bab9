"""Runs `shardpar fl join`: one party of a federation."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from shardpar.cli.federation import (
    begin_directory,
    channel_of,
    directory_of,
    federation_of,
    rows_of,
    write_model,
)
from shardpar.cli.tables import console
from shardpar.config.schema import FederatedConfig
from shardpar.errors import ConfigError
from shardpar.fl.net.signing import read_identity, read_roster
from shardpar.fl.party import Party
from shardpar.run.progress import Progress


def join(config: FederatedConfig, party: str, *, dry_run: bool) -> None:
    """Takes part until the rounds are over.

    Raises:
      UserError: keys, addresses or data are wrong, or the aggregator's config differs.
      RunError: the aggregator was silent for too long, or a round failed here.
    """
    net = config.net
    if party not in net.parties:
        raise ConfigError(
            f"--party {party} is none of net.parties: {', '.join(net.parties) or 'nobody'}"
        )
    folder = directory_of(config, party)
    job, _ = federation_of(config)
    rows = rows_of(config, party)
    certificates = Path(net.certificates)
    identity = read_identity(certificates, party) if config.secagg.enabled else None
    roster = read_roster(certificates, net.parties) if config.secagg.enabled else {}
    examples = len(next(iter(rows.values())))
    if dry_run:
        console().print(
            f"{party} would dial {net.aggregator} at {net.address_of().get(net.aggregator)}, train "
            f"on its {examples:,} examples and keep its state in {folder}",
            highlight=False,
        )
        return
    with ExitStack() as stack:
        channel = stack.enter_context(channel_of(config, party, net.wait_s))
        begin_directory(config, folder)
        progress = stack.enter_context(Progress())
        progress.say(f"{party}: {examples:,} examples of its own; run directory: {folder}")
        ended = Party(
            channel,
            job,
            rows,
            folder / "rounds",
            identity,
            roster,
            say=progress.say,
            patience_s=net.wait_s + net.round_s,
        ).run()
        words = f"{party}: {ended.reason}"
        if ended.params is not None:
            words += f"; the model is {write_model(folder, ended.params)}"
    console(stderr=True).print(words, highlight=False)
