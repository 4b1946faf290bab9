"""A stage's devices become a jax Mesh."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from shardpar.errors import PlanError
from shardpar.spec.plan import Stage


def jax_mesh(stage: Stage, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The stage's mesh over real devices, with Auto axes.

    Models are written without layouts, so XLA must be free to choose what
    happens between the constraints at layer borders: that is what Auto means.

    Args:
      stage: its `devices` are positions in `devices`.
      devices: all devices of the cluster; None takes `jax.devices()`.

    Raises:
      PlanError: if the stage names a device that is not there.
    """
    available = list(jax.devices() if devices is None else devices)
    if max(stage.devices) >= len(available):
        raise PlanError(
            f"the plan uses device {max(stage.devices)}, but there are {len(available)} "
            f"{available[0].platform} devices; plan for these, or try it with "
            f"--devices {max(stage.devices) + 1}"
        )
    chosen = np.array([available[d] for d in stage.devices], dtype=object)
    names = stage.mesh.names
    return Mesh(chosen.reshape(stage.mesh.sizes), names, axis_types=(AxisType.Auto,) * len(names))
