"""`shardpar launch`: several processes of one run on this machine, for trying it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from shardpar.errors import UserError
from shardpar.run.local_processes import run_processes


def launch(
    context: typer.Context,
    processes: Annotated[
        int, typer.Option("-n", "--processes", min=1, max=64, help="How many processes.")
    ] = 2,
) -> None:
    """Start several processes of a command on this machine, as a cluster would.

    Each line they print is marked with the number of its process. On a cluster its own
    launcher does this: see deploy/ for SLURM and Kubernetes.

    Examples:

        shardpar launch -n 2 -- train --devices 4 train.steps=20
    """
    if not context.args:
        raise UserError(
            "nothing to launch; write the command after two dashes, such as: "
            "shardpar launch -n 2 -- train --devices 4"
        )
    code = run_processes([sys.executable, "-m", "shardpar", *context.args], processes)
    raise typer.Exit(code)
