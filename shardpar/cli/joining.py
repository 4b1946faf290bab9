"""Runs `shardpar fl join`: one party of a federation, with an aggregator or in a ring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from shardpar.cli.federation import (
    begin_directory,
    channel_of,
    directory_of,
    evaluator,
    federation_of,
    rows_of,
    write_model,
)
from shardpar.cli.round_report import RoundReport
from shardpar.cli.tables import console
from shardpar.config.schema import FederatedConfig
from shardpar.errors import ConfigError, ShardparError
from shardpar.fl.net.grpc_channel import GrpcChannel
from shardpar.fl.net.signing import read_identity, read_roster
from shardpar.fl.party import Party
from shardpar.fl.ring_rounds import RingParty
from shardpar.run.progress import Progress

_FAREWELL_S = 5.0


def join(config: FederatedConfig, party: str, *, json: bool, dry_run: bool) -> None:
    """Takes part until the rounds are over.

    Raises:
      UserError: keys, addresses or data are wrong, or others' config differs.
      RunError: others were silent for too long, or a round failed here.
    """
    net = config.net
    if party not in net.parties:
        raise ConfigError(
            f"--party {party} is none of net.parties: {', '.join(net.parties) or 'nobody'}"
        )
    folder = directory_of(config, party)
    job, module = federation_of(config)
    rows = rows_of(config, party)
    certificates, signs = Path(net.certificates), config.secagg.enabled or job.is_ring
    identity = read_identity(certificates, party) if signs else None
    roster = read_roster(certificates, net.parties) if signs else {}
    if dry_run:
        console().print(_would(config, party, rows, folder), highlight=False)
        return
    with ExitStack() as stack:
        patience_s = net.patience_s if job.is_ring else net.wait_s
        channel = stack.enter_context(_open(config, party, patience_s))
        begin_directory(config, folder)
        progress = stack.enter_context(Progress())
        progress.say(f"{party}: {_examples(rows)} examples of its own; run directory: {folder}")
        if job.is_ring:
            assert identity is not None
            report = stack.enter_context(RoundReport(folder, progress, config, json=json))
            evaluate = evaluator(config, job, module)
            outcome = RingParty(
                channel, job, rows, folder / "rounds", identity, roster, evaluate, report,
                progress.say,
            ).run()  # fmt: skip
            reason = outcome.stopped or f"all {outcome.rounds} rounds are done"
            params = outcome.state["params"]
        else:
            reason, params = _coordinated(
                Party(
                    channel, job, rows, folder / "rounds", identity, roster, progress.say,
                    patience_s=net.wait_s + net.round_s,
                )
            )  # fmt: skip
        words = f"{party}: {reason}"
        if params is not None:
            words += f"; the model is {write_model(folder, params)}"
    console(stderr=True).print(words, highlight=False)


def _coordinated(party: Party) -> tuple[str, Any]:
    ended = party.run()
    return ended.reason, ended.params


@contextmanager
def _open(config: FederatedConfig, party: str, patience_s: float) -> Iterator[GrpcChannel]:
    """A channel whose last messages, such as why this party leaves, still go out."""
    with channel_of(config, party, patience_s) as channel:
        try:
            yield channel
        except ShardparError:
            channel.close(_FAREWELL_S)
            raise


def _would(
    config: FederatedConfig, party: str, rows: Mapping[str, np.ndarray], folder: Path
) -> str:
    net = config.net
    addresses = net.address_of()
    if net.topology == "ring":
        dials = net.parties[: net.parties.index(party)]
        words = [f"listen at {addresses[party]}"] if party in addresses else []
    else:
        dials, words = (net.aggregator,), []
    words += [f"dial {name} at {addresses.get(name, 'no address')}" for name in dials]
    return (
        f"{party} would {', '.join(words)}, train on its {_examples(rows)} examples and keep its "
        f"state in {folder}"
    )


def _examples(rows: Mapping[str, np.ndarray]) -> str:
    return f"{len(next(iter(rows.values()))):,}"
