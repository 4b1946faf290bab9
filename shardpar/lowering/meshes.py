"""A stage's devices become a jax Mesh."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

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


def mesh_over_stages(
    stages: Sequence[Stage], axis: str, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The meshes of stages that have equal ones as one, with a first axis over the stages.

    Args:
      stages: their devices are positions in `devices`.
      axis: the first axis's name.
      devices: all devices of the cluster; None takes `jax.devices()`.

    Raises:
      PlanError: if a stage names a device that is not there.
    """
    each = [jax_mesh(stage, devices) for stage in stages]
    names = (axis, *each[0].axis_names)
    joined = np.stack([mesh.devices for mesh in each])
    return Mesh(joined, names, axis_types=(AxisType.Auto,) * len(names))


def manual_over(mesh: Mesh, axis: str) -> AbstractMesh:
    """The mesh as it is inside a `shard_map` over one of its axes."""
    return mesh.abstract_mesh.update_axis_types({axis: AxisType.Manual})
