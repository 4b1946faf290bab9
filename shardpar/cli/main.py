"""The `shardpar` command: its verbs, and how it ends: 0, 1 (the run failed) or 2 (bad input).

Only light modules are imported here and in the verbs' own files, so `--help` and
a wrong config answer before jax is loaded; what needs jax lives in `planning`, `training` and
`sampling`, which a verb imports once its input is known to be good.
"""

from __future__ import annotations

import os
import sys

import typer

from shardpar.cli.doctor import doctor
from shardpar.cli.ending import ending
from shardpar.cli.explain import explain
from shardpar.cli.fl import fl
from shardpar.cli.generate import generate
from shardpar.cli.graph import graph
from shardpar.cli.launch import launch
from shardpar.cli.plan import plan
from shardpar.cli.profile import profile
from shardpar.cli.replan import replan
from shardpar.cli.reshard import reshard
from shardpar.cli.train import train

app = typer.Typer(
    name="shardpar",
    help="Decides how a Flax model is laid out over the machines you have, and trains it.",
    epilog="Start with: shardpar train",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (train, plan, explain, replan, reshard, generate, doctor):
    app.command()(verb)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(launch)
app.add_typer(profile, name="profile")
app.add_typer(graph, name="graph")
app.add_typer(fl, name="fl")


@app.callback()
def _version_option(
    version: bool = typer.Option(
        False, "--version", help="Print the version and stop.", is_eager=True
    ),
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("shardpar"))  # noqa: T201
        raise typer.Exit


def run() -> None:
    """Entry point of the command; turns every error into one clear message and an exit code."""
    # XLA's C++ side logs partitioner notes straight to stderr, through any progress line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        app()
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(ending(error))


if __name__ == "__main__":
    run()
