"""Runs `shardpar train --supervise`: the supervisor, and what it starts trainers with."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from shardpar.cli.arguments import read_config
from shardpar.config.schema import RunConfig
from shardpar.errors import UserError
from shardpar.run.directory import RunDirectory
from shardpar.run.supervisor import Job, Supervisor, node_name


def supervise(
    arguments: Sequence[str],
    config: RunConfig,
    name: str,
    *,
    resume: str | None,
    flags: Sequence[str],
    nodes: int,
    node: str | None,
    address: str | None,
) -> int:
    """Keeps a run alive.

    Args:
      arguments: config and overrides, as they were given.
      config: what they say.
      name: for a new run directory.
      resume: the run to go on with.
      flags: further flags of every trainer.
      nodes: how many are meant to train.
      node: the name of this one; None takes the host's.
      address: where others reach it; None takes the host's name.

    Returns:
      The exit code.
    """
    given = resume or config.train.run_dir
    if given is None and nodes > 1:
        raise UserError(
            "nodes that train together need one run directory that all of them see; give it with "
            "--run-dir DIR"
        )
    directory = Path(given) if given else RunDirectory.fresh(name, datetime.now()).path
    here = node_name(node)
    base = [sys.executable, "-m", "shardpar", "train"]
    first = [*base, *arguments, *(["--resume", resume] if resume else [])]
    if resume is None:
        first += ["--run-dir", str(directory)]
    # A node's name is for people: only the host's name leads to it from elsewhere.
    reached = address or (socket.gethostname() if nodes > 1 else "localhost")
    job = Job(
        directory,
        [*first, *flags],
        [*base, "--resume", str(directory), *_lasting(flags)],
        here,
        nodes,
        reached,
        config.supervise,
    )
    with Supervisor(job, _say) as supervisor:
        return supervisor.run()


def stored_config(resume: str, arguments: Sequence[str]) -> tuple[RunConfig, str]:
    """The config of a run that goes on."""
    directory = RunDirectory.existing(Path(resume))
    return read_config([str(directory.config_yaml), *arguments], {})


def _lasting(flags: Sequence[str]) -> list[str]:
    """Without the plan file: the run has kept its plan, and may have had to change it."""
    at = flags.index("--plan") if "--plan" in flags else len(flags)
    return [*flags[:at], *flags[at + 2 :]]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201
