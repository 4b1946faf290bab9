"""Which kind of run goes on: read from its directory, before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from shardpar.cli.arguments import read_any_config
from shardpar.config.load import load_any
from shardpar.config.schema import AnyConfig, RunConfig
from shardpar.errors import ConfigError
from shardpar.run.directory import RunDirectory

Config = TypeVar("Config", bound=AnyConfig)


def stored_without_plan(path: str, overrides: Sequence[str]) -> AnyConfig | None:
    """The config of a run that goes on, with overrides, if its model is not planned.

    Args:
      path: of the run's directory, or of one of runs.
      overrides: as on the command line.

    Raises:
      UserError: there is no run.
      ConfigError: the overrides do not fit.
    """
    directory = RunDirectory.existing(Path(path))
    try:
        config = load_any(str(directory.config_yaml), find_files=False)
    except ConfigError:
        return None
    if isinstance(config, RunConfig):
        return None
    given = [str(directory.config_yaml), *overrides]
    return read_any_config(given, {"train.run_dir": str(directory.path)})[0]


def earlier_run(config: Config) -> tuple[RunDirectory, Config] | None:
    """The run that `train.run_dir` holds, and the config that it had; None if it holds none.

    Args:
      config: of the run that would go on.

    Raises:
      ConfigError: it is of another kind of model.
    """
    path = config.train.run_dir
    if path is None or not RunDirectory(Path(path)).config_yaml.is_file():
        return None
    directory = RunDirectory(Path(path))
    then = load_any(str(directory.config_yaml), find_files=False)
    if not isinstance(then, type(config)):
        raise ConfigError(
            f"{path} holds a run of another kind, of model.source={then.model.source}; write "
            "another train.run_dir"
        )
    return directory, then


def require_same(directory: RunDirectory, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with what is another run.

    Args:
      directory: of the run.
      then: the values it had, by key.
      now: those that must be as they were.

    Raises:
      ConfigError: naming what differs.
    """
    changed = [key for key in now if now[key] != then.get(key)]
    if changed:
        differences = "; ".join(f"{k} was {then.get(k)!r}, now {now[k]!r}" for k in changed)
        raise ConfigError(
            f"{directory.path} holds another run: {differences}; use the old values, or another "
            "train.run_dir"
        )
