"""Says on what a run was made: versions and devices, for its report and for `shardpar doctor`."""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import jax

_PACKAGES = ("shardpar", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def describe_environment(devices: Sequence[jax.Device]) -> dict[str, str]:
    """Collects what someone needs to know who wants the same numbers again.

    Args:
      devices: those that the run uses.

    Returns:
      A few names with their values, in the order to show them.

    >>> list(describe_environment(jax.devices()))
    ['Devices', 'Host', 'Python', 'Packages', 'Command']
    """
    kinds = Counter(device.device_kind for device in devices)
    return {
        "Devices": ", ".join(f"{count} × {kind}" for kind, count in kinds.items()) or "none",
        "Host": f"{platform.node()}, {os.cpu_count()} CPU cores, {platform.platform()}",
        "Python": platform.python_version(),
        "Packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "Command": " ".join(sys.argv),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
