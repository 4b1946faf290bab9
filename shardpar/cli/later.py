"""Imports the parts of the command line that need jax, once the input is known to be good."""

from __future__ import annotations

import importlib
from typing import Any


def later(module: str) -> Any:
    """A module of `shardpar.cli`, imported now rather than when the command line starts.

    Args:
      module: such as "planning" or "training".
    """
    return importlib.import_module(f"shardpar.cli.{module}")
