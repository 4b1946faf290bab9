"""Runs training from a config: the heavy half of `shardpar train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardpar.cli.preparing import (
    Ahead,
    resumed_config,
)
from shardpar.config.schema import RunConfig
from shardpar.run.directory import RunDirectory
from shardpar.run.peers import ALONE
from shardpar.run.rendezvous import Rendezvous


def train(
    config: RunConfig,
    name: str,
    *,
    devices: int | None,
    where: Rendezvous | None,
    json: bool,
    dry_run: bool,
) -> None:
    """`shardpar train`."""
    peers = _prepare(devices, where)
    given = config.train.run_dir
    with _all_or_none(peers):
        _begin(config, name, Path(given) if given else None, peers, json=json, dry_run=dry_run)


def resume(
    path: str,
    overrides: Sequence[str] | None,
    *,
    devices: int | None,
    where: Rendezvous | None,
    plan: str | None,
    json: bool,
    dry_run: bool,
    ahead: Ahead | None = None,
) -> None:
    """`shardpar train --resume`: the run's own config, with overrides.

    With `ahead`, from `stand_by` with the same arguments, only what is left is done.
    """
    if ahead is not None and where is None:
        _give_signs_of_life()
        directory = RunDirectory.existing(Path(path))
        prepared = ahead.prepared if ahead.holds(directory) else None
        config = resumed_config(directory, overrides, plan)
        _begin(config, directory.path.name, directory.path, ALONE, json=json, dry_run=dry_run,
               prepared=prepared)  # fmt: skip
        return
    peers = _prepare(devices, where)
    with _all_or_none(peers):
        directory = RunDirectory.existing(Path(path))
        config = resumed_config(directory, overrides, plan)
        _begin(config, directory.path.name, directory.path, peers, json=json, dry_run=dry_run)
