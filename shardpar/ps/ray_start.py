"""Starts Ray on this machine, or joins a Ray that runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from shardpar.errors import PlanError, RunError

_ATTEMPTS = 3


def ray_module() -> ModuleType:
    """The module `ray`.

    Raises:
      PlanError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise PlanError(
            "servers and workers in processes of their own need Ray: pip install 'shardpar[ray]'"
        ) from error
    return ray


def start_ray(address: str | None = None, **given: Any) -> None:
    """Makes this process one of a Ray cluster, unless it is already.

    Args:
      address: of one that runs, "auto" for this machine's; None starts one here.
      **given: what else `ray.init` takes.

    Raises:
      PlanError: Ray is not installed.
      RunError: there is none at the address, or it does not start here.
    """
    ray = ray_module()
    if ray.is_initialized():
        return
    if address is None:
        given = {"include_dashboard": False, **given}
    else:
        given = {"address": address, **given}
    for attempts_left in reversed(range(_ATTEMPTS if address is None else 1)):
        try:
            with _quiet():
                ray.init(log_to_driver=False, configure_logging=False, **given)
            return
        # On a busy machine, Ray gives up waiting for its own processes with a bare Exception.
        except Exception as error:
            ray.shutdown()
            if attempts_left:
                continue
            where = "does not start here" if address is None else f"is not at {address}"
            raise RunError(
                f"Ray {where}: {str(error).strip().partition(chr(10))[0]}; see `ray status`"
                + ("" if address is None else ", or leave the address out to start one here")
            ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off the screen what Ray says about its own insides while it starts."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Nothing of this process goes on in the forks, which become other programs.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            yield
    finally:
        logger.setLevel(level)
