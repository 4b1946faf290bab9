"""Arguments that several verbs share, and how they become a RunConfig."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from shardpar.config.load import load, load_any
from shardpar.config.schema import AnyConfig, RunConfig
from shardpar.errors import SpecError
from shardpar.spec.cluster import Cluster
from shardpar.spec.text import cluster_from_text

ConfigAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [SECTION.KEY=VALUE]...",
        help="A .gin or .yaml config, then overrides such as `train.steps=50`. "
        "Without a config: the demo.",
        show_default=False,
    ),
]
Devices = Annotated[
    int | None,
    typer.Option(
        "--devices", min=1, max=512, help="Use this many virtual CPU devices.", show_default=False
    ),
]
PlanFile = Annotated[
    str | None,
    typer.Option("--plan", metavar="FILE", help="Use this plan instead of searching for one."),
]
ClusterFile = Annotated[
    str | None,
    typer.Option("--cluster", metavar="FILE", help="Plan for these machines, present or not."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")]


def read_config(
    arguments: Sequence[str] | None, flags: dict[str, str | None]
) -> tuple[RunConfig, str]:
    """Reads the config named on the command line.

    Args:
      arguments: maybe a config path, then overrides.
      flags: overrides that came as options, by key; None where not given.

    Returns:
      The config, and a name for runs made from it.

    Raises:
      ConfigError: naming file, line and key.
    """
    path, given = _split(arguments, flags)
    return load(path, given), Path(path).stem if path else "demo"


def read_any_config(
    arguments: Sequence[str] | None, flags: dict[str, str | None]
) -> tuple[AnyConfig, str]:
    """As `read_config`, for models that are planned and for those that train tables."""
    path, given = _split(arguments, flags)
    return load_any(path, given), Path(path).stem if path else "demo"


def _split(
    arguments: Sequence[str] | None, flags: dict[str, str | None]
) -> tuple[str | None, list[str]]:
    given = list(arguments or ())
    path = given.pop(0) if given and "=" not in given[0] else None
    return path, given + [f"{key}={value}" for key, value in flags.items() if value is not None]


def read_cluster(path: str) -> Cluster:
    """Reads a cluster file.

    Raises:
      SpecError: if it is missing or malformed.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(f"cluster file {path}: {reason}") from None
    return cluster_from_text(text, path)
